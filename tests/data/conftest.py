import random

import pytest

from tryplicity import Document, Source

_WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "ate", "über", "die", "Brücke", "→", "1234",
          "<|eos|>", "def", "return", "lambda", "x:", "naïve", "語"]


class Made(Source):
    """Documents made up from a few words, in two domains; some hold signs beyond ASCII and special tokens."""

    name = "made"

    def __init__(self, documents=60, seed=0, texts=None):
        self.read = 0
        self.key = f"{documents}-{seed}-{texts}"
        self.texts = texts or [self._text(random.Random(f"{seed}-{i}")) for i in range(documents)]

    @staticmethod
    def _text(rng):
        return " ".join(rng.choice(_WORDS) for _ in range(rng.randint(1, 60))) + "\n"

    def fingerprint(self):
        return self.key

    def documents(self):
        self.read += 1
        for i, text in enumerate(self.texts):
            yield Document(f"made/{i}", text, "code" if i % 3 == 0 else "text", f"made:{i}")


@pytest.fixture(scope="session")
def make_source():
    return Made
