"""Documents that are the same, or nearly, as one before them.

MinHash (Broder, "On the resemblance and containment of documents", 1997) over 5-grams of words, by the `rensa` library,
in 14 bands of 8: two documents that share a band are taken for copies, which those with four fifths of their 5-grams in
common are in 93 of 100 cases, and those with half of them in 5 (1 - (1 - s^8)^14). Of a document 15 numbers are kept,
120 bytes: nine million documents are a gigabyte on the disk, and a fourteenth of it in memory at a time.

Shapes: N documents, B bands; the last column of a signature is the whole text's hash.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tryplicity.files import whole_file

if TYPE_CHECKING:
    from tryplicity.components import Document

BANDS, ROWS, SHINGLE, SEED = 14, 8, 5, 1
LONGEST = 5_000_000  # characters; of a longer text, its 5-grams alone would take gigabytes, only the whole is compared
_WORD = re.compile(r"\w+")
_MIX = np.uint64(0x9E3779B97F4A7C15)


def signature(text: str) -> np.ndarray:
    """One number for each band and one for the whole text: uint64 [B + 1]."""
    from rensa import RMinHash

    words = _WORD.findall(text.lower()) if len(text) <= LONGEST else []
    shingles = [" ".join(words[i:i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1))]
    minhash = RMinHash(num_perm=BANDS * ROWS, seed=SEED)
    minhash.update(shingles)
    digest_BR = np.array(minhash.digest(), dtype=np.uint64).reshape(BANDS, ROWS)
    bands_B = np.zeros(BANDS, dtype=np.uint64)
    for column in digest_BR.T:
        bands_B = (bands_B ^ column) * _MIX
        bands_B ^= bands_B >> np.uint64(29)
    if len(words) < SHINGLE:  # too short to be nearly the same as anything: only the whole text counts
        bands_B[:] = _hash(text)
    return np.concatenate([bands_B, [_hash(text)]]).astype(np.uint64)


def _hash(text: str) -> np.uint64:
    digest = hashlib.blake2b(text.strip().encode("utf-8", "replace"), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))


def write_signatures(path: Path, documents: Iterable[Document]) -> None:
    """The signatures of a shard's documents, whole or not at all."""
    found = [signature(document.text) for document in documents]
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        np.save(file, np.stack(found) if found else np.zeros((0, BANDS + 1), dtype=np.uint64))


def copies(paths: Sequence[Path], near: bool) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """For each shard, given its signatures in order: which documents say what one before them said, to the letter
    (bool [N]), and which nearly so. Of documents that are copies of one another, directly or by way of a third, the
    first stays."""
    sizes = [len(np.load(path, mmap_mode="r")) for path in paths]
    total = sum(sizes)
    exact_N = _later(_column(paths, BANDS))
    parent_N = np.arange(total)
    for band in range(BANDS) if near else ():
        _join(parent_N, _column(paths, band))
    near_N = np.zeros(total, dtype=bool)
    if near:
        roots_N = _roots(parent_N)
        near_N = (roots_N != np.arange(total)) & ~exact_N
    ends = np.cumsum(sizes)[:-1]
    return np.split(exact_N, ends), np.split(near_N, ends)


def _column(paths: Sequence[Path], band: int) -> np.ndarray:
    columns = [np.load(path, mmap_mode="r")[:, band] for path in paths]
    return np.concatenate(columns) if columns else np.zeros(0, dtype=np.uint64)


def _later(values_N: np.ndarray) -> np.ndarray:
    """Where a value stands that stood before: bool [N]."""
    order_N = np.argsort(values_N, kind="stable")
    same_N = np.zeros(len(values_N), dtype=bool)
    same_N[order_N[1:]] = values_N[order_N[1:]] == values_N[order_N[:-1]]
    return same_N


def _join(parent_N: np.ndarray, values_N: np.ndarray) -> None:
    """Join the sets of documents that share a value; the parent of each is one before it, or itself."""
    order_N = np.argsort(values_N, kind="stable")
    same = np.flatnonzero(values_N[order_N[1:]] == values_N[order_N[:-1]])
    for one, other in zip(order_N[same].tolist(), order_N[same + 1].tolist(), strict=True):
        a, b = _root(parent_N, one), _root(parent_N, other)
        if a != b:
            parent_N[max(a, b)] = min(a, b)


def _root(parent_N: np.ndarray, at: int) -> int:
    while parent_N[at] != at:
        parent_N[at] = parent_N[parent_N[at]]
        at = int(parent_N[at])
    return at


def _roots(parent_N: np.ndarray) -> np.ndarray:
    while True:
        above_N = parent_N[parent_N]
        if (above_N == parent_N).all():
            return parent_N
        parent_N = above_N
