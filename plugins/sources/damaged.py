"""Bad text made of good: what a judge of quality must not keep, with a reason that is known."""

from __future__ import annotations

import base64
import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tryplicity import Document, Part, Source, uses

VERSION = 1  # raise when the same documents would be damaged in another way
LEAST, MOST = 1500, 4000  # characters of what comes out, about
MENU = ("Home", "About us", "Contact", "Sign in", "Privacy policy", "Terms of use", "Subscribe", "Accept cookies",
        "All rights reserved", "Share this", "Next page", "Back to top")


def shuffled(text: str, draw: random.Random) -> str:
    words = text.split()
    draw.shuffle(words)
    return " ".join(words)


def letters(text: str, draw: random.Random) -> str:
    signs = list(text)
    draw.shuffle(signs)
    return "".join(signs)


def encoded(text: str, draw: random.Random) -> str:
    return base64.b64encode(draw.randbytes(len(text) * 3 // 4)).decode()


def again(text: str, draw: random.Random) -> str:
    line = max(text.splitlines(), key=len)[:100]
    return "\n".join([line] * max(2, len(text) // (len(line) + 1)))


def menu(text: str, draw: random.Random) -> str:
    words, lines = [word for word in text.split() if word.isalpha()] or ["page"], []
    while sum(map(len, lines)) < len(text):
        entries = [draw.choice(MENU) if draw.random() < 0.5 else draw.choice(words).title() for _ in range(5)]
        lines.append(" | ".join(entries))
    return "\n".join(lines)


def spam(text: str, draw: random.Random) -> str:
    words, offers = [word for word in text.split() if word.isalpha()] or ["deal"], []
    while sum(map(len, offers)) < len(text):
        word = draw.choice(words).upper()
        offers.append(f"BUY {word} NOW!!! BEST PRICE http://{word.lower()}.example/{draw.randrange(10**6)} CLICK HERE")
    return "\n".join(offers)


WAYS: tuple[Callable[[str, random.Random], str], ...] = (shuffled, letters, encoded, again, menu, spam)


class Damaged(Source):
    """The documents of another source, each spoilt in one of six ways: its words or its letters shuffled, encoded data
    in its place, one line of it again and again, a site's menu, advertisements. What a head or a recipe is tried on
    where nobody has sorted bad text; the id says the way. All are of the domain `text`."""

    name = "damaged"

    @dataclass(frozen=True)
    class Config:
        of: Part = uses("source", default="python-docs")
        """the source whose documents are spoilt"""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._good: Source = config.of.build()

    def fingerprint(self) -> str:
        described = json.dumps([self.name, VERSION, self._good.name, self._good.fingerprint()])
        return hashlib.sha256(described.encode()).hexdigest()

    def documents(self) -> Iterator[Document]:
        for number, document in enumerate(self._good.documents()):
            way, draw = WAYS[number % len(WAYS)], random.Random(document.id)
            start = (document.text * (LEAST // max(1, len(document.text)) + 1))[:MOST]
            yield Document(f"{way.__name__}-{document.id}", way(start, draw), "text", "")
        self.left_out = self._good.left_out
