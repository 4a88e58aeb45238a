"""Questions and answers from the documentation that every installation carries: asked for a name, say what it means.

The answers are the first sentences of docstrings, without signatures and markup. Those of Python files are read from
their syntax trees, and nothing of them is imported; those of the built-in types and of the modules of the standard
library written in C are read from the interpreter. A name is the shortest public one: what `numpy/_core/numeric.py`
defines and `numpy/__init__.py` imports is `numpy.allclose`.
"""

from __future__ import annotations

import ast
import builtins
import gc
import hashlib
import importlib
import inspect
import itertools
import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import Field

from tryplicity import Conversation, LeftOut, Source, UserError, escaped
from tryplicity_plugins.sources import harvest, python_docs

VERSION = 1             # raise when the same files would give other conversations
_LONGEST = 280          # characters of an answer
_DEEPEST = 3            # dots in a name


class PythonDocsChat(Source):
    """Conversations about the documented names of Python and of installed scientific packages; needs no download.

    Each name is asked about in several ways, and the answer is what its documentation says first. All questions about
    a name share the part of their id before `#`.
    """

    name = "python-docs-chat"
    default_for = ("chat",)

    @dataclass(frozen=True)
    class Config:
        packages: tuple[python_docs.Package, ...] = tuple(python_docs._PLANS)
        """whose names to ask for; those not installed are passed over"""
        phrasings: Annotated[int, Field(ge=1, le=5)] = 3
        """how many questions about each name"""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.read_share = 0.0   # of the packages, while `conversations` runs

    def fingerprint(self) -> str:
        """From the options and the versions of what is read and of the harvester."""
        versions = {package: python_docs._version(package) for package in self.config.packages}
        described = json.dumps([self.name, VERSION, harvest.VERSION, self.config.phrasings, versions], sort_keys=True)
        return hashlib.sha256(described.encode()).hexdigest()

    def documents(self) -> Iterator:
        raise UserError("python-docs-chat: holds conversations for a chat phase; the documents are in python-docs")

    def conversations(self) -> Iterator[Conversation]:
        meanings: dict[str, Meaning] = {}
        self.left_out = LeftOut("items")
        for number, (package, root) in enumerate(python_docs._installed(self.config.packages, self.left_out)):
            for meaning in _package_meanings(package, root):
                meanings.setdefault(meaning.name, meaning)
            if package == "python":
                for meaning in (*_c_meanings(), *_statements(root)):
                    meanings.setdefault(meaning.name, meaning)
            self.read_share = (number + 1) / len(self.config.packages)
        if not meanings:
            raise UserError(f"python-docs-chat: none of the packages {', '.join(self.config.packages)} is installed "
                            "with its Python sources; install one, or give conversations of your own: a .jsonl file")
        shared = Counter(meaning.answer for meaning in meanings.values())
        for name in sorted(meanings):
            meaning = meanings[name]
            if shared[meaning.answer] <= 2:     # what many names share tells none of them apart
                for part, question in enumerate(_questions(meaning, self.config.phrasings)):
                    yield Conversation(f"{escaped(name)}#{part}", ({"role": "user", "content": question},
                                                          {"role": "assistant", "content": meaning.answer}),
                                       meaning.url)


class Meaning(NamedTuple):
    """What the documentation says of a name first."""

    name: str
    kind: str       # one of _QUESTIONS
    answer: str
    url: str


# --- questions ---

_ANY = ("What is {name}?", "Explain {name}.", "Tell me about {name}.", "Can you explain {name}?",
        "Describe {name} in short.", "What can you tell me about {name}?")
_CALLED = ("What does {name} do?", "What is {name} for?", "I came across {name}. What does it do?")
_QUESTIONS = {
    "function": (*_ANY, *_CALLED, "What does the function {name} do?"),
    "method": (*_ANY, *_CALLED, "What does the method {name} do?"),
    "class": (*_ANY, "What is {name} for?", "What is the class {name}?"),
    "attribute": (*_ANY, "What does {name} hold?"),
    "statement": (*_ANY, "What does {name} do?", "What is {name} for?"),
    "module": (*_ANY, "What is {name} for?", "What is the module {name} about?"),
}


def _questions(meaning: Meaning, count: int) -> list[str]:
    """Some of the ways to ask, chosen by a hash of the name."""
    def place(template: str) -> bytes:
        return hashlib.blake2b(f"{meaning.name} {template}".encode(), digest_size=8).digest()

    return [template.format(name=meaning.name) for template in sorted(_QUESTIONS[meaning.kind], key=place)[:count]]


# --- answers ---

_SIGNATURE = re.compile(r"^[\w.]+\s*\(.*\)(?:\s*(?:->|-->|=>)\s*[\w.\[\], ]+)?[.:]?(?:\s*--)?$")
_SENTENCE_END = re.compile(r"(?<!e\.g)(?<!i\.e)(?<!etc)(?<!vs)(?<!cf)[.!?][\"')]?\s+(?=[A-Z\"'(]|[\w.]+\()")
_SAYS_NOTHING = re.compile(
    r"(?:See|Same as|Similar to|Identical to|Deprecated|DEPRECATED|Internal|Private|TODO|XXX|Helper|For internal use"
    r"|Inherited|Not implemented|Override|Overridden|Overloaded|An? internal|Please|Warning|Note|Method should not"
    r"|This (?:method|function|class) is (?:deprecated|internal|private|overridden))\b")
# what is left of formulas, markup, examples and remarks for developers
_LEFTOVER = re.compile(r"[{}\\$|]|\b(?:deprecated|internal use)\b|`|::|:\w+:|\.\.\.|\(\)\(|; see below|[^\x20-\x7e]")


def answer_of(docstring: str, documented: object = None) -> str | None:
    """The first sentences of a docstring, or None where they would not read well alone."""
    paragraphs = re.split(r"\n\s*\n", inspect.cleandoc(docstring))
    for paragraph in paragraphs[:3]:
        lines = [line.strip() for line in paragraph.split("\n") if line.strip()]
        while lines and _SIGNATURE.match(lines[0]):
            lines.pop(0)
        if lines and not _SIGNATURE.match(" ".join(lines)):
            return _answer(lines)
        # a signature alone: what it means comes next
    return None


def _answer(lines: list[str]) -> str | None:
    """The first sentences of a paragraph, as many as are short and read well."""
    if re.match(r"[-*+=~#>.:@|]|\d+[.)]\s", lines[0]):
        return None             # a list, a table, an example or a directive
    if len(lines) > 1 and re.fullmatch(r"([=\-~^*#])\1{2,}", lines[1]):
        return None             # a heading
    text = re.sub(r"(`{1,2})([^`']+)'{1,2}", r"'\2'", harvest.clean(" ".join(lines)))    # quoted `so' in older texts
    ends = [end.end() for end in _SENTENCE_END.finditer(text)]
    answer = ""
    for start, end in itertools.pairwise([0, *ends, len(text)]):
        sentence = text[start:end].strip()
        if (len(f"{answer} {sentence}") > _LONGEST or sentence[-1:] not in (".", "!", "?", ")")
                or sentence.count("(") != sentence.count(")") or _SAYS_NOTHING.match(sentence)
                or _LEFTOVER.search(sentence) or not (answer or _reads(sentence))):
            break
        answer = f"{answer} {sentence}".strip()
    return answer or None


def _reads(answer: str) -> bool:
    """Whether it is prose; a few plain words may be a sentence too ("Greatest common divisor.")."""
    words = answer[:-1].split()
    plain = all(re.fullmatch(r"[A-Za-z][a-z-]*[,']?[a-z]*", word) for word in words)
    return harvest.reads_as_prose(answer) or (answer[0].isupper() and 2 < len(words) < 9 and plain)


# --- Python files ---

#: what to say of a name, from its docstring and what has it (a node of a syntax tree, an object, or None)
AnswerOf = Callable[[str, object], str | None]


@dataclass
class _Module:
    """What one file defines, and which names it takes from others."""

    inner: str                                  # the path inside its package
    package: bool                               # whether it is an __init__.py
    meanings: dict[str, tuple[str, str]] = field(default_factory=dict)      # dotted name inside -> kind, answer
    exported: set[str] | None = None            # __all__, where it is written out
    computed: bool = False                      # whether more is added to it
    added: list[tuple[str, str, str]] = field(default_factory=list)         # full name, kind, answer: of C code
    taken: dict[str, tuple[str, str]] = field(default_factory=dict)         # name here -> module, name there
    stars: list[str] = field(default_factory=list)
    exports: dict[str, tuple[str, str]] | None = None                       # `_exports`, once it is known
    told: AnswerOf = answer_of


# the private files behind public modules of the standard library
_PUBLIC_NAME = {"posixpath": "os.path", "genericpath": "os._path", "_collections_abc": "collections.abc",
                "_pydatetime": "datetime", "_pydecimal": "decimal", "_pyio": "io", "_strptime": "time._strptime"}
_LEFT_OUT = {"ntpath", "antigravity", "this", "idlelib", "lib2to3", "turtledemo", "ensurepip", "distutils", "tests",
             "test", "testing", "encodings", "conftest", "benchmarks", "nturl2path", "setup", "pydoc_data", "__main__",
             "externals", "_inductor", "_dynamo", "_numpy", "_refs"}


def _package_meanings(package: str, root: Path, told: AnswerOf = answer_of) -> Iterator[Meaning]:
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
    module = _Module(inner, inner.endswith("__init__.py"), told=told)
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


# --- the language ---

def _statements(root: Path) -> Iterator[Meaning]:
    """The statements of the language, from the reference that pydoc prints."""
    try:
        source = (root / "pydoc_data" / "topics.py").read_text(encoding="utf-8")
    except OSError:
        return      # some distributions leave it out
    for topic, text in sorted(ast.literal_eval(source[source.index("{"):]).items()):
        title, _, rest = text.strip().partition("\n")
        if (named := re.fullmatch(r'The "(\w+)" statement', title)) and (
                answer := answer_of(rest.strip().partition("\n")[2])):
            yield Meaning(f"the {named[1]} statement", "statement", answer, python_docs._topic_url(topic))


# --- what is written in C ---

_C_MODULES = ("builtins", "array", "binascii", "bisect", "bz2", "cmath", "collections", "csv", "datetime", "decimal",
              "functools", "gc", "hashlib", "heapq", "io", "itertools", "json", "math", "operator", "os", "random",
              "re", "select", "signal", "socket", "sqlite3", "statistics", "string", "struct", "sys", "threading",
              "time", "types", "unicodedata", "weakref", "zlib")


def _c_meanings(told: AnswerOf = answer_of, modules: Sequence[str] = _C_MODULES) -> Iterator[Meaning]:
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
