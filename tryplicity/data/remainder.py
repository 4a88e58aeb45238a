"""What is left of an epoch after some rows of it, as runs of tokens: where each begins in the epoch, and how many
tokens there are up to its end. A piece at a time, so that the runs of a long epoch need no memory. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from tryplicity.data.ordering import AT_ONCE, gathered, slices, sums

Runs = tuple[np.ndarray, np.ndarray]        # where each begins; tokens up to its end
_RUN = np.dtype([("at", "<i8"), ("size", "<i8")])


def without(runs: Runs, length: int, gone: np.ndarray, folder: Path) -> Runs:
    """Of runs that are cut into rows of `length` tokens, what is left without the rows of these numbers. What is
    shorter than a row, at the end, is left."""
    left_at, left_end = runs
    total = int(left_end[-1]) if len(left_end) else 0
    rows = total // length
    kept_R = np.ones(rows + 1, dtype=bool)      # the last: what is shorter than a row
    for some in slices(len(gone)):
        kept_R[gone[some]] = False

    def pieces() -> Iterator[np.ndarray]:
        for first, last in _few(left_end, rows + 1, length):
            begin = (np.flatnonzero(kept_R[first:last]) + first) * length
            if len(begin):
                yield _cut(left_at, left_end, begin, np.minimum(begin + length, total))

    found = gathered(_joined(pieces()), _RUN, folder)
    return found["at"], sums(len(found), lambda some: found["size"][some], folder)


def _few(left_end: np.ndarray, rows: int, length: int) -> Iterator[tuple[int, int]]:
    """The rows in pieces of few rows that lie in few runs."""
    first = 0
    while first < rows:
        last, run = min(first + AT_ONCE, rows), int(np.searchsorted(left_end, first * length, side="right")) + AT_ONCE
        if run < len(left_end):
            last = min(last, max(first + 1, int(left_end[run]) // length))
        yield first, last
        first = last


def _cut(left_at: np.ndarray, left_end: np.ndarray, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
    """The runs that lie between these borders, which count along the runs."""
    of = slice(np.searchsorted(left_end, begin[0], side="right"), np.searchsorted(left_end, end[-1]))
    # at these borders a piece can begin or end
    borders = np.unique(np.concatenate([begin, end, left_end[of]]))
    start, stop = borders[:-1], borders[1:]
    inside = start < end[np.searchsorted(begin, start, side="right") - 1]
    start, stop = start[inside], stop[inside]
    run = np.searchsorted(left_end, start, side="right")
    found = np.empty(len(start), dtype=_RUN)
    found["at"] = left_at[run] + start - np.where(run > 0, left_end[run - 1], 0)
    found["size"] = stop - start
    return found


def _joined(pieces: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Runs that touch are one."""
    held = np.empty(0, dtype=_RUN)
    for piece in pieces:
        piece = np.concatenate([held, piece])
        if len(piece):
            at, size = piece["at"], piece["size"]
            first = np.flatnonzero(np.append(True, at[1:] != (at + size)[:-1]))
            piece = piece[first]
            piece["size"] = np.add.reduceat(size, first)
        yield piece[:-1]
        held = piece[-1:]
    yield held
