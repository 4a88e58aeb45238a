"""The decoding state of a layer, and how it is copied."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from numbers import Number
from types import NoneType
from typing import Any

import torch
from torch import Tensor

#: what a state may hold beside tensors and what holds them: nothing of it can be changed
_CONSTANTS = (Number, str, bytes, NoneType, Enum, torch.dtype, torch.device, torch.Size)
_HOLDERS = (dict, list, tuple)


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
        tensors of one row, None and, in lists, tuples, dicts and States, more of these, unless its class overrides
        this, with `put` and `take`."""
        if type(self).__init__ is not dict.__init__ or vars(self):
            return None
        try:
            return type(self)({key: _room(value, rows, tokens) for key, value in self.items()})
        except _Moves:
            return None

    def put(self, row: int, own: State) -> None:
        """Write the state of one sequence into a row of a fixed one."""
        for room, part in _side_by_side(self, own):
            room.put(row, part) if isinstance(room, State) else room[row].copy_(part[0])

    def take(self, row: int, own: State) -> None:
        """Bring the state of a sequence, which was put there, up to date with its row of a fixed one."""
        for room, part in _side_by_side(self, own):
            room.take(row, part) if isinstance(room, State) else part[0].copy_(room[row])

    def move(self, row: int, to: int) -> None:
        """Copy a row of a fixed state into another."""
        for room, _ in _side_by_side(self, self):
            room.move(row, to) if isinstance(room, State) else room[to].copy_(room[row])

    def first(self, rows: int) -> State:
        """So many rows of a fixed state, in its memory."""
        part = copy.copy(self)
        part.update({key: _first(value, rows) for key, value in self.items()})
        return part


class _Moves(Exception):
    """Something in a state that cannot be kept at one address."""


def _room(value: Any, rows: int, tokens: int) -> Any:
    room: Any = value.fixed(rows, tokens) if isinstance(value, State) else None
    if isinstance(value, Tensor) and value.ndim and len(value) == 1:
        room = value.new_zeros(rows, *value.shape[1:])
    elif type(value) in _HOLDERS:
        room = _each(value, lambda inner: _room(inner, rows, tokens))
    if room is None and value is not None:
        raise _Moves
    return room


def _first(value: Any, rows: int) -> Any:
    if isinstance(value, State):
        return value.first(rows)
    return value[:rows] if isinstance(value, Tensor) else _each(value, lambda inner: _first(inner, rows))


def _each(held: Any, do: Callable[[Any], Any]) -> Any:
    """What a dict, a list or a tuple holds, in one of its kind."""
    if isinstance(held, dict):
        return {key: do(value) for key, value in held.items()}
    return None if held is None else type(held)(map(do, held))


def _side_by_side(room: Any, own: Any) -> Iterator[tuple[Any, Any]]:
    """The tensors and States that a fixed state holds, each with what a state has in its place."""
    for key in room if isinstance(room, dict) else range(len(room)):
        inner = room[key]
        if isinstance(inner, Tensor | State):
            yield inner, own[key]
        elif inner is not None:
            yield from _side_by_side(inner, own[key])


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
