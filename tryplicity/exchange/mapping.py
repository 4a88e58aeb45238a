"""Foreign tensors as ours and back, by an architecture's table: everything accounted for before anything is read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tryplicity.components import Architecture, Piece
from tryplicity.errors import PluginFault, UserError
from tryplicity.model import Model
from tryplicity.training.saved import Entry, SavedTensors
from tryplicity.training.saved import Piece as Stretch


def table(architecture: type[Architecture], config: Mapping[str, Any]) -> dict[str, list[Piece]]:
    """The pieces of each of our tensors, in the architecture's order."""
    found: dict[str, list[Piece]] = {}
    for piece in architecture.tensors(config):
        found.setdefault(piece.ours, []).append(piece)
    return found


def as_ours(foreign: SavedTensors, architecture: type[Architecture], config: Mapping[str, Any],
            model: Model) -> dict[str, Entry]:
    """Our tensors, each read when it is asked for. Raises UserError where one is missing, has another shape, or is not
    in the table; PluginFault where the table does not fill the model."""
    shapes = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items()}
    pieces = table(architecture, config)
    if strange := sorted(set(pieces) - set(shapes)):
        raise PluginFault(f"architecture {architecture.name}: its table has {strange[0]}, which the spec it gives does "
                          "not have; mend it")
    parameters = {name for name, _ in model.named_parameters()}
    if unfilled := sorted(parameters - set(pieces)):
        raise PluginFault(f"architecture {architecture.name}: its table has nothing for {unfilled[0]}, which the spec "
                          "it gives has; mend it")
    entries = {name: _entry(foreign, architecture, name, own, shapes[name]) for name, own in pieces.items()}
    said = {piece.foreign for own in pieces.values() for piece in own}
    for name in sorted(foreign.names - said):
        if not (any(re.fullmatch(pattern, name) for pattern in architecture.ignored)
                or _copies(foreign, name, pieces["embedding.weight"][0].foreign)):
            raise UserError(f"{foreign.path}: {name} has no place in a model of type {architecture.name} with this "
                            "config.json; the files may belong to another model")
    return entries


def _copies(foreign: SavedTensors, name: str, embedding: str) -> bool:
    """Whether it is the embedding table once more, as some write the output matrix that is tied to it."""
    one, other = foreign.entries[name], foreign.entries[embedding]
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(foreign[name], foreign[embedding])


def _entry(foreign: SavedTensors, architecture: type[Architecture], name: str, pieces: list[Piece],
           like: Tensor) -> Entry:
    covered, dtypes = 0, {}
    for piece in pieces:
        if piece.foreign not in foreign.names:
            raise UserError(f"{foreign.path}: {piece.foreign} is missing; its files are incomplete, or belong to "
                            "another config.json")
        given = foreign.entries[piece.foreign]
        wanted = like.to("meta")[piece.at]
        due = list(piece.form.theirs(wanted).shape)
        if list(given.shape) != due:
            raise UserError(f"{foreign.path}: {piece.foreign} is {list(given.shape)}, and by its config.json it must "
                            f"be {due}; the files may belong to another model")
        covered += wanted.numel()
        dtypes.setdefault(given.dtype, piece.foreign)
    if covered != like.numel():
        raise PluginFault(f"architecture {architecture.name}: its table fills {covered:,} of the {like.numel():,} "
                          f"numbers of {name}; mend it")
    if len(dtypes) > 1:
        first, second = list(dtypes)[:2]
        raise UserError(f"{foreign.path}: {dtypes[first]} is {first} and {dtypes[second]} is {second}, and here they "
                        "are parts of one tensor; save the model in one dtype")
    dtype = next(iter(dtypes))
    if not dtype.is_floating_point:
        raise UserError(f"{foreign.path}: {pieces[0].foreign} is {dtype}, quantised in a way that is not read here; "
                        "give the model in bf16 or fp32")

    def read() -> Tensor:
        if len(pieces) == 1 and pieces[0].at is ...:
            return pieces[0].form.ours(foreign[pieces[0].foreign]).contiguous()
        whole = torch.empty(like.shape, dtype=dtype)
        for piece in pieces:
            whole[piece.at] = piece.form.ours(foreign[piece.foreign])
        return whole

    shape = tuple(like.shape)
    return Entry(dtype, shape, (Stretch((0,) * len(shape), shape, read),))


def as_theirs(ours: SavedTensors, architecture: type[Architecture], config: Mapping[str, Any]) -> dict[str, Entry]:
    """Foreign tensors by their names, each made when it is asked for. Raises UserError where ours are not all there."""
    return {piece.foreign: _back(ours, piece) for own in table(architecture, config).values() for piece in own
            if _there(ours, piece)}


def _there(ours: SavedTensors, piece: Piece) -> bool:
    if piece.ours not in ours.names:
        raise UserError(f"{ours.path}: {piece.ours} is missing; these weights belong to another spec")
    return True


def _back(ours: SavedTensors, piece: Piece) -> Entry:
    entry = ours.entries[piece.ours]
    like = torch.empty(entry.shape, device="meta")
    shape = tuple(piece.form.theirs(like[piece.at]).shape)
    return Entry(entry.dtype, shape, (Stretch((0,) * len(shape), shape, lambda: piece.form.theirs(
        ours[piece.ours][piece.at]).contiguous()),))


