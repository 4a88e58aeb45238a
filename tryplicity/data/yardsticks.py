"""What a user could have without training: bits per byte of the same held-out text from models and compressors that
everyone has, and how much of that text stands in the training text too. Loads no torch.

    bigram      a byte-bigram model fitted on the training text (`tryplicity.data.bigram`): what anything must beat
    xz          xz -9e of the held-out text alone, in one piece
    xz_primed   xz -6 with the training text before it, all of it in xz's window: what the held-out text adds to the
                compressed size
    ppm         PPMd (variant H, order 6) with the training text before it, likewise

Compressors read the held-out documents one after another and learn from each; a model is scored on each by itself.
"""

from __future__ import annotations

import lzma
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

FORMAT = 1                  # raise when the figures of the same text change
PRIMED = 8 << 20            # bytes of training text that prime the compressors: more takes long, and gains little
SCORED = 2 << 20            # bytes of held-out text that are compressed
COMPARED = 64 << 20         # bytes of training text that the held-out text is looked for in
WINDOW = 13                 # words; the window of GPT-3's overlap analysis (arXiv:2005.14165, appendix C)
_PPM_ORDER, _PPM_MEMORY = 6, 256 << 20
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Yardsticks:
    """Bits per byte of held-out text, and the shares behind them."""

    bigram: float
    xz: float
    xz_primed: float
    ppm: float
    overlap: float              # share of the held-out text's windows of 13 words that the training text holds too
    primed_bytes: int           # of training text before it, for xz_primed and ppm
    scored_bytes: int           # of held-out text, for xz and ppm
    compared_bytes: int         # of training text, for overlap
    train_bytes: int            # of training text in all

    def sentences(self) -> list[str]:
        """What a person reads of it, beside a model's bits per byte: what compresses how far, and the overlap."""
        primed = "" if self.primed_bytes == self.train_bytes else f" (a sample of {self.primed_bytes / 1e6:.0f} MB)"
        compared = ("" if self.compared_bytes == self.train_bytes
                    else f", as far as a sample of {self.compared_bytes / 1e6:.0f} MB tells")
        return ["the same held-out text without any model: PPM of order 6 primed with the training "
                f"text{primed} {self.ppm:.3f}, xz likewise {self.xz_primed:.3f}, xz of the held-out text alone "
                f"{self.xz:.3f} bits per byte",
                f"{self.overlap:.1%} of the held-out text's windows of {WINDOW} words stand in the training text "
                f"too{compared}"]


def xz_bits_per_byte(text: bytes, before: bytes = b"") -> float:
    """8 |C(text)| / |text| of xz -9e, or primed, of xz -6: 8 (|C(before + text)| - |C(before)|) / |text|."""
    if not before:
        return 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)
    window = max(1 << 16, 1 << (len(before) + len(text) - 1).bit_length())
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": window}]
    both, alone = (len(lzma.compress(data, filters=filters)) for data in (before + text, before))
    return 8 * (both - alone) / len(text)


def ppm_bits_per_byte(text: bytes, before: bytes = b"") -> float:
    """PPMd, variant H, of order 6 (Shkarin, "PPM: one step to practicality", DCC 2002), as 7-Zip has it: the same
    difference as of xz."""
    return 8 * (_ppm(before + text) - (_ppm(before) if before else 0)) / len(text)


def _ppm(text: bytes) -> int:
    import pyppmd

    encoder = pyppmd.Ppmd7Encoder(_PPM_ORDER, _PPM_MEMORY)
    return len(encoder.encode(text)) + len(encoder.flush())


def overlap(held_out: Iterable[str], train: Iterable[str], told: Callable[[str], None] = lambda text: None) -> float:
    """The share of the windows of 13 words (what stands between white space, in small letters) of the held-out texts
    that stand in the training texts too; 0 where no text is so long. told: called with each training text read."""
    wanted = [windows(text) for text in held_out]
    every = np.concatenate(wanted) if wanted else np.empty(0, dtype=np.uint64)
    if not len(every):
        return 0.0
    distinct, counts = np.unique(every, return_counts=True)
    found = np.zeros(len(distinct), dtype=bool)
    for text in train:
        seen = windows(text)
        place = np.minimum(np.searchsorted(distinct, seen), len(distinct) - 1)
        found[place[distinct[place] == seen]] = True
        told(text)
    return float(counts[found].sum() / counts.sum())


def windows(text: str) -> np.ndarray:
    """A number for each window of 13 words, the same for the same words within this process: uint64."""
    words = text.lower().split()
    if len(words) < WINDOW:
        return np.empty(0, dtype=np.uint64)
    hashes = np.fromiter(map(hash, words), dtype=np.int64, count=len(words)).astype(np.uint64)
    number = np.zeros(len(words) - WINDOW + 1, dtype=np.uint64)
    for place in range(WINDOW):
        number = number * _MULTIPLIER + hashes[place:place + len(number)]
    return number
