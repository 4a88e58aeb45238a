"""The embedded default corpus: documentation and code that every installation of this project carries.

Nothing is downloaded and nothing is imported: files of installed packages are read as text. Three domains:
text (the language reference in pydoc_data and the prose of docstrings), code (sources of the standard library
and of two pure Python packages, examples out of torch's docstrings), math (prose and examples of the
mathematics packages). Paragraphs that occur twice are kept once.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from tryplicity import Document, LeftOut, Source, UserError, escaped
from tryplicity_plugins.sources import harvest

Package = Literal["python", "torch", "numpy", "sympy", "networkx", "mpmath"]


class _Plan(NamedTuple):
    prose: str              # the domain of its docstrings
    code: bool              # whether its sources are documents of the code domain
    examples: str | None    # "inline": examples stay between the paragraphs; "code": documents of their own


_PLANS: dict[str, _Plan] = {
    "python": _Plan("text", True, None),    # its examples are in its sources
    "torch": _Plan("text", False, "code"),
    "numpy": _Plan("math", False, "inline"),
    "sympy": _Plan("math", False, "inline"),
    "networkx": _Plan("math", True, None),
    "mpmath": _Plan("math", True, None),
}
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "_vendor",
                    "pydoc_data"}
_SKIPPED_PATHS = ("torch/testing/_internal/", "numpy/testing/tests/", "sympy/testing/")
_SHORTEST = {"text": 200, "math": 200, "code": 400}     # characters of a document worth keeping


class PythonDocs(Source):
    """Documentation and sources of Python and of installed scientific packages; needs no download.

    A document is one file's prose, code or examples; those of one file share the part of their id before `#`.
    """

    name = "python-docs"
    default_for = ("pretrain",)

    @dataclass(frozen=True)
    class Config:
        packages: tuple[Package, ...] = tuple(_PLANS)
        """which packages to read; those not installed are passed over"""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.read_share = 0.0   # of the files, while `documents` runs

    def fingerprint(self) -> str:
        """From the versions of what is read and of the harvester."""
        versions = {package: _version(package) for package in self.config.packages}
        described = json.dumps([self.name, harvest.VERSION, versions], sort_keys=True)
        return hashlib.sha256(described.encode()).hexdigest()

    def documents(self) -> Iterator[Document]:
        self.left_out = LeftOut("items")
        files = [(package, root, path) for package, root in _installed(self.config.packages, self.left_out)
                 for path in _python_files(package, root)]
        if not files:
            raise UserError(f"python-docs: none of the packages {', '.join(self.config.packages)} is "
                            "installed with its Python sources; install one, or train on your own text: "
                            "--data path/to/folder")
        self.read_share, seen = 0.0, set()
        if "python" in self.config.packages:
            yield from _language_reference(_root("python"), seen)
        total, done = sum(path.stat().st_size for _, _, path in files if path.exists()), 0
        for package, root, path in files:
            try:
                size = path.stat().st_size
                yield from _file_documents(package, root, path, seen)
            except UnicodeDecodeError:
                self.left_out.add("not UTF-8", path)
            except OSError as error:
                self.left_out.add(f"unreadable ({error.strerror})", path)
            else:
                done += size
            self.read_share = done / total


def _version(package: str) -> str | None:
    if package == "python":
        return platform.python_version()
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _root(package: str) -> Path | None:
    """The package's folder, found without importing it."""
    if package == "python":
        return Path(sysconfig.get_path("stdlib"))
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent if spec and spec.origin else None


def _installed(packages: Iterable[str], left_out: LeftOut) -> Iterator[tuple[str, Path]]:
    """The packages that are there, and their folders."""
    for package in packages:
        root = _root(package)
        if root is None:
            left_out.add("not installed", package)
        else:
            yield package, root


def _python_files(package: str, root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in _SKIPPED_FOLDERS)
        relative = f"{package}/{Path(folder).relative_to(root).as_posix()}/"
        if relative.startswith(_SKIPPED_PATHS):
            folders.clear()
            continue
        yield from (Path(folder, name) for name in sorted(names) if name.endswith(".py"))


def _file_documents(package: str, root: Path, path: Path, seen: set[bytes]) -> Iterator[Document]:
    plan, inner = _PLANS[package], path.relative_to(root).as_posix()
    source = path.read_text(encoding="utf-8").replace("\r\n", "\n")
    module = inner.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    if package != "python":
        module = package if module == "__init__" else f"{package}.{module}"
    work = f"{package}/{escaped(inner)}"

    prose, examples = [], []
    for docstring in harvest.docstrings(source):
        name = docstring.name if not docstring.name.startswith("_") else docstring.name.rsplit(".", 1)[-1]
        named = False
        for block in harvest.blocks(docstring.text):
            digest = hashlib.blake2b(block.text.encode("utf-8", "replace"), digest_size=8).digest()
            if digest in seen:
                continue
            seen.add(digest)
            if block.kind == "prose" or plan.examples == "inline":
                prefix = f"{name}: " if name and not named and block.kind == "prose" else ""
                prose.append(prefix + block.text)
                named = named or bool(prefix)
            elif plan.examples == "code":
                examples.append(f"# {module}: {name}\n{block.text}" if name else block.text)

    page = _page(package, module, inner)
    if _long_enough(plan.prose, text := "\n\n".join([module, *prose])):
        yield _document(f"{work}#{plan.prose}", text + "\n", plan.prose, page)
    if _long_enough("code", text := "\n\n".join(examples)):
        yield _document(f"{work}#examples", text + "\n", "code", page)
    if plan.code and _long_enough("code", source) and _is_program(source):
        yield _document(f"{work}#code", source, "code", _source_page(package, module, inner))


def _document(identity: str, text: str, domain: str, url: str) -> Document:
    return Document(identity, text.encode("utf-8", "replace").decode(), domain, url)


def _long_enough(domain: str, text: str) -> bool:
    return len(text) >= _SHORTEST[domain]


def _is_program(source: str) -> bool:
    """Whether a file is code rather than a table: of a character set, or mostly signs and digits."""
    if "\ndecoding_table = (" in source:
        return False
    letters = len(re.findall(r"[A-Za-z_]", source))
    return letters > 0.6 * len(re.sub(r"\s", "", source))


# --- pages a reader can check ---

_DOCS = f"https://docs.python.org/{sys.version_info[0]}.{sys.version_info[1]}"
# modules of the standard library whose page has another name
_OTHER_PAGE = {"__future__": "__future__", "_collections_abc": "collections.abc", "_pydecimal": "decimal",
               "_pyio": "io", "_sitebuiltins": "site", "_weakrefset": "weakref", "cprofile": "profile",
               "encodings": "codecs", "genericpath": "os.path", "idlelib": "idle", "lib2to3": "2to3",
               "ntpath": "os.path", "opcode": "dis", "posixpath": "os.path", "pstats": "profile",
               "sre_compile": "re", "sre_constants": "re", "sre_parse": "re", "turtledemo": "turtle"}
_NO_PAGE = {"antigravity", "nt", "nturl2path", "pydoc_data", "this"}
_DOTTED_PAGES = {
    "collections.abc", "concurrent.futures", "curses.ascii", "curses.panel", "email.charset",
    "email.encoders", "email.errors", "email.generator", "email.header", "email.headerregistry",
    "email.iterators", "email.message", "email.parser", "email.policy", "email.contentmanager",
    "html.entities", "html.parser", "http.client", "http.cookiejar", "http.cookies", "http.server",
    "importlib.metadata", "importlib.resources", "importlib.resources.abc", "logging.config",
    "logging.handlers", "multiprocessing.shared_memory", "os.path", "tkinter.colorchooser", "tkinter.dnd",
    "tkinter.font", "tkinter.messagebox", "tkinter.scrolledtext", "tkinter.tix", "tkinter.ttk",
    "unittest.mock", "urllib.error", "urllib.parse", "urllib.request", "urllib.robotparser", "xml.dom",
    "xml.dom.minidom", "xml.dom.pulldom", "xml.etree.elementtree", "xml.sax", "xml.sax.handler",
    "xml.sax.reader", "xmlrpc.client", "xmlrpc.server"}
_TOPIC_PAGES = {
    "reference/simple_stmts": "assert assignment augassign break continue del global import nonlocal pass "
                              "raise return",
    "reference/compound_stmts": "async class compound for function if try while with",
    "reference/expressions": "atom-identifiers atom-literals attribute-references await binary bitwise "
                             "booleans calls comparisons conversions dict exprlists in lambda lists "
                             "operator-summary power shifting slicings string-methods subscriptions unary",
    "reference/lexical_analysis": "floating id-classes identifiers imaginary integers numbers strings",
    "reference/datamodel": "attribute-access callable-types context-managers customization numeric-types "
                           "objects sequence-types specialnames types",
    "reference/executionmodel": "dynamic-features exceptions execmodel naming",
    "library/stdtypes": "bltin-code-objects bltin-ellipsis-object bltin-null-object bltin-type-objects "
                        "specialattrs string-methods truth typesfunctions typesmapping typesmethods "
                        "typesmodules typesseq typesseq-mutable",
    "library/string": "formatstrings",
    "library/pdb": "debugger",
}
# topics whose label on the page has another name, or that are sections under another's
_TOPIC_LABELS = {"else": ("reference/compound_stmts", "if"), "yield": ("reference/simple_stmts", "yield")}


def _page(package: str, module: str, inner: str) -> str:
    """Where the prose of a module can be checked: its page, else the installed file."""
    if package != "python":
        return _source_page(package, module, inner)
    parts = module.lower().split(".")
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        if name in _OTHER_PAGE:
            return f"{_DOCS}/library/{_OTHER_PAGE[name]}.html"
        top_level = length == 1 and parts[0] in _PUBLIC_MODULES
        if name in _DOTTED_PAGES or top_level:
            return f"{_DOCS}/library/{name}.html"
    return _source_page(package, module, inner)


_PUBLIC_MODULES = {name.lower() for name in sys.stdlib_module_names if not name.startswith("_")} - _NO_PAGE


def _source_page(package: str, module: str, inner: str) -> str:
    if package == "python":
        return f"https://github.com/python/cpython/blob/v{platform.python_version()}/Lib/{inner}"
    return f"{module}:{package}/{inner}"


def _language_reference(root: Path, seen: set[bytes]) -> Iterator[Document]:
    """The topics of the language reference that pydoc prints, one document each."""
    try:
        source = (root / "pydoc_data" / "topics.py").read_text(encoding="utf-8")
    except OSError:
        return      # some distributions leave it out
    for topic, text in sorted(ast.literal_eval(source[source.index("{"):]).items()):
        paragraphs = []
        for block in harvest.blocks(text):
            digest = hashlib.blake2b(block.text.encode(), digest_size=8).digest()
            if block.kind == "prose" and digest not in seen:
                seen.add(digest)
                paragraphs.append(block.text)
        text = "\n\n".join([text.strip().split("\n", 1)[0], *paragraphs])
        if _long_enough("text", text):
            yield _document(f"python/pydoc_data/topics/{escaped(topic)}#text", text + "\n", "text", _topic_url(topic))


def _topic_url(topic: str) -> str:
    pages = {label: page for page, labels in _TOPIC_PAGES.items() for label in labels.split()}
    page, label = _TOPIC_LABELS.get(topic, (pages.get(topic, "reference/index"), topic))
    return f"{_DOCS}/{page}.html#{label}"
