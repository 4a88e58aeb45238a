"""From a question to terms of a full-text query. Whatever a user types is quoted: none of it is query language."""

from __future__ import annotations

import itertools
import re
from typing import NamedTuple

from tryplicity.search.words import DOTTED, STOP_WORDS, folded, joined, runs, stem

LONGEST_QUESTION = 4000     # characters that are read
MOST_TERMS = 40

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
    def forms(self) -> tuple[tuple[str, ...], ...]:
        """Any of which will do, the question's own first."""
        return (self.words, *((other,) for other in _SAME.get(self.words[0], ()) if len(self.words) == 1))

    @property
    def quoted(self) -> str:
        """As FTS5 reads it: strings in double quotes. No word has a quote in it."""
        return "(" + " OR ".join(f'"{" ".join(form)}"' for form in self.forms) + ")"

    @property
    def stems(self) -> list[frozenset[str]]:
        """Of each form."""
        return [frozenset(map(stem, form)) for form in self.forms]


def terms(question: str) -> list[Term]:
    """The distinct terms of a question, in order. Stop-words are dropped unless there is nothing else, or one is
    quoted or is followed by the kind of thing it names (`the with statement`)."""
    question = question[:LONGEST_QUESTION]
    found: list[Term] = []
    for dotted in DOTTED.findall(folded(question)):
        found += [Term((name,)) for name in joined(dotted)]
    quoted = {word for text in _QUOTED.findall(question) for run in runs(text) for word in run}
    asked = list(runs(question))
    for at, run in enumerate(asked):
        if len(run) > 1:        # of letters that no space parts: each two
            found += [Term(pair) for pair in itertools.pairwise(run)]
            continue
        following = asked[at + 1] if at + 1 < len(asked) else ()
        if run[0] not in STOP_WORDS or run[0] in quoted:
            found.append(Term(run))
        elif _NAMED.issuperset(following) and following and run[0] not in _ARTICLES:
            found.append(Term(run + following))
    found = found or [Term(run) for run in asked]
    return list(dict.fromkeys(found))[:MOST_TERMS]


_ARTICLES = frozenset(("the", "a", "an", "this", "that", "which", "what", "of"))
