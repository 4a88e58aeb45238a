"""Cuts a document into passages: stretches of about 80 to 200 words that can be read alone.

A passage begins and ends between paragraphs. A heading begins a new one and stands in its title. Code, in fences,
indented or after `>>>`, stays whole unless it is longer than any passage may be.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from tryplicity.components import Document

ENOUGH, MOST = 120, 200     # words: a passage ends after a paragraph with so many, and never has more
LONGEST_CODE = 600          # words of code that stay together
_CHARACTERS = 12            # as many count as a word where there are no spaces


class Cut(NamedTuple):
    """A passage before it is in an index."""

    title: str
    text: str


class _Block(NamedTuple):
    kind: str       # heading, code or prose
    text: str
    level: int = 0  # of a heading


_FENCE = re.compile(r"^ {0,3}(```+|~~~+)")
_HASHES = re.compile(r"^ {0,3}(#{1,6})\s+(\S.*?)\s*#*$")
_UNDERLINE = re.compile(r"^([=\-~*^\"+#])\1{2,}\s*$")
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]*[^\W_a-z])|\n")
_TITLE_WORDS = 12


def cut(document: Document) -> list[Cut]:
    """The passages of a document, in order; together they hold all of its text but headings with nothing below."""
    blocks = _code(document.text) if document.domain == "code" else list(_blocks(document.text))
    first, blocks = _title(document, blocks)
    passages: list[Cut] = []
    under: list[tuple[int, str]] = []       # headings above the current place
    group: list[str] = []
    size = 0

    def end() -> None:
        nonlocal group, size
        if text := "\n\n".join(group).strip():
            passages.append(Cut(": ".join([first, *(heading for _, heading in under[-2:])]), text))
        group, size = [], 0

    for block in blocks:
        if block.kind == "heading":
            end()
            while under and under[-1][0] >= block.level:
                under.pop()
            under.append((block.level, block.text))
            continue
        for piece in _pieces(block):
            words = measure(piece)
            if group and size + words > MOST:
                end()
            group.append(piece)
            size += words
            if size >= ENOUGH:
                end()
    end()
    return passages


def measure(text: str) -> int:
    """Words; long runs without spaces count as several."""
    return max(text.count(" ") + text.count("\n") + 1, len(text) // _CHARACTERS)


# --- the title ---

def _title(document: Document, blocks: list[_Block]) -> tuple[str, list[_Block]]:
    """The document's own first line where it is a title, else the end of its identity."""
    if blocks and blocks[0].kind == "heading":
        return blocks[0].text, blocks[1:]
    if blocks and blocks[0].kind == "prose" and len(blocks) > 1 and _is_title(blocks[0].text):
        return blocks[0].text.strip(), blocks[1:]
    work, _, part = document.id.rstrip("/").partition("#")
    return work.rpartition("/")[2] or part or document.id, blocks


def _is_title(text: str) -> bool:
    return "\n" not in text and len(text.split()) <= _TITLE_WORDS and not text.rstrip().endswith((*".,;:!",))


# --- blocks ---

def _blocks(text: str) -> Iterator[_Block]:
    lines = text.replace("\r\n", "\n").expandtabs(4).split("\n")
    group: list[str] = []
    at = 0

    def whole() -> Iterator[_Block]:
        nonlocal group
        if group:
            code = group[0].lstrip().startswith(">>>") or all(line.startswith("    ") for line in group)
            yield _Block("code" if code else "prose", "\n".join(group))
        group = []

    while at < len(lines):
        line = lines[at]
        first = line.lstrip()[:1]
        if first in ("`", "~") and (fence := _FENCE.match(line)):
            yield from whole()
            close = at + 1
            while close < len(lines) and not lines[close].lstrip().startswith(fence[1]):
                close += 1
            yield _Block("code", "\n".join(lines[at:close + 1]))
            at = close + 1
            continue
        if first == "#" and (hashes := _HASHES.match(line)):
            yield from whole()
            yield _Block("heading", hashes[2], len(hashes[1]))
        elif group and len(group) == 1 and _UNDERLINE.match(line) and 2 * len(line.strip()) >= len(group[0].strip()):
            heading, group = group[0].strip(), []
            yield _Block("heading", heading, 10 + "#*=-^\"~+".index(line[0]))
        elif not first:
            yield from whole()
        else:
            group.append(line.rstrip())
        at += 1
    yield from whole()


def _code(text: str) -> list[_Block]:
    """A file of code: what empty lines part, one block each."""
    parts = re.split(r"\n{2,}", text.replace("\r\n", "\n"))
    return [_Block("code", part.strip("\n")) for part in parts if part.strip()]


# --- pieces of a block that is too long ---

def _pieces(block: _Block) -> Iterator[str]:
    most = LONGEST_CODE if block.kind == "code" else MOST
    if measure(block.text) <= most:
        yield block.text
        return
    parts = block.text.split("\n") if block.kind == "code" else _sentences(block.text)
    group, size, joint = [], 0, "\n" if block.kind == "code" else " "
    for part in parts:
        for short in _short(part, most):
            words = measure(short)
            if group and size + words > most:
                yield joint.join(group)
                group, size = [], 0
            group.append(short)
            size += words
    if group:
        yield joint.join(group)


def _sentences(text: str) -> list[str]:
    return [part.strip() for part in _SENTENCE_END.split(text) if part.strip()]


def _short(text: str, most: int) -> Iterator[str]:
    """A line without end, cut at spaces where it has some."""
    limit = most * _CHARACTERS
    while measure(text) > most:
        words = text.split(" ", most)
        head = " ".join(words[:most])
        head = head[:limit]
        yield head
        text = text[len(head):].lstrip(" ")
    if text:
        yield text
