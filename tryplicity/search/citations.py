"""Checks what an answer claims to rest on. No mark is believed that the passages do not bear out.

    checked = check("The function joins two paths [1]. It was made in 1991 [2].", passages)
    checked.text, checked.sources, checked.supported

A mark is `[n]` that stands by itself: not directly after a letter, digit, `_` or `)`, nor after a `]` that ends no
mark, nor after `=` (so neither `list[0]` nor `x = [1]` is one), and not in code: between backticks or in a fence. It
counts only if passage n was retrieved and its sentence shares words with that passage. A sentence without one that a
passage holds nearly whole gets one here, since a small model does not write marks itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from tryplicity.search.words import content_words

if TYPE_CHECKING:
    from tryplicity.components import Passage

#: what may be a mark, see `_marks`. A link that a model wrote behind one is taken with it.
MARK = re.compile(r"(?<!\w)\[([0-9]{1,6})\](?:\([^()\s]*\))?")

_FEWEST_SHARED = 2      # content words that a sentence must share with the passage it cites (1 where it has no more)
_FEWEST_ATTACHED = 4    # content words of a sentence that may be given a mark, unless it is quoted to the letter
_SHARE_ATTACHED = 0.75  # of which so many must be in the passage


class Checked(NamedTuple):
    """An answer whose every mark is borne out."""

    text: str                                   # with marks [1], [2]... in the order of their first use
    sources: list[tuple[int, Passage]]          # what the marks stand for, in order
    supported: bool                             # whether any mark is left


def check(answer: str, passages: Sequence[Passage]) -> Checked:
    """Keep, remove, add and renumber the marks of an answer. passages: as the answer's marks number them, from 1.

    Beside marks, and the spaces before those removed, nothing of the text changes.
    """
    words = [frozenset(content_words(f"{passage.title} {passage.text}")) for passage in passages]
    quotable = [_letters(f"{passage.title} {passage.text}") for passage in passages]
    order: list[int] = []       # passages (from 0) in the order of their first mark

    def number(passage: int) -> str:
        if passage not in order:
            order.append(passage)
        return f"[{order.index(passage) + 1}]"

    out: list[str] = []
    for kind, piece in _pieces(answer):
        if kind != "sentence":
            out.append(piece)
            continue
        plain = _without_marks(piece)
        told = frozenset(content_words(plain))
        shared = [len(told & held) for held in words]
        needed = max(min(_FEWEST_SHARED, len(told)), 1)
        kept, end, gap = False, 0, ""
        parts: list[str] = []
        done: set[int] = set()          # one mark for one passage in a sentence
        for mark in _marks(piece):
            passage = int(mark[1]) - 1
            before = piece[end:mark.start()]
            end = mark.end()
            if 0 <= passage < len(passages) and shared[passage] >= needed and passage not in done:
                parts += [before or gap, number(passage)]
                kept, gap = True, ""
                done.add(passage)
            else:
                gap = gap or before[len(before.rstrip(" \t")):]
                parts.append(before.rstrip(" \t"))
        parts.append(piece[end:])
        text = "".join(parts)
        if not kept and (passage := _borne_out_by(plain, told, shared, quotable)) is not None:
            text = _attached(text, number(passage))
        out.append(text)
    return Checked("".join(out), [(at + 1, passages[passage]) for at, passage in enumerate(order)], bool(order))


def _borne_out_by(plain: str, told: frozenset[str], shared: list[int], quotable: list[str]) -> int | None:
    """The first passage that holds a sentence nearly whole, or to the letter."""
    if plain.rstrip(" \t\n\"')*_").endswith("?") or not told:
        return None
    letters = _letters(plain)
    for passage, text in enumerate(quotable):
        if len(told) >= 2 and len(letters.split()) >= 3 and f" {letters} " in f" {text} ":
            return passage
    best = max(range(len(shared)), key=lambda passage: (shared[passage], -passage), default=None)
    if best is not None and shared[best] >= max(_FEWEST_ATTACHED, _SHARE_ATTACHED * len(told)):
        return best
    return None


def _letters(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


_END = re.compile(r"[.!:;,]*[\"')*_]*\s*$")


def _attached(sentence: str, mark: str) -> str:
    """With a mark before the sign that ends the sentence."""
    body = sentence.rstrip()
    place = _END.search(body).start() if body else 0
    if place == 0:
        return sentence
    return f"{body[:place]} {mark}{body[place:]}{sentence[len(body):]}"


# --- sentences ---

# what is never looked into: fenced code, and code in backticks within a line
_CODE = re.compile(r"^ {0,3}(```+|~~~+).*?(?:^ {0,3}\1[`~]*[ \t]*$|\Z)|(?<!`)(`+)(?!`)[^\n]*?(?<!`)\2(?!`)",
                   re.MULTILINE | re.DOTALL)
_HOLDER = "\ue000"      # stands for code inside a sentence while it is looked at
# the end of a sentence: a sign, what closes it, marks that stand behind it, and space; or the end of a line
_BOUNDARY = re.compile(r"[.!?]+[\"')*_]*(?:[ \t]*\[[0-9]{1,6}\](?:\([^()\s]*\))?)*(?=\s|$)[ \t]*|\n+")
_ABBREVIATION = re.compile(r"(?:^|[\s(])(?:e\.g|i\.e|etc|vs|cf|Dr|Mr|Mrs|Ms|No|Fig|approx)\.$")


def _pieces(text: str) -> Iterator[tuple[str, str]]:
    """("code" or "sentence", piece): together the text. Code within a line is part of its sentence."""
    end = 0
    for block in _CODE.finditer(text):
        if block[2] is not None:
            continue                    # within a line: see _marks
        yield from _sentences(text[end:block.start()])
        yield "code", block[0]
        end = block.end()
    yield from _sentences(text[end:])


def _sentences(text: str) -> Iterator[tuple[str, str]]:
    start = 0
    # signs inside code end no sentence; the blank has the same length, so that places stay true
    hidden = _CODE.sub(lambda match: _HOLDER * len(match[0]) if "\n" not in match[0] else match[0], text)
    for boundary in _BOUNDARY.finditer(hidden):
        sign = boundary[0].lstrip("\"')*_")[:1]
        if sign == "." and _ABBREVIATION.search(hidden[start:boundary.start() + 1]):
            continue
        yield "sentence", text[start:boundary.end()]
        start = boundary.end()
    if start < len(text):
        yield "sentence", text[start:]


def _marks(sentence: str) -> list[re.Match[str]]:
    """The marks outside code. Directly behind a bracket one is a mark only if what ends there is one too."""
    codes = [match.span() for match in _CODE.finditer(sentence)]
    found: list[re.Match[str]] = []
    for match in MARK.finditer(sentence):
        if any(begin <= match.start() < end for begin, end in codes):
            continue
        before = sentence[:match.start()]
        follows = found and found[-1].end() == match.start()
        if (before.endswith(("]", ")")) and not follows) or before.rstrip(" \t").endswith("="):
            continue
        found.append(match)
    return found


def _without_marks(sentence: str) -> str:
    parts, end = [], 0
    for mark in _marks(sentence):
        parts.append(sentence[end:mark.start()])
        end = mark.end()
    return "".join([*parts, sentence[end:]])
