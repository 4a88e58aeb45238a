"""Guarded discovery of plugins: one that is broken is named, with the cause, and the rest go on.

pluggy itself is silent about a misspelt hook, a missing marker, and half-registered plugins, and lets one
raising plugin end a whole call; each of these is caught here, per plugin. Loads no torch until components are
asked for.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib.metadata
import importlib.util
import inspect
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pluggy

from tryplicity import hookspecs
from tryplicity.configs import check_config
from tryplicity.errors import UserError, did_you_mean
from tryplicity.hookspecs import COMPONENT_HOOKS
from tryplicity.parts import Component
from tryplicity.registry import Registry
from tryplicity.run import Run, file_digest
from tryplicity.watching import quick, quiet, top, untouched

GROUP = "tryplicity"
WITHOUT = "TRYPLICITY_DISABLE_PLUGINS"  # names, with commas between them: for the processes that are started too
TRACE = "TRYPLICITY_TRACE_PLUGINS"
#: what a spec, a profile or an option says in place of a component
RESERVED = {"auto", "none", "null", "true", "false", "type"}


@dataclass
class Plugin:
    """One plugin that was found, loaded or not."""

    name: str
    origin: str  # distribution and version, or the file
    cause: str | None = None  # why it was left out
    #: "mixer gqa", "hook tryplicity_run_started": filled when components are asked for
    provides: list[str] = field(default_factory=list)
    version: str | None = None  # of its distribution; a file has none
    disabled: bool = False  # the user asked for it to be left out

    @property
    def known_as(self) -> tuple[str, ...]:
        """What a user may call it: its name, or that of what it was installed with."""
        return (self.name,) if self.version is None else (self.name, self.origin.rpartition(" ")[0])

    @property
    def hooks(self) -> list[str]:
        """Those that bring no components."""
        return [one.partition(" ")[2] for one in self.provides if one.startswith("hook ")]

    @property
    def families(self) -> dict[str, list[str]]:
        """The names of what it provides, by family."""
        found: dict[str, list[str]] = {}
        for family, _, name in (one.partition(" ") for one in self.provides if not one.startswith("hook ")):
            found.setdefault(family, []).append(name)
        return found

    def __str__(self) -> str:
        return f"plugin {self.name} ({self.origin})"


class Plugins:
    """The loaded plugins: their components in `registry`, their other hooks through `call`.

    A plugin at fault is left out whole and named on stderr; with `strict`, UserError is raised instead. without: names
    of plugins, or of distributions, that are not to be loaded. trace: say of every import and every call of a hook how
    long it took, on stderr.
    """

    def __init__(self, strict: bool = False, without: Iterable[str] = (), trace: bool = False) -> None:
        self.manager = pluggy.PluginManager(GROUP)
        self.manager.add_hookspecs(hookspecs)
        self._found: list[Plugin] = []
        self.strict, self.trace = strict, trace
        self.without = set(without)
        self._reported: set[str] = set()

    def load(self, name: str, origin: str, importer: Callable[[], ModuleType], version: str | None = None) -> None:
        """Import, check and register one plugin."""
        plugin = Plugin(name, origin, version=version)
        self._found.append(plugin)
        if not self.without.isdisjoint(plugin.known_as):
            plugin.cause, plugin.disabled = f"disabled by --without-plugin or {WITHOUT}", True
            return
        with self._guarded(plugin), untouched(self._packages(name)) as own:
            if twin := next((p for p in self._found[:-1] if p.name == name), None):
                raise UserError(f"there is already a {twin}; rename one of them")
            # a file is asked for by name, and seldom; what is installed is imported by every command
            with self._timed(name, "import"), quick(str(plugin)) if version else contextlib.nullcontext():
                module = importer()
            if not isinstance(module, ModuleType):
                raise UserError(f"a plugin is a module; its entry point names a {type(module).__name__}")
            own.add(top(module.__name__))
            self._check_hooks(module)
            self.manager.register(module, name)

    @functools.cached_property
    def registry(self) -> Registry:
        """The components of all plugins, asked for when first needed: this imports torch."""
        from tryplicity.components import FAMILIES

        registry = Registry()
        for plugin in self._found:
            if plugin.cause:
                continue
            with self._guarded(plugin), untouched(self._packages(plugin.name)) as own:
                own.add(top(self.manager.get_plugin(plugin.name).__name__))
                components = []
                for component, hook in self._components(plugin.name):
                    _check_component(component, hook)
                    check_config(component.Config, FAMILIES)
                    components.append(component)
                registry.add_all(components, str(plugin))
                plugin.provides = [f"{component.family} {component.name}" for component in components]
                plugin.provides += [f"hook {hook}" for hook in self._other_hooks(self.manager.get_plugin(plugin.name))]
            if plugin.cause:
                self.manager.unregister(name=plugin.name)
        registry.failures = [f"{plugin}: {plugin.cause}" for plugin in self._found if plugin.cause]
        return registry

    @property
    def found(self) -> list[Plugin]:
        """Every plugin, with what it provides or why it was left out."""
        self.registry  # noqa: B018 - until components are asked for, neither is known
        return self._found

    def call(self, hook: str, **arguments: Any) -> list[Any]:
        """Call a hook of every plugin; what they return but None, in order of loading. A fault is told on
        stderr, once."""
        results = []
        for implementation in getattr(self.manager.hook, hook).get_hookimpls():
            try:
                chosen = {name: arguments[name] for name in implementation.argnames}
                with self._timed(implementation.plugin_name, hook):
                    result = implementation.function(**chosen)
                if result is not None:
                    results.append(result)
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # SystemExit and its kin too
                who = f"plugin {implementation.plugin_name}: {hook}"
                if who not in self._reported:
                    print(f"warning: {who} raised {_cause(error)}; going on without it", file=sys.stderr)
                self._reported.add(who)
        return results

    @contextlib.contextmanager
    def _guarded(self, plugin: Plugin) -> Iterator[None]:
        """On any fault inside, leave the plugin out whole and say why."""
        try:
            with quiet(str(plugin)):
                yield
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit and its kin too
            plugin.cause = _cause(error)
            if self.strict:
                raise UserError(f"{plugin}: {plugin.cause}") from None
            print(f"warning: left out {plugin}: {plugin.cause}", file=sys.stderr)

    @contextlib.contextmanager
    def _timed(self, plugin: str, what: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            if self.trace:
                print(f"trace: plugin {plugin}: {what} took {1e3 * (time.perf_counter() - start):.2f} ms",
                      file=sys.stderr)

    def _packages(self, name: str) -> set[str]:
        """Of the plugins loaded so far, but this one."""
        return {top(module.__name__) for other, module in self.manager.list_name_plugin() if module and other != name}

    def _check_hooks(self, module: ModuleType) -> None:
        """Refuse what pluggy would pass over in silence."""
        specs = {n: inspect.signature(f) for n, f in vars(hookspecs).items() if n.startswith("tryplicity_")}
        marked = 0
        for name, function in vars(module).items():
            if not inspect.isroutine(function):
                continue
            options = self.manager.parse_hookimpl_opts(module, name)
            if options is None:
                if name.startswith("tryplicity_"):
                    raise UserError(f"{name} lacks its marker: put @hookimpl above it")
                continue
            marked += 1
            hook = options.get("specname") or name
            if hook not in specs:
                raise UserError(f"no hook is called {hook!r}{did_you_mean(hook, specs)}")
            if options["wrapper"] or options["hookwrapper"] or inspect.iscoroutinefunction(function):
                raise UserError(f"{name} must be a plain function, neither a wrapper nor async")
            wrong = set(inspect.signature(function).parameters) - set(specs[hook].parameters)
            if wrong:
                allowed = ", ".join(specs[hook].parameters) or "none"
                wrong = ", ".join(sorted(wrong))
                raise UserError(f"{name} takes unknown argument(s) {wrong} (there are: {allowed})")
        if not marked:
            raise UserError("it has no hooks: mark its tryplicity_... functions with @hookimpl")

    def _other_hooks(self, module: ModuleType) -> Iterator[str]:
        """The hooks of a plugin that bring no components."""
        for name in list(vars(module)):
            options = self.manager.parse_hookimpl_opts(module, name)
            if options and (hook := options.get("specname") or name) not in COMPONENT_HOOKS:
                yield hook

    def _components(self, plugin: str) -> Iterator[tuple[Any, str]]:
        """What a plugin's component hooks return, and the hook it came from."""
        module = self.manager.get_plugin(plugin)
        for name in list(vars(module)):
            options = self.manager.parse_hookimpl_opts(module, name)
            hook = (options.get("specname") or name) if options else None
            if hook in COMPONENT_HOOKS:
                with self._timed(plugin, hook):
                    returned = getattr(module, name)()
                if not isinstance(returned, list | tuple):
                    raise UserError(f"{name} returned {returned!r}; return a list of component classes")
                yield from ((component, hook) for component in returned)


def _cause(error: BaseException) -> str:
    """What went wrong and where in the plugin, on one line."""
    if isinstance(error, UserError):
        return " ".join(str(error).split())
    where = ""
    if not isinstance(error, SyntaxError):  # whose text says where
        frames = [f for f in traceback.extract_tb(error.__traceback__)
                  if f.filename != __file__ and "importlib" not in f.filename]
        where = f" ({os.path.basename(frames[-1].filename)}, line {frames[-1].lineno})" if frames else ""
    return " ".join(f"{type(error).__name__}: {error}{where}".split())


def _check_component(component: Any, hook: str) -> None:
    families = COMPONENT_HOOKS[hook]
    if not (isinstance(component, type) and issubclass(component, Component)):
        raise UserError(f"{hook} returned {component!r}, which is not a component class")
    family = getattr(component, "family", None)
    if family not in families:
        others = " or ".join(name for name, brings in COMPONENT_HOOKS.items() if family in brings)
        remedy = f"return it from {others}" if others else f"it may bring: {', '.join(families)}"
        raise UserError(f"{hook} returned {component.__name__} of family {family!r}; {remedy}")
    if not (isinstance(getattr(component, "name", None), str) and component.name):
        raise UserError(f'{component.__name__} has no name: set name = "..." on the class')
    if component.name in RESERVED:
        raise UserError(f"{component.__name__} is called {component.name!r}, which means something else where a "
                        "component is named; give it another name")
    if isinstance(component.Config, type) and "type" in getattr(component.Config, "__annotations__", {}):
        raise UserError(f"{component.__name__}.Config has an option called 'type', which is the key that names the "
                        "component; give the option another name")


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    name = f"tryplicity_plugin_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None:
        raise UserError(f"{path} is not a Python file; its name must end in .py")
    _reach_neighbours(path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _reach_neighbours(path: Path) -> None:
    """Let a plugin's file import what stands beside it, last of all places: it cannot take the place of a module that
    others import. Raises UserError where it would get another module than the one beside it."""
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    for name in _imported(path):
        beside = [p for p in (Path(folder, f"{name}.py"), Path(folder, name, "__init__.py")) if p.is_file()]
        if beside:
            found = importlib.util.find_spec(name)
            taken = Path(found.origin).resolve() if found and found.origin else "another module"
            if taken not in beside:
                raise UserError(f"it imports {name}, and Python takes {taken} for that, not {beside[0]}; rename the "
                                "latter")


def _imported(path: Path) -> set[str]:
    """The first names of what a file imports anywhere in it; nothing where it cannot be parsed."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return set()
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level}
    return {name.partition(".")[0] for name in names}


def remembered(run: str | Path | None, given: Sequence[str] = ()) -> tuple[str, ...]:
    """The plugin files that a run folder was made with, but those given anyway. One that is gone or has changed is
    left out and named on stderr: what a folder says is not run unless it is what the user ran before."""
    if run is None:
        return ()
    here, files = {Path(file).stem: Path(file) for file in given}, []
    for path, digest in Run(Path(run)).plugin_files():
        own = here.get(path.stem)
        try:
            same = file_digest(own or path) == digest
        except OSError:
            if own is None:
                print(f"warning: this run was made with the plugin {path}, which is gone; --plugin says where it is",
                      file=sys.stderr)
            continue
        if own is not None:
            if not same:
                print(f"note: the plugin {own} is not as it was when this run was made", file=sys.stderr)
        elif same:
            files.append(str(path))
        else:
            print(f"warning: the plugin {path} has changed since this run was made; --plugin {path} takes it as it is "
                  "now", file=sys.stderr)
    return tuple(files)


def load_plugins(files: Iterable[str] = (), strict: bool = False) -> Plugins:
    """Every installed plugin (entry points of the group `tryplicity`), and the given files.

    Broken ones are left out and named on stderr; with strict (or TRYPLICITY_STRICT=1) they raise UserError. Those that
    TRYPLICITY_DISABLE_PLUGINS names are not loaded; TRYPLICITY_TRACE_PLUGINS=1 says how long each hook takes.
    """
    without = tuple(name for name in os.environ.get(WITHOUT, "").split(",") if name.strip())
    return _load(tuple(files), strict or os.environ.get("TRYPLICITY_STRICT") == "1",
                 tuple(name.strip() for name in without), os.environ.get(TRACE) == "1")


@functools.cache
def _load(files: tuple[str, ...], strict: bool, without: tuple[str, ...] = (), trace: bool = False) -> Plugins:
    plugins = Plugins(strict, without, trace)
    found = [(p, p.dist.name if p.dist else "") for p in importlib.metadata.entry_points(group=GROUP)]
    # the project's own first: a stranger's component cannot take the place of one of them
    for point, owner in sorted(found, key=lambda f: (f[1] != GROUP, f[1], f[0].name)):
        name = point.name if point.name == owner else f"{owner}.{point.name}"
        version = point.dist.version if owner else None
        plugins.load(name, f"{owner} {version}" if owner else "unknown distribution", point.load, version)
    for file in files:
        plugins.load(Path(file).stem, str(file), functools.partial(_import_file, Path(file)))
    known = {known for plugin in plugins._found for known in plugin.known_as}
    for name in plugins.without - known:
        print(f"warning: no plugin is called {name}, so none is left out{did_you_mean(name, known)}", file=sys.stderr)
    if plugins.strict:
        plugins.registry  # noqa: B018 - strict means that every fault shows now
    return plugins


def load_commands(files: Iterable[str] = ()) -> list[Any]:
    """The command-line commands of the installed plugins, and of these files. Loads no torch."""
    commands = []
    for result in load_plugins(files).call("tryplicity_commands"):
        commands += result if isinstance(result, list | tuple) else [result]
    return commands
