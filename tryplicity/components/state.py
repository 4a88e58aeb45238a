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
