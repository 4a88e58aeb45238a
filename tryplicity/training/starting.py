"""A training that starts from trained weights: what has the same name and shape is taken, the rest is initialised."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tryplicity.components import Parallelism
from tryplicity.errors import UserError
from tryplicity.model import Model
from tryplicity.run import Run
from tryplicity.training import checkpoint
from tryplicity.training.saved import SavedTensors, open_files, saved_weights
from tryplicity.training.storage import fill
from tryplicity.world import World

STARTED_FROM = "from.json"  # in a run folder
MOST_SAID = 6  # groups of names on a page; the run has all


@dataclass(frozen=True)
class Start:
    """What to start from. place: as the user named it."""

    place: Path
    weights: SavedTensors
    tokenizer: Path


@dataclass(frozen=True)
class Taken:
    """What became of the tensors: names in the order of the model; of `unused`, of what was started from."""

    place: str
    taken: tuple[str, ...]
    initialised: tuple[str, ...]
    unused: tuple[str, ...]
    parameters: int  # numbers in what was taken

    def as_dict(self) -> dict[str, Any]:
        return {"from": self.place, "parameters_taken": self.parameters,
                **{what: grouped(getattr(self, what)) for what in ("taken", "initialised", "unused")}}

    def sentences(self) -> list[str]:
        """For people."""
        total = len(self.taken) + len(self.initialised)
        said = [f"from {self.place}: {len(self.taken)} of {total} tensors taken, {self.parameters:,} numbers"]
        for what, names in (("initialised", self.initialised), ("not used", self.unused)):
            if names:
                groups = [f"{group} ({count})" if count > 1 else group for group, count in grouped(names).items()]
                more = f" and {len(groups) - MOST_SAID} more" if len(groups) > MOST_SAID else ""
                said.append(f"{what}: {', '.join(groups[:MOST_SAID])}{more}")
        return said


def grouped(names: Iterable[str]) -> dict[str, int]:
    """How many there are of each, whatever their layer: layers.3.mixer.norm.weight -> layers.*.mixer.norm.weight."""
    found: dict[str, int] = {}
    for name in names:
        group = re.sub(r"\.\d+(?=\.|$)", ".*", name)
        found[group] = found.get(group, 0) + 1
    return found


def opened(place: Path) -> Start:
    """place: a run folder (its weights, or its newest checkpoint where it has not ended), one of its checkpoints, or a
    file of weights with a tokenizer.json beside it. Raises UserError for anything else."""
    run = Run(place)
    if run.exists():
        if run.weights.is_file():
            return _with(place, open_files(place, [run.weights]), run.tokenizer)
        newest = checkpoint.newest(run.checkpoints)
        if newest is None:
            raise UserError(f"--from {place}: the run has neither weights nor a checkpoint yet")
        return _with(place, saved_weights(newest), run.tokenizer)
    if (place / "complete.json").is_file():
        if fault := checkpoint.damage(place):
            raise UserError(f"--from {place}: the checkpoint is damaged ({fault}); take another")
        return _with(place, saved_weights(place), Run(place.absolute().parents[1]).tokenizer)
    if place.is_file():
        return _with(place, open_files(place, [place]), place.with_name("tokenizer.json"))
    raise UserError(f"--from {place}: not a run folder, nor a checkpoint of one, nor a safetensors file")


def begun_from(run: Run) -> str | None:
    """What a run was begun from, if it was begun from trained weights."""
    try:
        return str(json.loads((run.folder / STARTED_FROM).read_text(encoding="utf-8"))["from"])
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _with(place: Path, weights: SavedTensors, tokenizer: Path) -> Start:
    if not tokenizer.is_file():
        raise UserError(f"--from {place}: there is no {tokenizer}: weights are of use with their own tokenizer alone")
    return Start(place, weights, tokenizer)


def take(start: Start, model: Model, strategy: Parallelism, optimizer: torch.optim.Optimizer, world: World) -> Taken:
    """Put what fits into a model that is placed and initialised; called on all ranks alike. Raises UserError where
    nothing does."""
    own: Mapping[str, Tensor] = strategy.state(model, optimizer)["model"]
    saved = start.weights
    fits = [name for name, tensor in own.items() if name in saved.names
            and saved.shape(name) == list(tensor.shape) and tensor.is_floating_point()
            and saved.entries[name].dtype.is_floating_point]
    if not fits:
        raise UserError(f"--from {start.place}: none of its tensors has the name and the shape of one of this spec's")
    fill({f"model.{name}": own[name] for name in fits}, {"model": saved}, world)
    known = set(fits)
    parameters = sum(torch.Size(saved.shape(name)).numel() for name in fits)
    return Taken(str(start.place.absolute()), tuple(fits), tuple(name for name in own if name not in known),
                 tuple(sorted(saved.names - known)), parameters)
