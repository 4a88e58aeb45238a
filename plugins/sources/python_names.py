"""The documented names of Python and of installed packages, each with what somebody makes of its docstring.

Those of Python files are read from their syntax trees, and nothing of them is imported; those of the built-in types and
of the modules of the standard library written in C are read from the interpreter. A name is the shortest public one:
what `numpy/_core/numeric.py` defines and `numpy/__init__.py` imports is `numpy.allclose`.
"""

from __future__ import annotations

import ast
import builtins
import gc
import importlib
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tryplicity_plugins.sources import python_docs

_DEEPEST = 3            # dots in a name


class Meaning(NamedTuple):
    """What the documentation says of a name first."""

    name: str
    kind: str       # function, method, class, attribute, statement or module
    answer: str
    url: str


# --- Python files ---

#: what to say of a name, from its docstring and what has it (a node of a syntax tree, an object, or None)
AnswerOf = Callable[[str, object], str | None]


@dataclass
class _Module:
    """What one file defines, and which names it takes from others."""

    inner: str                                  # the path inside its package
    package: bool                               # whether it is an __init__.py
    told: AnswerOf
    meanings: dict[str, tuple[str, str]] = field(default_factory=dict)      # dotted name inside -> kind, answer
    exported: set[str] | None = None            # __all__, where it is written out
    computed: bool = False                      # whether more is added to it
    added: list[tuple[str, str, str]] = field(default_factory=list)         # full name, kind, answer: of C code
    taken: dict[str, tuple[str, str]] = field(default_factory=dict)         # name here -> module, name there
    stars: list[str] = field(default_factory=list)
    exports: dict[str, tuple[str, str]] | None = None                       # `_exports`, once it is known


# the private files behind public modules of the standard library
_PUBLIC_NAME = {"posixpath": "os.path", "genericpath": "os._path", "_collections_abc": "collections.abc",
                "_pydatetime": "datetime", "_pydecimal": "decimal", "_pyio": "io", "_strptime": "time._strptime"}
_LEFT_OUT = {"ntpath", "antigravity", "this", "idlelib", "lib2to3", "turtledemo", "ensurepip", "distutils", "tests",
             "test", "testing", "encodings", "conftest", "benchmarks", "nturl2path", "setup", "pydoc_data", "__main__",
             "externals", "_inductor", "_dynamo", "_numpy", "_refs"}


def package_meanings(package: str, root: Path, told: AnswerOf) -> Iterator[Meaning]:
    """The public names of a package's Python files, of which `told` has something to say."""
    modules = {}
    for path in python_docs._python_files(package, root):
        inner = path.relative_to(root).as_posix()
        name = inner.removesuffix(".py").removesuffix("__init__").rstrip("/").replace("/", ".")
        name = f"{package}.{name}".rstrip(".") if package != "python" else _PUBLIC_NAME.get(name, name)
        if _LEFT_OUT.isdisjoint(name.split(".")) and (module := _read(name, inner, path, told)):
            modules[name] = module

    public: dict[tuple[str, str], str] = {}         # where a name is defined -> its shortest public one
    for name in modules:
        if _is_public(name):
            for exported, origin in _exports(modules, name).items():
                dotted = f"{name}.{exported}"
                best = public.setdefault(origin, dotted)
                if (dotted.count("."), dotted) < (best.count("."), best):
                    public[origin] = dotted

    for name, module in modules.items():
        page = python_docs._page(package, name, module.inner)
        for inside, (kind, answer) in module.meanings.items():
            base, dot, member = inside.partition(".")
            dotted = public.get((name, base), "_") if inside else name
            yield from _public_meaning(f"{dotted}{dot}{member}", kind, answer, page)
        for full, kind, answer in module.added:
            home = next((home for home in _beginnings(full) if home in modules), package)
            base, dot, member = full.removeprefix(f"{home}.").partition(".")
            # a package's own names may be set by its C code alone, where no file says so
            dotted = public.get(_origin(modules, home, base), f"{package}.{base}" if home == package else "_")
            yield from _public_meaning(f"{dotted}{dot}{member}", kind, answer, page)


def _public_meaning(name: str, kind: str, answer: str, page: str) -> Iterator[Meaning]:
    if _is_public(name) and name.count(".") <= _DEEPEST:
        yield Meaning(name, kind, answer, f"{page}#{name}" if page.endswith(".html") else page)


def _is_public(name: str) -> bool:
    return not any(part.startswith("_") for part in name.split("."))


def _beginnings(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _read(name: str, inner: str, path: Path, told: AnswerOf) -> _Module | None:
    collecting = gc.isenabled()
    gc.disable()        # a tree has no cycles, and looking for them takes three times as long as making it
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = _parse(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, SyntaxError, ValueError):
        return None
    finally:
        if collecting:
            gc.enable()
    module = _Module(inner, inner.endswith("__init__.py"), told)
    _note(module, "", "module", ast.get_docstring(tree, clean=False))
    _visit(module, name, tree.body)
    return module


def _parse(text: str, tries: int = 5) -> ast.Module:
    """Python 3.11 raises SystemError where two threads parse at once, for it counts their depths together."""
    for _ in range(tries - 1):
        try:
            return ast.parse(text)
        except SystemError:
            continue
    return ast.parse(text)


def _visit(module: _Module, name: str, body: list[ast.stmt]) -> None:
    for node in body:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                _note(module, node.name, "function", ast.get_docstring(node, clean=False), node)
            case ast.ClassDef():
                _note(module, node.name, "class", ast.get_docstring(node, clean=False), node)
                for inner in node.body:
                    if isinstance(inner, (ast.FunctionDef, ast.AsyncFunctionDef)):
                        held = any("property" in ast.unparse(d) for d in inner.decorator_list)
                        _note(module, f"{node.name}.{inner.name}", "attribute" if held else "method",
                              ast.get_docstring(inner, clean=False), inner)
            case ast.ImportFrom():
                _imported(module, name, node)
            case ast.Assign(targets=[ast.Name("__all__")], value=ast.List() | ast.Tuple() as words):
                module.exported = {word.value for word in words.elts if isinstance(word, ast.Constant)}
            case ast.AugAssign(target=ast.Name("__all__")) | ast.Expr(ast.Call(ast.Attribute(ast.Name("__all__")))):
                module.computed = True
            case ast.Expr(value=ast.Call() as call):
                _added(module, call)
            case ast.Assign(targets=[ast.Name(given)], value=ast.Call() as call) if len(call.args) > 1:
                if ast.unparse(call.func).endswith("add_docstr"):
                    _note(module, given, "function", _text(call.args[1]))
            case ast.If() | ast.Try():
                _visit(module, name, [*node.body, *node.orelse, *getattr(node, "finalbody", [])])


def _note(module: _Module, inside: str, kind: str, docstring: str | None, node: ast.AST | None = None) -> None:
    """Keep the first documentation of a public name."""
    last = inside.rpartition(".")[2]
    if docstring and not last.startswith("_") and inside not in module.meanings and (
            answer := module.told(docstring, node)):
        module.meanings[inside] = kind, answer


def _imported(module: _Module, name: str, node: ast.ImportFrom) -> None:
    origin = node.module or ""
    if node.level:
        parts = name.split(".")
        parts = parts[:len(parts) - node.level + module.package]
        origin = ".".join([*parts, *([origin] if origin else [])])
    origin = _PUBLIC_NAME.get(origin, origin)
    for alias in node.names:
        if alias.name == "*":
            module.stars.append(origin)
        else:
            module.taken[alias.asname or alias.name] = origin, alias.name


def _added(module: _Module, call: ast.Call) -> None:
    """Documentation given in a call: torch's add_docstr(torch.abs, text), numpy's add_newdoc(module, name, text)."""
    function = ast.unparse(call.func).rpartition(".")[2]
    texts = [_text(argument) for argument in call.args]
    if function == "add_docstr" and len(texts) == 2:
        name, kind, text = ast.unparse(call.args[0]), "function", texts[1]
    elif function == "add_docstr_all" and len(texts) == 2:
        name, kind, text = f"torch.Tensor.{texts[0]}", "method", texts[1]
    elif function == "add_newdoc" and len(texts) == 3 and isinstance(call.args[2], ast.Tuple):
        member, text = (_text(part) for part in call.args[2].elts)
        name, kind = f"{texts[0]}.{texts[1]}.{member}", "method"
    elif function == "add_newdoc" and len(texts) == 3:
        name, kind, text = f"{texts[0]}.{texts[1]}", "function", texts[2]
    else:
        return
    if text and (answer := module.told(text, None)):
        module.added.append((name, kind, answer))


def _text(node: ast.expr) -> str | None:
    """A string that is written out, also where pieces are put into it or added behind it."""
    match node:
        case ast.Constant(value=str()):
            return node.value
        case ast.Call(func=ast.Attribute(value=inner, attr="format" | "replace")) | ast.BinOp(left=inner):
            return _text(inner)
    return None


def _exports(modules: dict[str, _Module], name: str) -> dict[str, tuple[str, str]]:
    """The public names of a module, and where each is defined: (module, name there)."""
    module = modules.get(name)
    if module is None:
        return {}
    if module.exports is None:
        module.exports = {}     # what modules that take from each other in a circle see of one another
        module.exports = _found_exports(modules, name, module)
    return module.exports


def _found_exports(modules: dict[str, _Module], name: str, module: _Module) -> dict[str, tuple[str, str]]:
    # where __all__ is not written out, an __init__.py has what it takes from its own package
    says = module.exported is not None and not module.computed
    found: dict[str, tuple[str, str]] = {}
    for star in module.stars:
        found |= _exports(modules, star)
    for here, (origin, there) in module.taken.items():
        if here in (module.exported or ()) or (not says and module.package and origin.startswith(f"{name}.")):
            found[here] = _origin(modules, origin, there)
    found |= {inside: (name, inside) for inside in module.meanings if inside and "." not in inside}
    found |= {here: (name, here) for here in module.exported or () if here not in found}
    return {here: origin for here, origin in found.items()
            if not here.startswith("_") and (not says or here in module.exported)}


def _origin(modules: dict[str, _Module], module: str, name: str) -> tuple[str, str]:
    """Where a name that `module` has is defined."""
    for _ in range(20):
        if module not in modules or name in modules[module].meanings:
            break
        if name in modules[module].taken:
            module, name = modules[module].taken[name]
            continue
        given = (_exports(modules, star).get(name) for star in modules[module].stars)
        onward = next((origin for origin in given if origin), None)
        if onward is None:
            break
        module, name = onward
    return module, name


# --- what is written in C ---

C_MODULES = ("builtins", "array", "binascii", "bisect", "bz2", "cmath", "collections", "csv", "datetime", "decimal",
              "functools", "gc", "hashlib", "heapq", "io", "itertools", "json", "math", "operator", "os", "random",
              "re", "select", "signal", "socket", "sqlite3", "statistics", "string", "struct", "sys", "threading",
              "time", "types", "unicodedata", "weakref", "zlib")


def c_meanings(told: AnswerOf, modules: Sequence[str] = C_MODULES) -> Iterator[Meaning]:
    """The names of the built-in types and of modules of the standard library that are not Python files."""
    for module_name in modules:
        try:
            module = importlib.import_module(module_name)
        except ImportError:
            continue            # left out of this interpreter
        prefix = "" if module_name == "builtins" else f"{module_name}."
        page = "functions" if module_name == "builtins" else module_name
        for name in sorted(getattr(module, "__all__", None) or vars(module)):
            value = getattr(module, name, None)
            if name.startswith("_") or not (inspect.isroutine(value) or inspect.isclass(value)):
                continue
            if inspect.isclass(value) and value.__module__.lstrip("_") != module_name:
                continue        # at home elsewhere
            kind = "class" if inspect.isclass(value) else "function"
            home = "exceptions" if page == "functions" and name in _EXCEPTIONS else page
            yield from _c_meaning(f"{prefix}{name}", kind, value, home, told)
            for member, inner in sorted(vars(value).items()) if inspect.isclass(value) else ():
                if not member.startswith("_"):
                    method = inspect.ismethoddescriptor(inner) or isinstance(inner, (classmethod, staticmethod))
                    inner_home = "stdtypes" if home == "functions" else home
                    yield from _c_meaning(f"{prefix}{name}.{member}", "method" if method else "attribute", inner,
                                          inner_home, told)


_EXCEPTIONS = {name for name, value in vars(builtins).items()
               if isinstance(value, type) and issubclass(value, BaseException)}


def _c_meaning(name: str, kind: str, value: object, page: str, told: AnswerOf) -> Iterator[Meaning]:
    docstring = getattr(value, "__doc__", None)
    if isinstance(docstring, str) and (answer := told(docstring, value)):
        yield Meaning(name, kind, answer, f"{python_docs._DOCS}/library/{page}.html#{name}")
