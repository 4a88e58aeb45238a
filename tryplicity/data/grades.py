"""How hard a document reads, as a school grade. Loads no torch.

The grade is the Automated Readability Index (Senter and Smith, "Automated Readability Index", AMRL-TR-66-220,
1967) as textstat computes it: like the Flesch-Kincaid grade an American school grade from the length of sentences
and words, but words are measured in letters, so nothing has to be downloaded. (textstat's Flesch-Kincaid grade
counts syllables with a dictionary that nltk fetches from the network; and the index was made for technical text.)

Only prose is graded. Of code that is its comments and docstrings. Of any text, left out are lines of a console
session, lines that are more signs than words, and words that are no words: numbers, names with dots, brackets or
underscores, addresses, markup. A line that ends without a full stop (a heading, an entry of a list) is a sentence.
A document with fewer than 20 words of prose has no grade, NaN: nobody can say how hard it reads, so it is for a
reader of any text only.
"""

from __future__ import annotations

import array
import itertools
import math
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from tryplicity.progress import Progress, no_progress

if TYPE_CHECKING:
    from tryplicity.components import Document

FORMAT = 1              # raise when a document's grade changes
LENGTH = 4000           # characters of prose that are graded; so many tell the level of the whole
READ = 100_000          # characters of a document that prose is looked for in
FEWEST_WORDS = 20       # of prose that a grade can be told from

# what is no comment is matched too, so that a sign inside a string does not open one
_CODE = re.compile(r'''
    (?P<triple>"""|\'\'\') (?P<docstring>.*?) (?:(?P=triple)|\Z)
  | /\* (?P<block>.*?) (?:\*/|\Z)
  | (?: \#(?!!) | (?<![:\w)\]])//+ ) (?P<line>[^\n]*)
  | "(?:\\.|[^"\\\n]){0,300}+" | '(?:\\.|[^'\\\n]){0,300}+'
''', re.VERBOSE | re.DOTALL)
_SESSION = (">>>", "...", "$ ", "In [", "Out[")
_PARAGRAPH = re.compile(r"\n\s*\n|\n(?=\s*(?:[-*•+:]|\d+[.)])\s)")    # a blank line, or an entry of a list
_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")  # noqa: RUF001
_OPENING, _CLOSING = "\"'`*_([{<“‘«", "\"'`*_)]}>”’»,;:.!?…"  # noqa: RUF001


def grade(document: Document) -> float:
    """The school grade that a document's prose reads like, 0 at least; NaN where it has too little prose."""
    import textstat

    text = prose(document)
    if len(text.split()) < FEWEST_WORDS:
        return math.nan
    return max(0.0, textstat.automated_readability_index(text))


def grades(documents: Iterable[Document], progress: Progress = no_progress, total: int | None = None) -> np.ndarray:
    """The grade of each document: float32 [documents]. total: how many there are, for `progress`."""
    found = array.array("f")
    for document in documents:
        found.append(grade(document))
        if len(found) % 64 == 0:
            progress("grading how hard the documents read", len(found), total)
    return np.array(found, dtype=np.float32)


def prose(document: Document) -> str:
    """The first LENGTH characters or so of a document's prose, as plain words and full stops."""
    text = document.text[:READ]
    texts = comments(text) if document.domain == "code" else [text]
    found, length = [], 0
    for sentence in itertools.chain.from_iterable(map(_sentences, texts)):
        found.append(sentence)
        length += len(sentence) + 1
        if length >= LENGTH:
            break
    return " ".join(found)


def comments(code: str) -> Iterator[str]:
    """The comments and docstrings in source code of Python and of languages like C or the shell; line comments
    that follow one another are one."""
    lines, end = "", 0
    for match in _CODE.finditer(code):
        if lines and not (match["line"] and code[end:match.start()].strip(" \t") in ("", "\n")):
            yield lines
            lines = ""
        if match["line"]:
            lines, end = f"{lines}\n{match['line']}", match.end()
        elif text := match["docstring"] or match["block"]:
            yield text
    if lines:
        yield lines


def _sentences(text: str) -> Iterator[str]:
    """The prose of a text: plain words, a full stop after each sentence."""
    start = 0
    while start < len(text):
        end = _PARAGRAPH.search(text, start)
        paragraph, start = (text[start:end.start()], end.end()) if end else (text[start:], len(text))
        if words := list(_words(paragraph)):
            yield " ".join(words) + "."


def _words(paragraph: str) -> Iterator[str]:
    """The words of the lines that are prose, each that ends a sentence with its full stop, save the last."""
    word, ended = None, False
    for line in paragraph.splitlines():
        if line.lstrip().startswith(_SESSION):
            break                               # what the console answers follows
        tokens = line.split()
        plain = [token.lstrip(_OPENING).rstrip(_CLOSING) for token in tokens]
        if 2 * sum(_WORD.fullmatch(core) is not None for core in plain) < len(tokens):
            continue
        for token, core in zip(tokens, plain, strict=True):
            if _WORD.fullmatch(core):
                if word:
                    yield word + "." if ended and not core[0].islower() else word
                word, ended = core, False
            # "e.g." and the like end no sentence: the next word shows it
            ended = ended or any(sign in token[len(token.rstrip(_CLOSING)):] for sign in ".!?…")
    if word:
        yield word
