"""Reads English and examples out of Python files without importing them.

Docstrings are found by a regular expression over triple quotes (a syntax tree takes thirty times as long),
and cut into blocks: paragraphs of prose, which are unwrapped and stripped of markup; examples (`>>>`); and
the rest, which is dropped: signatures, parameter lists, tables, directives, literal blocks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

VERSION = 1  # raise when the same files would give other documents


class Docstring(NamedTuple):
    """A triple-quoted text and the name of what it documents ("" where it cannot be told)."""

    name: str
    text: str


class Block(NamedTuple):
    kind: str  # prose or example
    text: str


_QUOTES = re.compile(r'"""|\'\'\'')
# what may stand between the start of a line and the quotes; group 1: raw or not
_OPENING = re.compile(r"[ \t]*(?:\+ |\w+ = |__doc__ \+= )?([rRuU]?)$")
# what stands before the quotes: a definition that ends there, or `add_docstr(torch.abs,`
_DEFINITION = re.compile(r"^[ \t]*(?:async[ \t]+def|def|class)[ \t]+(\w+)", re.MULTILINE)
_ADD_DOCSTR = re.compile(r"add_\w*doc\w*\(\s*([\w.]+),\s*$")


def docstrings(source: str) -> Iterator[Docstring]:
    """The triple-quoted texts of a Python file that begin a line, in order."""
    position = 0
    while opening := _QUOTES.search(source, position):
        position = opening.end()
        line_start = source.rfind("\n", 0, opening.start()) + 1
        prefix = _OPENING.match(source[line_start:opening.start()])
        if not prefix:
            continue
        end = source.find(opening[0], position)
        if end < 0:
            return
        text, position = source[position:end], end + 3
        if prefix[1] not in ("r", "R") and "\\" in text:
            text = text.replace("\\\n", "").replace("\\\\", "\\").replace('\\"', '"').replace("\\'", "'")
        yield Docstring(_documented(source[max(0, line_start - 2000):line_start]), text)


def _documented(before: str) -> str:
    added = _ADD_DOCSTR.search(before)
    if added:
        return added[1]
    if not before.rstrip().endswith(":"):
        return ""
    definitions = _DEFINITION.findall(before)
    return definitions[-1] if definitions else ""


# --- one docstring into blocks ---

_UNDERLINE = re.compile(r"^([=\-~^*#\"+`])\1{2,}$")
_TABLE = re.compile(r"[=+|]|-{3,}|={2,}\s|\S+\s+\|")
_ADMONITION = re.compile(r"\.\.\s+(?:note|warning|important|tip|seealso|caution|hint|attention)::\s*", re.I)
_FIELD = re.compile(r"(?::\w+[^:`]*:|@\w+)(?:\s|$)")
_ITEM = re.compile(r"^(?:[*\-+•]|\(?\d{1,2}[.)]|\(?[a-z][.)])\s+")
# `Args:` and its like; what is indented under it is a list of names and types
_LIST_LABEL = re.compile(
    r"(?:args|arguments|parameters?|params|returns?|yields?|raises?|attributes|methods|shape|inputs?"
    r"|outputs?|keyword (?:args|arguments)|references?|see also|receives|other parameters|warns|variables"
    r"|members|options|where|usage|syntax|todo|contents|authors?|history|example usage|examples?"
    r"|type parameters|fields|properties"
    r"|functions|classes|exceptions|constants)\s*(?:\([^)]*\))?\s*:{1,2}$", re.IGNORECASE)
# the same as underlined headings
_LIST_HEADINGS = {"parameters", "returns", "yields", "raises", "other parameters", "attributes", "methods",
                  "see also",
                  "references", "warns", "receives", "todo", "to do", "arguments", "args", "return",
                  "keyword arguments", "literature", "bibliography", "functions", "classes", "contents",
                  "input", "output", "author"}


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _dedented(text: str) -> list[str]:
    lines = text.expandtabs().split("\n")
    margin = min((_indent(line) for line in lines[1:] if line.strip()), default=0)
    return [lines[0].strip(), *(line[margin:].rstrip() for line in lines[1:]), ""]


def blocks(text: str) -> Iterator[Block]:
    """The prose (one line a paragraph, markup removed) and the examples of one docstring, in order."""
    lines = _dedented(text)
    hidden: int | None = None     # lines indented deeper than this belong to what is dropped
    section_hidden = False        # under an underlined heading whose contents are a list
    group: list[str] = []         # the lines of the block being read
    example = False               # whether that block is an example

    for number, line in enumerate(lines):
        stripped = line.strip()
        if not stripped:
            yield from _block(group)
            group, example = [], False
            continue
        first, indent = stripped[0], _indent(line)
        if hidden is not None:
            if indent > hidden and (section_hidden or not stripped.startswith(">>>")):
                continue
            if indent <= hidden:
                hidden = None
        if first in "=-~^*#\"+`" and _UNDERLINE.match(stripped):   # under a heading, or over one
            heading = group.pop().strip().lower().rstrip(":") if group else None
            yield from _block(group)
            group, example = [], False
            if heading is not None:
                section_hidden = heading in _LIST_HEADINGS
            continue
        if section_hidden and not _UNDERLINE.match(lines[number + 1].strip()):
            continue
        if example:
            group.append(line)
            continue
        if stripped.startswith(">>>"):
            yield from _block(group)
            group, example = [line], True
            continue
        if first == "." and stripped[:2] == ".." and stripped[2:3] in ("", " "):
            yield from _block(group)
            admonition = _ADMONITION.match(stripped)
            rest = stripped[admonition.end():] if admonition else ""
            group = [rest] if rest else []
            if not admonition:
                hidden = indent
            continue
        if (first in ":@" and _FIELD.match(stripped)) or (
                stripped[-1] == ":" and _LIST_LABEL.match(stripped)):
            yield from _block(group)
            group, hidden = [], indent
            continue
        if group and stripped and indent > _indent(group[0]) and group[-1].endswith(":"):
            yield from _block(group)    # a definition list follows at once
            group, hidden = [], _indent(line) - 1
            continue
        if _ITEM.match(stripped):
            yield from _block(group)
            group = []
        group.append(line)
        if stripped.endswith("::"):
            yield from _block(group)
            group, hidden = [], indent
    yield from _block(group)


def _block(group: list[str]) -> Iterator[Block]:
    """The block that consecutive lines make, if they make one."""
    if not group:
        return
    if group[0].lstrip().startswith(">>>"):
        margin = _indent(group[0])
        yield Block("example", "\n".join(line if line[:margin].strip() else line[margin:] for line in group))
        return
    lines = [line.strip() for line in group]
    if any(_TABLE.match(line) for line in lines):
        return
    text = clean(" ".join(lines))
    if reads_as_prose(text):
        yield Block("prose", text)


# --- one paragraph ---

_ROLE = re.compile(r":(?:[\w+-]+:)*[\w+-]+:`(~?)\.?([^`<]*?)(?:\s*<[^>`]*>)?`")
_LINK = re.compile(r"`([^`<]+?)\s*<[^>`]*>`__?")
_TICKS = re.compile(r"``([^`]*)``|`([^`]*)`_{0,2}(?!\w)")
_STRONG = re.compile(r"\*\*([^*\s](?:[^*]*[^*\s])?)\*\*")
_EMPHASIS = re.compile(r"(?<![\w*])\*([^*\s](?:[^*]*[^*\s])?)\*(?![\w*])")
_FOOTNOTE = re.compile(r"(\[[\w*#]{1,12}\])_+")
_SPACES = re.compile(r"\s+")
_UNFINISHED = {"that", "as", "in", "of", "by", "to", "the", "is", "are", "with", "and", "or", "from",
               "if", "where", "for"}
_LAST_SENTENCE = re.compile(r"(.*[^.][.!?])\s+[A-Z(].*", re.DOTALL)


def clean(text: str) -> str:
    """One paragraph on one line without reStructuredText markup; "" when nothing is left of it."""
    text = _ITEM.sub("", text, count=1)
    if "`" in text:
        text = _ROLE.sub(lambda m: m[2].rsplit(".", 1)[-1] if m[1] else m[2], text)
        text = _LINK.sub(r"\1", text)
        text = _TICKS.sub(lambda m: m[1] or m[2] or "", text)
    if "*" in text:
        text = _STRONG.sub(r"\1", text)
        text = _EMPHASIS.sub(r"\1", text)
    if "]_" in text:
        text = _FOOTNOTE.sub(r"\1", text)
    text = _SPACES.sub(" ", text).strip()
    if text.endswith((":", "e.g.", "i.e.", "e.g", "i.e", "e.g.,", "i.e.,")):
        whole = _LAST_SENTENCE.match(text)      # what the last sentence announces was dropped
        text = whole[1] if whole else ""
    elif text and text[-1].isalnum():
        text = "" if text.rsplit(" ", 1)[-1] in _UNFINISHED else text + "."
    return text


_COMMON = frozenset(re.findall(r"\w+", """
    the a an of to is are be and in for if that this it with by on as or not from which when can has will was
    its at all any only used may does do each one two than then you we should must return returns"""))
_MARKS = re.compile(r"[=<>{}\[\]\\|$^_/@#~*+]")
_WORD = re.compile(r"[A-Za-z][A-Za-z'\u2019-]*")
_NOT_PROSE = re.compile(r"^[\w.]+\([^)]*\)\s*(?:->|:|\.?$|--)|^(?:TODO|XXX|FIXME|Copyright)\b|\{\w*\}"
                        r"|%\(\w+\)s|>>>|`|https?://\S+\.?$")


def reads_as_prose(text: str) -> bool:
    """Whether a paragraph is sentences: words of usual length, common words among them, few signs."""
    if len(text) < 25 or text[-1] not in ".!?)\"'" or not (text[0].isupper() or text[0] in "\"'(") or (
            _NOT_PROSE.search(text)):
        return False
    words = _WORD.findall(text)
    count = len(words)
    if count < 4 or count < 0.7 * (text.count(" ") + 1):
        return False
    if len(_MARKS.findall(text)) > 0.04 * len(text):
        return False
    if not 3.0 * count <= sum(map(len, words)) <= 8.5 * count:
        return False
    common = sum(word in _COMMON for word in text.lower().split())
    return common >= max(1, 0.15 * count)
