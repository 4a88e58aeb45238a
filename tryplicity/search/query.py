"""From a question to terms of a full-text query. Whatever a user types is quoted: none of it is query language."""

from __future__ import annotations

import re
from typing import NamedTuple

from tryplicity.search.words import DOTTED, STOP_WORDS, folded, joined

LONGEST_QUESTION = 4000     # characters that are read
MOST_TERMS = 40

_WORD = re.compile(r"\w+")
# words after which a stop-word is the thing asked for: "the with statement", "what the in operator does"
_NAMED = frozenset(f"{thing}{s}" for thing in (
    "statement", "keyword", "operator", "loop", "clause", "block", "expression", "function", "method")
    for s in ("", "s"))
_QUOTED = re.compile(r"[`'\"]([^`'\"\s]{1,80})[`'\"]")


# a word that people use, and what documentation says in its place
_SAME = {word: tuple(others) for word, *others in map(str.split, """
    biggest maximum max
    catch handle except
    create make
    delete remove
    dictionary dict mapping
    exit quit
    folder directory
    folders directories
    integer int
    larger maximum max
    largest maximum max
    length len size number
    quit exit
    save dump store
    show print display
    smaller minimum min
    smallest minimum min
    stop terminate
    string str
    text string
    wait sleep
    """.strip().splitlines())}


class Term(NamedTuple):
    """What is looked for: a word, or words that follow one another, or what may stand in their place."""

    words: tuple[str, ...]

    @property
    def others(self) -> tuple[str, ...]:
        return _SAME.get(self.words[0], ()) if len(self.words) == 1 else ()

    @property
    def quoted(self) -> str:
        """As FTS5 reads it: strings in double quotes."""
        return "(" + " OR ".join(f'"{form.replace(chr(34), chr(34) * 2)}"'
                                 for form in (" ".join(self.words), *self.others)) + ")"


def terms(question: str) -> list[Term]:
    """The distinct terms of a question, in order. Stop-words are dropped unless there is nothing else, or one is
    quoted or is followed by the kind of thing it names (`the with statement`)."""
    question = question[:LONGEST_QUESTION].replace("\0", " ")
    found: list[Term] = []
    for dotted in DOTTED.findall(question):
        found += [Term((folded(name),)) for name in joined(dotted)]
    quoted = {folded(word) for word in _QUOTED.findall(question)}
    words = _WORD.findall(folded(question).replace("_", " "))
    for at, word in enumerate(words):
        following = words[at + 1] if at + 1 < len(words) else ""
        if word not in STOP_WORDS or word in quoted:
            found.append(Term((word,)))
        elif following in _NAMED and word not in ("the", "a", "an", "this", "that", "which", "what", "of"):
            found.append(Term((word, following)))
    found = found or [Term((word,)) for word in words]
    return list(dict.fromkeys(found))[:MOST_TERMS]
