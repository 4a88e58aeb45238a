"""A byte-bigram model: the floor any trained model must be well below. Loads no torch.

The probability of a byte given the one before it, interpolated with the byte's own frequency after Witten and
Bell (1991): p(b|a) = (c(a,b) + n(a) p(b)) / (c(a) + n(a)), n(a) the number of different bytes seen after a,
and p(b) = (c(b) + 1) / (c + 256). A document's first byte follows a mark of its own.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

_START = 256    # stands before a document's first byte


def count_pairs(texts: Iterable[bytes]) -> np.ndarray:
    """How often each byte follows each other one: int64 [257, 256], row 256 for the first of a text."""
    counts = np.zeros(257 * 256, dtype=np.int64)
    waiting: list[np.ndarray] = []

    def add_waiting() -> None:
        if waiting:
            counts[:] += np.bincount(np.concatenate(waiting), minlength=257 * 256)
            waiting.clear()

    size = 0
    for text in texts:
        bytes_N = np.frombuffer(text, dtype=np.uint8).astype(np.int64)
        if len(bytes_N) == 0:
            continue
        before_N = np.concatenate([[_START], bytes_N[:-1]])
        waiting.append(before_N * 256 + bytes_N)
        size += len(bytes_N)
        if size > 1 << 20:
            add_waiting()
            size = 0
    add_waiting()
    return counts.reshape(257, 256)


def bits_of_pairs(counts: np.ndarray) -> np.ndarray:
    """-log2 p(b|a) of the fitted model: float64 [257, 256]."""
    after_a = counts.sum(1, keepdims=True)
    different = np.maximum((counts > 0).sum(1, keepdims=True), 1)
    single = (counts.sum(0) + 1) / (counts.sum() + 256)
    return -np.log2((counts + different * single) / (after_a + different))


def bits_per_byte(train: Iterable[bytes], held_out: Iterable[bytes]) -> float:
    """Fit on the training texts (UTF-8), score the held-out ones."""
    bits, seen = bits_of_pairs(count_pairs(train)), count_pairs(held_out)
    total = seen.sum()
    if total == 0:
        raise ValueError("no held-out bytes to score")
    return float((seen * bits).sum() / total)
