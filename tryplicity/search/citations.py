"""Checks what an answer claims to rest on. No mark is believed that the passages do not bear out.

    checked = check("The function joins two paths [1]. It was made in 1991 [2].", passages)
    checked.text, checked.sources, checked.supported

A mark is `[n]`, or several as in `[1, 2]` and `[1-3]`, that stands by itself: not directly after a letter, digit, `_`
or `)`, nor after a `]` that ends no mark, nor after `=` (so neither `list[0]` nor `x = [1]` is one), and not in code:
between backticks or in a fence. It counts only if its passage was retrieved, and a sentence of that holds most words of
what the mark stands behind and does not disagree with it (`claims`). A sentence without one that a passage holds nearly
whole gets one here, since a small model does not write marks itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from tryplicity.search.claims import Claim, Evidence

if TYPE_CHECKING:
    from tryplicity.components import Passage

_BRACKET = r"\[([0-9]{1,6}(?:[ \t]?[,;\u2013-][ \t]?[0-9]{1,6})*)\](?:\([^()\s]*\))?"
#: what may be a mark, see `_marks`. A link that a model wrote behind one is taken with it.
MARK = re.compile(rf"(?<!\w){_BRACKET}")

#: for who reads an answer: what was done before its marks were shown
CHECKED_MEANS = (
    "Checked by comparing words, not by understanding: a number stands where a sentence of that source holds most of "
    "the words before it, and where no negation, number, unit, name, opposite or order of words was found to disagree. "
    "It can still be wrong; the source is one click away.")

_SHARE_KEPT = 2 / 3     # of the words before a mark must be in one sentence of its passage, or of its passages
_MOST_PASSES = 8        # each removes a mark that the one before left, or none
_FEWEST_SHARED = 2      # of them at least, in each (1 where there are no more)
_SHARE_ATTACHED = 0.75  # of a sentence's words must be there if it is given a mark
_FEWEST_ATTACHED = 4    # of them at least, unless it is quoted to the letter


class Checked(NamedTuple):
    """An answer whose every mark is borne out."""

    text: str                                   # with marks [1], [2]... in the order of their first use
    sources: list[tuple[int, Passage]]          # what the marks stand for, in order
    supported: bool                             # whether any mark is left


def check(answer: str, passages: Sequence[Passage]) -> Checked:
    """Keep, remove, add and renumber the marks of an answer. passages: as the answer's marks number them, from 1.

    Beside marks, and the spaces before those removed, nothing of the text changes. What comes out passes again:
    where a mark was removed, the one before it in its sentence stands for more words, and must bear them out too.
    """
    checked = _checked(answer, passages)
    for _ in range(_MOST_PASSES):
        again = _checked(checked.text, [passage for _, passage in checked.sources])
        if again == checked:
            break
        checked = again
    return checked


def _checked(answer: str, passages: Sequence[Passage]) -> Checked:
    evidence = [Evidence(passage.title, passage.text) for passage in passages]
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
        kept, end, gap = False, 0, ""
        parts: list[str] = []
        done: set[int] = set()          # one mark for one passage in a sentence
        for marks, before in _groups(piece):
            good = _kept(before, [passage for mark in marks for passage in _numbers(mark)], evidence)
            for mark in marks:
                if len(named := _numbers(mark)) > 1 and not good and max(named) >= len(passages):
                    continue            # a list of numbers, as text
                between = piece[end:mark.start()]
                end = mark.end()
                stay = [passage for passage in named if passage in good and passage not in done]
                if stay:
                    parts += [between or gap, *map(number, stay)]
                    kept, gap = True, ""
                    done.update(stay)
                else:
                    gap = gap or between[len(between.rstrip(" \t")):]
                    parts.append(between.rstrip(" \t"))
        parts.append(piece[end:])
        text = "".join(parts)
        if not kept and (passage := _borne_out_by(_without_marks(piece), evidence, quotable)) is not None:
            text = _attached(text, number(passage))
        out.append(text)
    return Checked("".join(out), [(at + 1, passages[passage]) for at, passage in enumerate(order)], bool(order))


def _kept(text: str, named: list[int], evidence: list[Evidence]) -> set[int]:
    """Those of the passages named behind a text that bear it out, each its part and together most of it."""
    said = Claim(text)
    found = {passage: evidence[passage].support(said) for passage in named if 0 <= passage < len(evidence)}
    needed = max(min(_FEWEST_SHARED, len(said.stems)), 1)
    good = {passage: support.shared for passage, support in found.items()
            if support.reason is None and len(support.shared) >= needed}
    together = frozenset().union(*good.values())
    if len(together) < _SHARE_KEPT * len(said.stems) or (said.head and said.head not in together):
        return set()
    return set(good)


def _borne_out_by(plain: str, evidence: list[Evidence], quotable: list[str]) -> int | None:
    """The first passage that holds a sentence to the letter, else the one that holds most of it."""
    said = Claim(plain)
    if plain.rstrip(" \t\n\"')*_").endswith("?") or not said.stems:
        return None
    letters = _letters(plain)
    found = [one.support(said) for one in evidence]
    for passage, (support, text) in enumerate(zip(found, quotable, strict=True)):
        if len(said.stems) >= 2 and len(letters.split()) >= 3 and f" {letters} " in f" {text} " and not support.reason:
            return passage
    good = [(len(support.shared), -passage) for passage, support in enumerate(found)
            if support.reason is None and (said.head is None or said.head in support.shared)
            and len(support.shared) >= max(_FEWEST_ATTACHED, _SHARE_ATTACHED * len(said.stems))]
    return -max(good)[1] if good else None


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
_BOUNDARY = re.compile(rf"[.!?]+[\"')*_]*(?:[ \t]*{_BRACKET})*(?=\s|$)[ \t]*|\n+")
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
        if not match[1].isdecimal() and re.search(r"\w\($", before):
            continue        # sum([1, 2])
        follows = found and found[-1].end() == match.start()
        if (before.endswith(("]", ")")) and not follows) or before.rstrip(" \t").endswith("="):
            continue
        found.append(match)
    return found


def _numbers(mark: re.Match[str]) -> list[int]:
    """The passages, from 0, that a mark names: `[1, 3-5]` names four."""
    found: list[int] = []
    for part in re.split(r"[ \t]?[,;][ \t]?", mark[1]):
        first, *last = (int(number) for number in re.split(r"[ \t]?[\u2013-][ \t]?", part))
        found += range(first - 1, min(last[-1], first - 1 + _LONGEST_RANGE)) if last else [first - 1]
    return found


_LONGEST_RANGE = 50


def _groups(sentence: str) -> Iterator[tuple[list[re.Match[str]], str]]:
    """Marks that follow one another, and what they stand for: the text since the marks before, or the whole sentence
    where that says nothing or where more text follows."""
    marks = _marks(sentence)
    groups: list[list[re.Match[str]]] = []
    for mark in marks:
        if groups and not sentence[groups[-1][-1].end():mark.start()].strip():
            groups[-1].append(mark)
        else:
            groups.append([mark])
    end = 0
    for at, group in enumerate(groups):
        text, end = sentence[end:group[0].start()], group[-1].end()
        rest = sentence[end:] if at == len(groups) - 1 else ""
        whole = not Claim(text).stems or Claim(rest).stems
        yield group, _without_marks(sentence) if whole else text


def _without_marks(sentence: str) -> str:
    parts, end = [], 0
    for mark in _marks(sentence):
        parts.append(sentence[end:mark.start()])
        end = mark.end()
    return "".join([*parts, sentence[end:]])
