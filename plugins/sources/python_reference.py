"""The documentation that every installation carries, as reference pages to be searched and read; needs no download.

Where python-docs is prose to learn from, this is what a reader looks up: a document for each documented public name,
with its signature and its whole docstring, and the topics of the language reference. Python files are read from
their syntax trees and never imported; what is written in C is read from the interpreter.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import importlib
import inspect
import json
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tryplicity import Document, LeftOut, Source, UserError, escaped
from tryplicity_plugins.sources import harvest, python_docs
from tryplicity_plugins.sources.python_names import C_MODULES, Meaning, c_meanings, package_meanings

VERSION = 2     # raise when the same files would give other documents


class PythonReference(Source):
    """Reference pages of Python and of installed scientific packages: one for each public name, and the language.

    The first line of a document is its title: the name, or the topic's heading.
    """

    name = "python-reference"
    first = "python"        # whose pages a search puts before the others', where the question names none

    @dataclass(frozen=True)
    class Config:
        packages: tuple[python_docs.Package, ...] = tuple(python_docs._PLANS)
        """which packages to read; those not installed are passed over"""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.read_share = 0.0   # of the packages, while `documents` runs

    def fingerprint(self) -> str:
        """From the versions of what is read and of the reader."""
        versions = {package: python_docs._version(package) for package in self.config.packages}
        described = json.dumps([self.name, VERSION, harvest.VERSION, versions], sort_keys=True)
        return hashlib.sha256(described.encode()).hexdigest()

    def documents(self) -> Iterator[Document]:
        found: set[str] = set()
        self.left_out = LeftOut("items")
        for number, (package, root) in enumerate(python_docs._installed(self.config.packages, self.left_out)):
            self.read_share = number / len(self.config.packages)
            pages = [package_meanings(package, root, _page_text)]
            if package == "python":
                pages = [_language(root), *pages, _c_modules(), c_meanings(_page_text, _written_in_c())]
            for meaning in (meaning for part in pages for meaning in part):
                if meaning.name not in found:
                    found.add(meaning.name)
                    yield Document(f"{package}/{escaped(meaning.name)}#{meaning.kind}",
                                   _plain(f"{meaning.name}\n\n{meaning.answer}\n"), "text", meaning.url)
        self.read_share = 1.0
        if not found:
            raise UserError(f"python-reference: none of the packages {', '.join(self.config.packages)} is installed "
                            "with its Python sources; install one, or index your own text: "
                            "tryplicity search index path/to/folder")


def _plain(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


# --- names ---

_SETS_A_NAME = re.compile(r"^\.\. (?:module|moduleauthor|sectionauthor|versionadded|currentmodule|_)\b.*\n?",
                          re.MULTILINE)


def _page_text(docstring: str, documented: object = None) -> str | None:
    """The signature, where it is known, and the docstring without the roles of its markup."""
    text = _SETS_A_NAME.sub("", inspect.cleandoc(docstring)).strip()
    if "`" in text:
        text = harvest._ROLE.sub(lambda m: m[2].rsplit(".", 1)[-1] if m[1] else m[2], text)
    if len(text) < 10:
        return None
    signature = _signature(documented)
    first = text.split("\n", 1)[0]
    return text if not signature or first.startswith(signature.split("(")[0] + "(") else f"{signature}\n\n{text}"


def _signature(documented: object) -> str | None:
    """`join(a, *p)` of a function in a syntax tree or of an object written in C."""
    if isinstance(documented, (ast.FunctionDef, ast.AsyncFunctionDef)):
        arguments = ast.unparse(documented.args)
        return f"{documented.name}({re.sub(r'^(?:self|cls)(?:, |$)', '', arguments)})"
    signature = getattr(documented, "__text_signature__", None)
    if isinstance(signature, str) and not isinstance(documented, ast.AST):
        signature = re.sub(r"^\(\$\w+(?:, /)?(?:, )?", "(", signature)
        return f"{getattr(documented, '__name__', '')}{signature}"
    return None


@functools.cache
def _written_in_c() -> tuple[str, ...]:
    """The public modules of this interpreter that have no Python file (posix is os), and those with parts in C."""
    root = python_docs._root("python")
    found = set(C_MODULES)
    for name in sorted(sys.stdlib_module_names):
        in_python = (root / f"{name}.py").is_file() or (root / name).is_dir()
        if not in_python and not name.startswith(("_", "xx", "posix")):
            with warnings.catch_warnings(), contextlib.suppress(ImportError):
                warnings.simplefilter("ignore", DeprecationWarning)
                importlib.import_module(name)
                found.add(name)
    return tuple(sorted(found))


def _c_modules() -> Iterator[Meaning]:
    for name in _written_in_c():
        try:
            docstring = importlib.import_module(name).__doc__
        except ImportError:
            continue            # left out of this interpreter
        if docstring and name != "builtins" and (text := _page_text(docstring)):
            yield Meaning(name, "module", text, f"{python_docs._DOCS}/library/{name}.html#module-{name}")


# --- the language ---

# a definition within a topic: `str.join(iterable)` at the margin, its text indented below
_DEFINITION = re.compile(r"^(?:class |async )?((?:[a-z]\w*\.)+\w+)\(.*\)$")


def _language(root: Path) -> Iterator[Meaning]:
    """The topics of the reference that pydoc prints, and what they define as pages of their own."""
    try:
        source = (root / "pydoc_data" / "topics.py").read_text(encoding="utf-8")
    except OSError:
        return      # some distributions leave it out
    seen: set[str] = set()
    # a long topic holds whole shorter ones: it gives what these leave
    topics = ast.literal_eval(source[source.index("{"):])
    for topic, text in sorted(topics.items(), key=lambda item: (len(item[1]), item[0])):
        url = python_docs._topic_url(topic)
        page = url.partition("#")[0]
        kept: list[str] = []
        definitions: dict[str, list[str]] = {}
        inside = None
        for paragraph in re.split(r"\n[ \t]*\n", text.strip("\n")):
            if paragraph[:1] not in (" ", ""):
                defined = _DEFINITION.match(paragraph.replace("\n", " "))
                inside = defined[1] if defined else None
            heading = len(paragraph) < 120
            if paragraph in seen and not heading:
                continue
            seen.add(paragraph)
            (definitions.setdefault(inside, []) if inside else kept).append(paragraph)
        if sum(map(len, kept)) > 200 or not definitions:
            title, _, rest = "\n\n".join(kept).partition("\n")
            yield Meaning(title.strip(), "topic", re.sub(r"^[*=\-]{3,}\n", "", rest).strip("\n"), url)
        for name, paragraphs in definitions.items():
            body = "\n\n".join(paragraphs[1:])
            if body.strip():
                yield Meaning(name, "definition", f"{paragraphs[0]}\n\n{inspect.cleandoc(body)}", f"{page}#{name}")
