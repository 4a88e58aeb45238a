"""The decoding state of a layer, and how it is copied."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping
from enum import Enum
from numbers import Number
from types import NoneType
from typing import Any

import torch
from torch import Tensor

#: what a state may hold beside tensors and what holds them: nothing of it can be changed
_CONSTANTS = (Number, str, bytes, NoneType, Enum, torch.dtype, torch.device, torch.Size)


class State(dict):
    """The decoding state of one layer: named tensors, batch first, and numbers; in lists, tuples, dicts and further
    States to any depth, as a layer has it that is made of others. Updated in place."""

    def clone(self) -> State:
        """A copy that goes its own way, all the way down; what neither will write again may be shared. Tensors that
        share memory in one share it in the other. Raises TypeError naming what cannot be copied."""
        return _Copying(self).state(self, "state")

    # A step of decoding that is captured once and then replayed finds all it works on at the same addresses. What
    # `fixed` gives is such a state: a layer gets it with one new token a row, no documents and no gradients, and
    # writes into its tensors, never others in their places.

    def fixed(self, rows: int, tokens: int) -> State | None:
        """Of the state of one sequence: room for `rows` of its kind, of up to `tokens` tokens each, in tensors alone,
        batch first, that keep shape and address. None: there is none. So it is with a state that holds more than
        tensors of one row, unless its class overrides this, with `put` and `take`."""
        room = type(self)() if type(self).__init__ is dict.__init__ and not vars(self) else None
        if room is None:
            return None
        for key, value in self.items():
            if isinstance(value, State):
                room[key] = value.fixed(rows, tokens)
            else:
                one_row = isinstance(value, Tensor) and value.ndim and len(value) == 1
                room[key] = value.new_zeros(rows, *value.shape[1:]) if one_row else None
            if room[key] is None:
                return None
        return room

    def put(self, row: int, own: State) -> None:
        """Write the state of one sequence into a row of a fixed one."""
        for key, value in self.items():
            value.put(row, own[key]) if isinstance(value, State) else value[row].copy_(own[key][0])

    def take(self, row: int, own: State) -> None:
        """Bring the state of a sequence, which was put there, up to date with its row of a fixed one."""
        for key, value in self.items():
            value.take(row, own[key]) if isinstance(value, State) else own[key][0].copy_(value[row])

    def move(self, row: int, to: int) -> None:
        """Copy a row of a fixed state into another."""
        for value in self.values():
            value.move(row, to) if isinstance(value, State) else value[to].copy_(value[row])

    def first(self, rows: int) -> State:
        """So many rows of a fixed state, in its memory."""
        part = copy.copy(self)
        part.update({key: value.first(rows) if isinstance(value, State) else value[:rows]
                     for key, value in self.items()})
        return part


class Rows(tuple):
    """One decoding state for each row of a batch, whose sequences are of different lengths."""


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor inside nested states (their attributes too), mappings, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in (*value.values(), *vars(value).values()) if isinstance(value, State) else value.values():
            yield from tensors(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from tensors(inner)


class _Copying:
    """One copying of a state: what is there twice is there twice in the copy."""

    def __init__(self, state: State) -> None:
        distinct = {id(tensor): tensor for tensor in tensors(state)}
        self.uses = Counter(tensor.untyped_storage()._cdata for tensor in distinct.values())
        self.done: dict[int, Tensor] = {}
        self.memory: dict[int, Any] = {}

    def state(self, value: State, where: str) -> State:
        twin = copy.copy(value)  # of its class, with whatever its constructor wants
        twin.update({key: self.value(inner, f"{where}[{key!r}]") for key, inner in value.items()})
        vars(twin).update({key: self.value(inner, f"{where}.{key}") for key, inner in vars(value).items()})
        return twin

    def value(self, value: Any, where: str) -> Any:
        if isinstance(value, Tensor):
            return self.tensor(value)
        if isinstance(value, State):
            return self.state(value, where) if type(value).clone is State.clone else value.clone()
        if isinstance(value, _CONSTANTS):
            return value
        if type(value) is dict:
            return {key: self.value(inner, f"{where}[{key!r}]") for key, inner in value.items()}
        if type(value) in (list, tuple, Rows) or (isinstance(value, tuple) and hasattr(value, "_fields")):
            parts = [self.value(inner, f"{where}[{i}]") for i, inner in enumerate(value)]
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        raise TypeError(f"{where} is a {type(value).__name__}, which cannot be copied with the state; hold tensors and "
                        "numbers, in States, dicts, lists or tuples")

    def tensor(self, value: Tensor) -> Tensor:
        if id(value) not in self.done:
            self.done[id(value)] = self._tensor(value)
        return self.done[id(value)]

    def _tensor(self, value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if self.uses[storage._cdata] == 1:
            return value.clone()
        if storage._cdata not in self.memory:
            self.memory[storage._cdata] = storage.clone()
        return value.detach().new_empty(0).set_(self.memory[storage._cdata], value.storage_offset(), value.shape,
                                                value.stride())
