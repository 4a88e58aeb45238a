"""Arrays with an entry for each document or row of a corpus, and the order of these in an epoch. Loads no torch.

Fifty gigabytes of text are twelve million documents: as arrays in memory a gigabyte. They are made a piece at a time
here, and where they are long they lie in a file without a name beside the tokens, which ends with the process: its
pages belong to the disk's cache and not to the process. What comes out is the same either way.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from tryplicity.errors import UserError

AT_ONCE = 1 << 18       # entries that are worked on at a time; an array of more lies on the disk


def slices(size: int) -> Iterator[slice]:
    """The pieces that an array of this size is worked on in."""
    return (slice(start, min(start + AT_ONCE, size)) for start in range(0, size, AT_ONCE))


def gathered(pieces: Iterable[np.ndarray], dtype: np.dtype | type, folder: Path) -> np.ndarray:
    """The pieces as one array; of more than AT_ONCE entries in a file of the folder, or of the system's one for
    temporary files where the folder cannot be written. Raises UserError where the disk is full."""
    held: list[np.ndarray] = []
    size, file = 0, None
    try:
        for piece in pieces:
            size += len(piece)
            held.append(np.ascontiguousarray(piece, dtype=dtype))
            if size > AT_ONCE:
                file = file or _nameless(folder)
                for one in held:
                    file.write(one.data)
                held.clear()
        if file is None:
            return np.concatenate(held) if held else np.zeros(0, dtype=dtype)
        file.flush()
        return np.asarray(np.memmap(file, dtype=dtype, mode="r", shape=(size,)))
    except OSError as error:
        raise UserError(f"{folder}: cannot keep the order of {size:,} documents or rows there ({error.strerror}); free "
                        "some space") from error
    finally:
        if file is not None:
            with contextlib.suppress(OSError):      # of a full disk, which was told
                file.close()        # the mapping holds it open


def _nameless(folder: Path) -> tempfile._TemporaryFileWrapper:
    return tempfile.TemporaryFile(dir=folder if os.access(folder, os.W_OK) else None)


def filled(size: int, part: Callable[[slice], np.ndarray], folder: Path) -> np.ndarray:
    """int64 [size]: what `part` gives for each slice of it."""
    return gathered(map(part, slices(size)), np.int64, folder)


def sums(size: int, part: Callable[[slice], np.ndarray], folder: Path) -> np.ndarray:
    """int64 [size]: the sum of all up to and with each entry of what `part` gives."""
    def running() -> Iterator[np.ndarray]:
        before = 0
        for piece in slices(size):
            ends = np.cumsum(part(piece)) + before
            before = int(ends[-1])
            yield ends

    return gathered(running(), np.int64, folder)


def numbers(size: int, test: Callable[[slice], np.ndarray], folder: Path) -> np.ndarray:
    """int64: the numbers below `size` for which `test` (bool, of a slice of them) holds, in order."""
    return gathered((np.flatnonzero(test(piece)) + piece.start for piece in slices(size)), np.int64, folder)


def mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer on uint64: counters in, well-mixed numbers out, the same on every machine.

    Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (OOPSLA 2014).
    """
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permutation(size: int, seed: int, epoch: int, folder: Path | None = None) -> np.ndarray:
    """The order of `size` documents in one epoch: int64, the same on every machine and numpy version.

    They are sorted by the mixed numbers: where they are many, first into bands of these, in a file of `folder`."""
    key = mix(mix(np.array([seed % 2**64], dtype=np.uint64)) ^ np.array([epoch], dtype=np.uint64))

    def mixed(numbers: np.ndarray) -> np.ndarray:
        return mix(numbers.astype(np.uint64) ^ key)

    if folder is None or size <= AT_ONCE:
        return np.argsort(mixed(np.arange(size)), kind="stable")

    def bands() -> Iterator[np.ndarray]:
        bits = (size // AT_ONCE).bit_length()       # of half AT_ONCE on the average, or more

        def band_of(piece: slice) -> np.ndarray:
            return (mixed(np.arange(piece.start, piece.stop)) >> np.uint64(64 - bits)).astype(np.int64)

        count_PB = np.array([np.bincount(band_of(piece), minlength=1 << bits) for piece in slices(size)])
        end_PB = np.cumsum(count_PB.T).reshape(count_PB.T.shape).T      # a band after the other, in it the pieces
        with _nameless(folder) as file:
            for number, piece in enumerate(slices(size)):
                sorted_N = np.argsort(band_of(piece), kind="stable") + piece.start
                ends = np.cumsum(count_PB[number])
                for band, (last, length) in enumerate(zip(ends, count_PB[number], strict=True)):
                    file.seek(8 * int(end_PB[number, band] - length))
                    file.write(sorted_N[last - length:last].data)
            file.seek(0)
            for length in count_PB.sum(0):
                inside = np.frombuffer(file.read(8 * int(length)), dtype=np.int64)
                yield inside[np.argsort(mixed(inside), kind="stable")]

    return gathered(bands(), np.int64, folder)
