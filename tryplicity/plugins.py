"""Guarded discovery of plugins: one that is broken is named, with the cause, and the rest go on.

pluggy itself is silent about a misspelt hook, a missing marker, and half-registered plugins, and lets one raising
plugin end a whole call; each of these is caught here, per plugin. Loads no torch.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pluggy

from tryplicity import hookspecs
from tryplicity.errors import UserError, did_you_mean
from tryplicity.hookspecs import COMPONENT_HOOKS
from tryplicity.parts import Component
from tryplicity.registry import Registry

GROUP = "tryplicity"


@dataclass
class Plugin:
    """One plugin that was found, loaded or not."""

    name: str
    origin: str  # distribution and version, or the file
    cause: str | None = None  # why it was left out
    provides: list[str] = field(default_factory=list)


class Plugins:
    """The loaded plugins: their components in `registry`, their other hooks through `call`."""

    def __init__(self) -> None:
        self.manager = pluggy.PluginManager(GROUP)
        self.manager.add_hookspecs(hookspecs)
        self.registry = Registry()
        self.found: list[Plugin] = []

    def load(self, name: str, origin: str, importer: Callable[[], ModuleType]) -> None:
        """Import, check and register one plugin; on any fault leave it out whole and remember why."""
        plugin = Plugin(name, origin)
        self.found.append(plugin)
        try:
            module = importer()
            self._check_hooks(module)
            if name in dict(self.manager.list_name_plugin()):
                raise UserError(f"another plugin is already called {name!r}")
            for component in self._components(module):
                self.registry.add(component, f"plugin {name} ({origin})")
                plugin.provides.append(f"{component.family} {component.name}")
            self.manager.register(module, name)
        except (Exception, SystemExit) as error:
            text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}{_where(error)}"
            plugin.cause, plugin.provides = " ".join(text.split()), []
            self.registry.remove_owner(f"plugin {name} ({origin})")
            self.registry.failures.append(f"plugin {name} ({origin}): {plugin.cause}")

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
            wrong = set(inspect.signature(function).parameters) - set(specs[hook].parameters)
            if wrong:
                allowed = ", ".join(specs[hook].parameters) or "none"
                raise UserError(f"{name} takes unknown argument(s) {', '.join(sorted(wrong))} (there are: {allowed})")
        if not marked:
            raise UserError("it has no hooks: mark its tryplicity_... functions with @hookimpl")

    def _components(self, module: ModuleType) -> Iterator[type[Component]]:
        for hook, families in COMPONENT_HOOKS.items():
            for name, function in list(vars(module).items()):
                options = self.manager.parse_hookimpl_opts(module, name)
                if not options or (options.get("specname") or name) != hook:
                    continue
                for component in function() or []:
                    _check_component(component, hook, families)
                    yield component

    def call(self, hook: str, **arguments: Any) -> list[Any]:
        """Call a hook of every plugin, each guarded; results in order of loading. A fault is one line on stderr."""
        results = []
        for implementation in self.manager.hook.__dict__[hook].get_hookimpls():
            try:
                chosen = {name: arguments[name] for name in implementation.argnames}
                results.append(implementation.function(**chosen))
            except (Exception, SystemExit) as error:
                text = f"plugin {implementation.plugin_name}: {hook} raised {type(error).__name__}: {error}"
                print(" ".join(text.split()), file=sys.stderr)
        return results


def _where(error: BaseException) -> str:
    """' (file.py:12)' of the innermost frame, where there is one."""
    frames = inspect.getinnerframes(error.__traceback__) if error.__traceback__ else []
    return f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""


def _check_component(component: Any, hook: str, families: tuple[str, ...]) -> None:
    if not (isinstance(component, type) and issubclass(component, Component)):
        raise UserError(f"{hook} returned {component!r}, which is not a component class")
    label = component.__name__
    if getattr(component, "family", None) not in families:
        raise UserError(f"{hook} returned {label} of family {getattr(component, 'family', None)!r}; it may bring: "
                        f"{', '.join(families)}")
    if not isinstance(getattr(component, "name", None), str):
        raise UserError(f"{label} has no name: set `name = \"...\"` on the class")
    config = component.Config
    if not (dataclasses.is_dataclass(config) and config.__dataclass_params__.frozen):
        raise UserError(f"{label}.Config must be a dataclass marked @dataclass(frozen=True)")


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(f"tryplicity_plugin_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise
    return module


@functools.cache
def load_plugins(files: tuple[str, ...] = (), strict: bool = False) -> Plugins:
    """Load every installed plugin (entry points of the group `tryplicity`) and the given files.

    Broken ones are left out and named on stderr; with strict (or TRYPLICITY_STRICT=1) they raise UserError.
    """
    plugins = Plugins()
    points = sorted(importlib.metadata.entry_points(group=GROUP), key=lambda p: (p.dist.name != GROUP, p.name))
    for point in points:
        owner = f"{point.dist.name} {point.dist.version}" if point.dist else "unknown distribution"
        name = point.name if point.dist is None or point.dist.name != GROUP else f"{GROUP}.{point.name}"
        plugins.load(name, owner, point.load)
    for file in files:
        path = Path(file)
        plugins.load(path.stem, str(path), functools.partial(_import_file, path))
    if plugins.registry.failures:
        if strict or os.environ.get("TRYPLICITY_STRICT") == "1":
            raise UserError("\n".join(plugins.registry.failures))
        for failure in plugins.registry.failures:
            print(f"warning: left out {failure}", file=sys.stderr)
    return plugins
