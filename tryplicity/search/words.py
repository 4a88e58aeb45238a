"""The words of a question or a sentence that carry its meaning, and the normal form of identifiers."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterator

#: words that nearly every English text holds
STOP_WORDS = frozenset(re.findall(r"\w+", """
    a about above after again all also am an and any are aren as at be because been before being below between both
    but by can cannot could couldn did didn do does doesn doing don down during each few for from further get got had
    hadn has hasn have haven having he her here hers him his how i if in into is isn it its itself just let ll me
    might more most must mustn my need no nor not now of off on once only or other our out over own please re s same
    shall she should shouldn so some such t tell than that the their them then there these they this those through to
    too under until up us use used using ve very want was wasn way we were weren what when where which while who whom
    why will with won would wouldn you your"""))

_WORD = re.compile(r"\w+")
#: a.b.c, as Python and many others write names
DOTTED = re.compile(r"(?<![\w.])[^\W\d]\w*(?:\.[^\W\d]\w*)+")
_HUMPED = re.compile(r"(?<!\w)[^\W_]\w*?(?:[a-z0-9][A-Z]|[A-Z]{2}[a-z])\w*")
_HUMP = re.compile(r"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])")
_ENDINGS = ("ingly", "edly", "ings", "ing", "ied", "ies", "ed", "es", "er", "ers", "ly", "s")


def folded(text: str) -> str:
    """Lower case without accents, as the index sees it."""
    if text.isascii():
        return text.lower()
    apart = unicodedata.normalize("NFKD", text.casefold())
    return "".join(sign for sign in apart if not unicodedata.combining(sign))


@functools.lru_cache(65536)
def stem(word: str) -> str:
    """A lower-case word without its commonest endings, so that `joins`, `joined` and `joining` are one."""
    for ending in _ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            word = word[:-len(ending)]
            if word[-1] == word[-2] and word[-1] not in "lsz":
                word = word[:-1]        # running -> run
            break
    if word[-1:] in ("e", "y", "i") and len(word) > 3:
        word = word[:-1]
    return word


def content_words(text: str) -> list[str]:
    """The stems of the words that carry meaning, in order, repeated as they are."""
    return [stem(word) for word in _WORD.findall(folded(text).replace("_", " ")) if word not in STOP_WORDS]


def joined(dotted: str) -> Iterator[str]:
    """os.path.join -> ospathjoin0, pathjoin0: one rare word for a name and for each of its ends. The digit keeps a
    stemmer off: json.load is not json.loads."""
    parts = [part.replace("_", "") for part in dotted.split(".")]
    parts = [part for part in parts if part]
    for start in range(len(parts) - 1):
        yield "".join(parts[start:]) + "0"


def humps(text: str) -> Iterator[str]:
    """TemporaryDirectory -> temporary, directory; of the names in a text that are written so."""
    for word in _HUMPED.findall(text):
        yield from (part.lower() for part in _HUMP.findall(word))
