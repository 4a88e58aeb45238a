"""What can be counted of a text in one pass: words, lines, sentences and what is said twice.

Shapes: W words, P places of n-grams.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property

import numpy as np

#: a link, a word with the signs in its middle that hold it together (it's, os.path, f(x) but for the last bracket),
#: several points or dashes in a row, or a single sign: as spaCy's tokenizer parts English
_WORD = re.compile(r"""https?://\S+|(?:e\.g|i\.e)\.|[^\W_]+(?:(?:\.(?![A-Z])|['\u2019()\[\]{}"`*+@#$%&^~|!?;\\_]|::)+[^\W_]+)*"""
                   r"""|\.\.+|--+|[^\w\s]|_""")
_LETTER = re.compile(r"[^\W\d_]")
_SENTENCE = re.compile(r"[.!?\u2026\u3002\uff01\uff1f]+[\"'\u201d\u2019)\]]*(?=\s|$)")
_MIX = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying by it loses nothing (Knuth's multiplicative hash)


class Text:
    """A text and what is counted of it, each thing when it is first asked for."""

    def __init__(self, text: str) -> None:
        self.text = text

    @cached_property
    def words(self) -> list[str]:
        """Words and single signs, in order."""
        return _WORD.findall(self.text)

    @cached_property
    def spoken(self) -> list[str]:
        """The words that are more than a sign."""
        return [word for word in self.words if len(word) > 1 or word.isalnum()]

    @cached_property
    def lettered(self) -> int:
        """How many words have a letter."""
        return sum(1 for word in self.words if _LETTER.search(word))

    @cached_property
    def lines(self) -> list[str]:
        """Those with something on them."""
        return [line for line in self.text.split("\n") if line and not line.isspace()]

    @cached_property
    def paragraphs(self) -> list[str]:
        return re.split(r"\n{2,}", self.text.strip())

    @cached_property
    def _ids_W(self) -> np.ndarray:
        number: dict[str, int] = {}
        return np.array([number.setdefault(word, len(number)) for word in self.words], dtype=np.uint64)

    @cached_property
    def _ends_W(self) -> np.ndarray:
        """Characters up to each word, the words alone counted; one more than there are words."""
        return np.concatenate([[0], np.cumsum([len(word) for word in self.words])])

    def _keys(self, n: int) -> np.ndarray:
        """A number for each n-gram of words by where it begins; equal n-grams have equal ones."""
        count = len(self.words) - n + 1
        keys_P = self._ids_W[:max(count, 0)].copy()
        for offset in range(1, n):
            keys_P = keys_P * _MIX + self._ids_W[offset:offset + count] + np.uint64(offset)
        return keys_P

    def most_frequent(self, n: int) -> int:
        """Characters that the most frequent n-gram of words takes, its spaces counted; 0 where there is none."""
        keys_P = self._keys(n)
        if not len(keys_P):
            return 0
        _, first, count = np.unique(keys_P, return_index=True, return_counts=True)
        best = np.flatnonzero(count == count.max())
        at = int(first[best].min())  # of several, the one that comes first
        return int(count.max()) * (int(self._ends_W[at + n] - self._ends_W[at]) + n - 1)

    def said_again(self, sizes: Sequence[int]) -> list[int]:
        """For each n of a rising list: characters in n-grams of words that stood in the text before, each character
        counted once."""
        found, places_P = [], np.arange(len(self.words))
        for n in sizes:
            keys_P = self._keys(n)
            places_P = places_P[places_P < len(keys_P)]  # where the shorter one was there twice
            _, which, count = np.unique(keys_P[places_P], return_inverse=True, return_counts=True)
            places_P = places_P[count[which] > 1]
            found.append(self._covered(keys_P, places_P, n))
        return found

    def _covered(self, keys_P: np.ndarray, places_P: np.ndarray, n: int) -> int:
        seen, free, covered = set(), 0, 0
        for at in places_P.tolist():
            if at < free:
                continue
            if (key := keys_P[at].item()) in seen:
                covered += int(self._ends_W[at + n] - self._ends_W[at])
                free = at + n
            else:
                seen.add(key)
        return covered


def repeated(pieces: Sequence[str]) -> tuple[int, int]:
    """How many of the pieces stood among them before, and their characters."""
    seen: set[str] = set()
    number = characters = 0
    for piece in pieces:
        if piece in seen:
            number, characters = number + 1, characters + len(piece)
        else:
            seen.add(piece)
    return number, characters


def sentences(text: str) -> int:
    """How many sentences end in a text; one that only stops is one too."""
    ends = [match.end() for match in _SENTENCE.finditer(text)]
    return len(ends) + bool(text[ends[-1]:].strip() if ends else text.strip())
