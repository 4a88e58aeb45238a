"""Decoding states kept to go on from: of two prompts that begin alike, the second reads only what is new.

A state-space layer cannot go back to an earlier token, so that whole states are kept, each of all tokens read so far.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

from tryplicity.components import State, tensors


def clone(state: list) -> list:
    """A copy, which goes its own way, of what `Model.new_state` gave: layers, each a list over sub-layers."""
    return [[None if own is None else own.clone() for own in layer] for layer in state]


@dataclass
class Snapshot:
    """A state, the tokens it has read and, where they are known, the logits and hidden state of the last of them."""

    ids: np.ndarray
    state: list[list[State | None]]
    last: tuple[Tensor, Tensor] | None  # logits_V, h_D


class Found(NamedTuple):
    """What there is to go on from."""

    read: int  # tokens the state has read
    state: list | None
    last: tuple[Tensor, Tensor] | None  # logits_V, h_D where all have been read
    shared: int  # tokens in common with whatever was kept


class Prefixes:
    """Snapshots by their tokens, the least recently used dropped when they hold more than `most_bytes` or are more
    than `most`, which is what a search looks through.

    Memory that several share, as clones share full pages of an attention cache, is counted once.
    """

    def __init__(self, most_bytes: int, most: int = 512) -> None:
        self.most_bytes, self.most = most_bytes, most
        self.bytes = 0
        self._kept: OrderedDict[bytes, Snapshot] = OrderedDict()
        self._uses: Counter[int] = Counter()  # of each block of memory, by its address

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, ids: Sequence[int], state: list, last: tuple[Tensor, Tensor] | None = None) -> None:
        """Keep a state, which from now on must not be written to, as that after `ids`."""
        key = np.asarray(ids, dtype=np.int64)
        old = self._kept.get(key.tobytes())
        if old is not None:
            if last is None and old.last is not None:  # what is there already is worth more
                self._kept.move_to_end(key.tobytes())
                return
            self._drop(key.tobytes())
        snapshot = Snapshot(key, state, last)
        self._kept[key.tobytes()] = snapshot
        self._count(snapshot, +1)
        while self.bytes > self.most_bytes or len(self._kept) > self.most:
            self._drop(next(iter(self._kept)))

    def find(self, ids: Sequence[int]) -> Found:
        """The snapshot that has read most of `ids`, as a state of one's own. One that has read all of them serves only
        when what came last is known too."""
        wanted = np.asarray(ids, dtype=np.int64)
        best, shared = None, 0
        for key, snapshot in self._kept.items():
            size = min(len(snapshot.ids), len(wanted))
            unlike = (snapshot.ids[:size] != wanted[:size]).argmax() if size else 0
            common = size if size == 0 or snapshot.ids[unlike] == wanted[unlike] else int(unlike)
            shared = max(shared, common)
            if (common == len(snapshot.ids) and (common < len(wanted) or snapshot.last is not None)
                    and (best is None or common > best[0])):
                best = common, key
        if best is None:
            return Found(0, None, None, shared)
        read, key = best
        self._kept.move_to_end(key)
        snapshot = self._kept[key]
        return Found(read, clone(snapshot.state), snapshot.last if read == len(wanted) else None, shared)

    def clear(self) -> None:
        self._kept.clear()
        self._uses.clear()
        self.bytes = 0

    def _drop(self, key: bytes) -> None:
        self._count(self._kept.pop(key), -1)

    def _count(self, snapshot: Snapshot, step: int) -> None:
        blocks = {}
        for tensor in tensors([snapshot.state, snapshot.last or ()]):
            storage = tensor.untyped_storage()
            blocks[storage.data_ptr()] = storage.nbytes()
        for address, size in blocks.items():
            before = self._uses[address]
            self._uses[address] = before + step
            if before == 0 or before + step == 0:
                self.bytes += size * step
            if before + step == 0:
                del self._uses[address]
