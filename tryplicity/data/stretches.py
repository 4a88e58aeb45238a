"""Where in a file of tokens the rows of a batch stand. Loads no torch.

Shapes: P pieces, S stretches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Stretches(NamedTuple):
    """Tokens that stand side by side in the file and are of one document, one stretch after another."""

    place_S: np.ndarray     # where in the file each begins
    size_S: np.ndarray      # its tokens
    document_S: np.ndarray  # the number of its document in the file
    piece_S: np.ndarray     # the number of the piece that it is part of

    def places(self) -> np.ndarray:
        """Where in the file each token stands."""
        before_S = np.cumsum(self.size_S) - self.size_S
        return (self.place_S - before_S).repeat(self.size_S) + np.arange(int(self.size_S.sum()))


def stretches(file_end_D: np.ndarray, documents: np.ndarray, end_D: np.ndarray, begin_P: np.ndarray,
              stop_P: np.ndarray) -> Stretches:
    """Pieces of these documents one after the other, each from `begin` up to `stop`, as stretches of the file.

    file_end_D: where in the file each of its documents ends. end_D: where each of `documents` ends among them. No
    document is empty, and no piece.
    """
    first_P = np.searchsorted(end_D, begin_P, side="right")
    many_P = np.searchsorted(end_D, stop_P - 1, side="right") - first_P + 1
    before_P = np.cumsum(many_P) - many_P       # stretches of the pieces before
    piece_S = np.arange(len(begin_P)).repeat(many_P)
    at_S = np.arange(len(piece_S)) + (first_P - before_P)[piece_S]
    end_S = end_D[at_S]
    stop_S = np.minimum(end_S, stop_P[piece_S])
    start_S = np.append(0, stop_S[:-1])
    start_S[before_P] = begin_P
    document_S = documents[at_S]
    return Stretches(file_end_D[document_S] - (end_S - start_S), stop_S - start_S, document_S, piece_S)


def joined_stretches(parts: Sequence[Stretches]) -> Stretches:
    """The stretches of several, one after another; the pieces of each are numbered on from those before it."""
    if len(parts) == 1:
        return parts[0]
    numbered, pieces = [], 0
    for part in parts:
        numbered.append(part._replace(piece_S=part.piece_S + pieces))
        pieces += int(part.piece_S[-1]) + 1
    return Stretches(*map(np.concatenate, zip(*numbered, strict=True)))
