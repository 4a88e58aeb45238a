"""The words of a text, in any script, by one function for what is indexed, what is asked and what is checked.

    words("Straße, C++ and 東京") == ["strasse", "c++", "and", "東", "京"]

A text is brought into one form (`folded`: compatibility composition and case folding, UAX #15 and the Unicode
Standard, 3.13), then cut. Where words are written without spaces (Chinese, Japanese, Korean, Thai, Lao, Khmer,
Burmese) each character with its marks is a word, and a question asks for each two of them that follow one another.
"""

from __future__ import annotations

import functools
import re
import threading
import unicodedata
from collections.abc import Iterator

import snowballstemmer

#: words that nearly every English text holds
STOP_WORDS = frozenset(re.findall(r"\w+", """
    a about above after again all also am an and any are aren as at be because been before being below between both
    but by can cannot could couldn did didn do does doesn doing don down during each few for from further get got had
    hadn has hasn have haven having he her here hers him his how i if in into is isn it its itself just let ll me
    might more most must mustn my need no nor not now of off on once only or other our out over own please re s same
    shall she should shouldn so some such t tell than that the their them then there these they this those through to
    too under until up us use used using ve very want was wasn way we were weren what when where which while who whom
    why will with won would wouldn you your"""))

# letters that need no spaces between words (with the marks that kana have of their own), and signs that are words
_UNSPACED = ("\u0e01-\u0e30\u0e32\u0e33\u0e40-\u0e46\u0e81-\u0eb0\u0eb2\u0eb3\u0ebd-\u0ec6\u0edc-\u0edf"   # Thai, Lao
             "\u1000-\u102a\u103f\u1050-\u1055\u1780-\u17b3\u17d7\u17dc"                # Burmese, Khmer
             "\u3005-\u3007\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u3105-\u312f\u31a0-\u31bf\u31f0-\u31ff"
             "\u3400-\u4dbf\u4e00-\u9fff\ua000-\ua48c\uac00-\ud7a3\uf900-\ufaff"        # Han, kana, Yi, Hangul
             "\U0001b000-\U0001b2ff\U00020000-\U000323af"
             "\u2600-\u27bf\U0001f1e6-\U0001f1ff\U0001f300-\U0001faff")                # pictures
# what a reader does not see, or may leave out: joiners, directions, variations, Hebrew points, Arabic vowel signs
_UNSEEN = re.compile("[\u00ad\u034f\u061c\u0640\u180b-\u180e\u200c-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f"
                     "\ufe00-\ufe0f\ufeff\U000e0100-\U000e01ef\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7"
                     "\u0610-\u061a\u064b-\u0652\u0656-\u065f\u0670\u06d6-\u06dc\u06df-\u06e4\u06e7\u06e8\u06ea-\u06ed]+")
_PLAIN = re.compile(r"[a-z0-9]+(?:\+\+|#(?![a-z0-9_]))?")


@functools.cache
def _patterns() -> tuple[re.Pattern[str], re.Pattern[str]]:
    """(marks behind Latin and Greek letters, a word or a run of unspaced letters). Marks are not in Python's \\w, but
    belong to the letter before them."""
    marks = "".join(chr(sign) for sign in range(0x300, 0x20000) if unicodedata.category(chr(sign))[0] == "M")
    latin_or_greek = "a-z\u00df-\u02af\u0370-\u03ff\u1d00-\u1d7f\u2c60-\u2c7f\ua720-\ua7ff"
    accents = re.compile(f"(?<=[{latin_or_greek}])[\u0300-\u036f]+")
    letter = f"(?:(?![{_UNSPACED}])[^\\W_])"
    return accents, re.compile(f"((?:[{_UNSPACED}][{marks}]*)+)|{letter}(?:{letter}|[{marks}])*(?:\\+\\+|#(?!\\w))?")


def folded(text: str) -> str:
    """One form for all spellings of a text: no capitals, no compatibility forms (ﬁ, Ｈ, ｶﾞ), no accents on Latin and
    Greek letters, no vowel points in Hebrew and Arabic. Marks that make another letter (й, が, क़) stay."""
    if text.isascii():
        return text.lower()
    accents, _ = _patterns()
    apart = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", text).casefold())
    together = unicodedata.normalize("NFC", accents.sub("", _UNSEEN.sub("", apart)))
    # a stress that makes no letter of its own, as on the first vowel of a Russian "castle"
    return unicodedata.normalize("NFC", re.sub("[\u0300\u0301]+", "", together))


def runs(text: str) -> Iterator[tuple[str, ...]]:
    """The words of a text, in order: each alone, or together those that no space parts."""
    whole = folded(text).replace("_", " ")
    if whole.isascii():
        yield from ((word,) for word in _PLAIN.findall(whole))
        return
    for match in _patterns()[1].finditer(whole):
        yield tuple(_clusters(match[1])) if match[1] else (match[0],)


def words(text: str) -> list[str]:
    """All words of a text, in order: what is indexed, asked and checked."""
    whole = folded(text).replace("_", " ")
    if whole.isascii():
        return _PLAIN.findall(whole)
    return [word for run in runs(text) for word in run]


def parted(text: str) -> str:
    """The words of a text with no letter or digit between them: what FTS5's tokenizer `ascii`, which keeps `+` and `#`,
    parts into the same words."""
    if text.isascii() and "+" not in text and "#" not in text:
        return text
    return " ".join(words(text))


def _clusters(run: str) -> Iterator[str]:
    """Each letter with its marks."""
    start = 0
    for at in range(1, len(run) + 1):
        if at == len(run) or unicodedata.category(run[at])[0] != "M":
            yield run[start:at]
            start = at


class _Stems(dict):
    """Of words seen before. Porter's algorithm (1980), which is also the index's; snowballstemmer's objects are not
    for several threads at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stemmer = snowballstemmer.stemmer("porter")

    def __missing__(self, word: str) -> str:
        if not (word.isascii() and word.isalpha()) or len(word) < 3:
            return word
        with self._lock:
            if len(self) > 200_000:
                self.clear()
            self[word] = stemmed = self._stemmer.stemWord(word)
        return stemmed


_stems = _Stems()
#: a word without its English endings, so that `joins`, `joined` and `joining` are one
stem = _stems.__getitem__


def content_words(text: str) -> list[str]:
    """The stems of the words that carry meaning, in order, repeated as they are."""
    return [_stems[word] for word in words(text) if word not in STOP_WORDS]


# --- names ---

#: a.b.c, as Python and many others write names
DOTTED = re.compile(r"(?<![\w.])[^\W\d]\w*(?:\.[^\W\d]\w*)+")
_HUMPED = re.compile(r"(?<!\w)[^\W_]\w*?(?:[a-z0-9][A-Z]|[A-Z]{2}[a-z])\w*")
_HUMP = re.compile(r"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])")


def joined(dotted: str) -> Iterator[str]:
    """os.path.join -> ospathjoin0, pathjoin0: one rare word for a name and for each of its ends. The digit keeps a
    stemmer off: json.load is not json.loads."""
    parts = [part.replace("_", "") for part in dotted.split(".")]
    parts = [part for part in parts if part]
    for start in range(len(parts) - 1):
        yield "".join(parts[start:]) + "0"


def humps(text: str) -> Iterator[str]:
    """TemporaryDirectory -> temporary, directory; of the names in a text that are written so."""
    for word in _HUMPED.findall(" ".join(part for part in text.split() if not part.islower())):
        yield from (part.lower() for part in _HUMP.findall(word))
