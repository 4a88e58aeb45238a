"""A training that starts from trained weights: what has the same name and shape is taken, the rest is initialised."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tryplicity.components import Layer, Parallelism
from tryplicity.errors import UserError
from tryplicity.files import write_text
from tryplicity.guard import broken, guarded
from tryplicity.model import Model
from tryplicity.run import Run
from tryplicity.training import checkpoint
from tryplicity.training.saved import Entry, Piece, SavedTensors, open_files, saved_weights
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
    converted: tuple[str, ...] = ()  # made by layers of what others had in their place: `Layer.converted`

    def as_dict(self) -> dict[str, Any]:
        return {"from": self.place, "parameters_taken": self.parameters,
                **{what: grouped(getattr(self, what)) for what in ("taken", "converted", "initialised", "unused")}}

    def sentences(self) -> list[str]:
        """For people."""
        total = len(self.taken) + len(self.converted) + len(self.initialised)
        said = [f"from {self.place}: {len(self.taken)} of {total} tensors taken, {self.parameters:,} numbers"]
        for what, names in (("made from the layers that stood there", self.converted),
                            ("initialised", self.initialised), ("not used", self.unused)):
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
    place = _kept(run).get("from")
    return None if place is None else str(place)


def scored_before(run: Run) -> tuple[int, dict[str, float]]:
    """Of a run that was begun from trained weights: how many held-out rows were scored before the first step, and
    what they gave, by name; nothing where nothing was."""
    rows, scores = _kept(run).get("held_out_rows"), _kept(run).get("before")
    return (rows, scores) if isinstance(rows, int) and isinstance(scores, dict) else (0, {})


def keep(run: Run, taken: Taken, rows: int = 0, scores: Mapping[str, float] | None = None) -> None:
    """In the run folder, for whoever reads it, and for the end of the training."""
    said = taken.as_dict() | ({"held_out_rows": rows, "before": scores} if scores else {})
    write_text(run.folder / STARTED_FROM, json.dumps(said, indent=1))


def _kept(run: Run) -> dict[str, Any]:
    try:
        said = json.loads((run.folder / STARTED_FROM).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}


def _with(place: Path, weights: SavedTensors, tokenizer: Path) -> Start:
    if not tokenizer.is_file():
        raise UserError(f"--from {place}: there is no {tokenizer}: weights are of use with their own tokenizer alone")
    return Start(place, weights, tokenizer)


def take(start: Start, model: Model, strategy: Parallelism, optimizer: torch.optim.Optimizer, world: World) -> Taken:
    """Put what fits into a model that is placed and initialised, and what its layers make of others; called on all
    ranks alike. Raises UserError where nothing does, or a layer cannot be made of what stood there."""
    own: Mapping[str, Tensor] = strategy.state(model, optimizer)["model"]
    saved = start.weights
    fits = [name for name, tensor in own.items() if name in saved.names
            and saved.shape(name) == list(tensor.shape) and tensor.is_floating_point()
            and saved.entries[name].dtype.is_floating_point]
    made, of = _converted(start, model, own, set(fits))
    if not fits and not made:
        raise UserError(f"--from {start.place}: none of its tensors has the name and the shape of one of this spec's")
    entries = {name: saved.entries[name] for name in fits} | made
    fill({f"model.{name}": own[name] for name in own if name in entries},
         {"model": SavedTensors(saved.path, entries)}, world)
    parameters = sum(torch.Size(saved.shape(name)).numel() for name in fits)
    return Taken(str(start.place.absolute()), tuple(fits), tuple(name for name in own if name not in entries),
                 tuple(sorted(saved.names - set(fits) - of)), parameters, tuple(made))


def _converted(start: Start, model: Model, own: Mapping[str, Tensor],
               fits: set[str]) -> tuple[dict[str, Entry], set[str]]:
    """What layers make of those that stood in their place, where not all of their tensors fit, each read when it is
    asked for; and the names of what it is made of."""
    saved, made, of = start.weights, {}, set()

    @lru_cache(maxsize=1)
    def whole(prefix: str, layer: Layer) -> Mapping[str, Tensor]:
        return call(prefix, layer, {name: saved[prefix + name] for name in there(prefix)})

    def there(prefix: str) -> list[str]:
        return [name.removeprefix(prefix) for name in sorted(saved.names) if name.startswith(prefix)]

    def call(prefix: str, layer: Layer, given: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        generator = torch.Generator().manual_seed(model.spec.training.seed + zlib.crc32(prefix.encode()))
        try:
            with guarded(layer):
                return layer.converted(given, generator)
        except UserError as error:
            raise UserError(f"--from {start.place}: {prefix.removesuffix('.layer.')}: {error}") from None

    for i, block in enumerate(model.layers):
        for role, part in block.sublayers.items():
            prefix, layer = f"layers.{i}.{role}.layer.", part.layer
            mine = [name for name in own if name.startswith(prefix)]
            if fits.issuperset(mine) or not (found := there(prefix)):
                continue
            given = {name: torch.empty(saved.shape(prefix + name), dtype=saved.entries[prefix + name].dtype,
                                       device="meta") for name in found}
            for name, tensor in call(prefix, layer, given).items():
                wanted = own.get(prefix + name)
                if wanted is None or wanted.shape != tensor.shape:
                    due = "which it has not" if wanted is None else f"and it is {list(wanted.shape)}"
                    raise broken(layer, f"converted gave {name} {list(tensor.shape)}, {due}")
                if prefix + name not in fits:
                    shape = tuple(tensor.shape)
                    made[prefix + name] = Entry(tensor.dtype, shape, (Piece(
                        (0,) * len(shape), shape, lambda p=prefix, own=layer, n=name: whole(p, own)[n]),))
                    of |= {prefix + one for one in found}
    return made, of
