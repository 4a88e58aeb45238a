"""Checkpoints: `checkpoints/step-N/`, renamed into place when complete, verified before they are resumed.

    model*.safetensors  optimizer*.safetensors  index.json    see `saved`
    state.pt         the optimizer's groups and options, the random state of each rank
    progress.json    how far the run was
    plugins.json     the packages that the model's components came with, and their versions
    complete.json    the SHA-256 of each of these

Earlier ones have model.safetensors and optimizer.pt, of one process, and are read as well. `saving` writes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tryplicity.components import Parallelism
from tryplicity.errors import UserError
from tryplicity.files import whole_file
from tryplicity.model import Model
from tryplicity.spec import Spec
from tryplicity.spec.made_with import differing
from tryplicity.training.process import say
from tryplicity.training.saved import SavedTensors, in_memory, indexed, saved_weights
from tryplicity.training.storage import fill
from tryplicity.world import World

ALONE = World()

PLUGINS = "plugins.json"
#: what a full or failing disk raises from Python, safetensors and torch
WRITE_ERRORS = (OSError, SafetensorError, RuntimeError)


@dataclass
class TrainingProgress:
    """How far a run is; with the weights, the optimizer and the random state, all that resuming needs."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0  # of training: steps, and what is done between them
    phase: int = 0  # the training phase of the last step
    phase_step: int = 0  # steps done in it
    sleeps: int = 0  # sleep phases done
    slept_at: int = -1  # the step after which the last sleep was
    positions: dict[str, dict[str, Any]] = field(default_factory=dict)  # what was delivered, by data and stream
    brain: dict[str, Any] = field(default_factory=dict)  # states of brain modules
    identity: str = ""  # of the spec's architecture
    data: str = ""  # of the prepared data
    seed: int = 0
    threads: int = 0  # of the last step; 0: none yet


def save_weights(model: Model, path: Path, weights: Mapping[str, torch.Tensor] | None = None) -> None:
    """The weights and buffers as safetensors, whole or not at all. weights: those of the model, by default."""
    tensors = weights or {name: t.detach().contiguous().cpu() for name, t in model.state_dict().items()}
    with whole_file(path) as temporary:
        save_file(dict(tensors), temporary, metadata={"format": "pt", "identity": model.spec.identity()})
        _in_order(temporary)


def _in_order(path: Path) -> None:
    """safetensors writes the metadata in an order that differs from process to process; equal weights are to be equal
    files. (The format: eight bytes of length, then JSON, filled up with spaces.)"""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:
            file.seek(8)
            file.write(text.ljust(size))


def load_weights(model: Model, path: Path) -> None:
    """Raises UserError when the file is damaged or holds other tensors than the model."""
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: cannot be read as safetensors: {error}") from None
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        detail = " ".join(str(error).split())[:300]
        raise UserError(f"{path}: these weights belong to another spec: {detail}") from None


@dataclass(frozen=True)
class Options:
    """What a spec says of the optimizer: its kind, and each group's options (learning rate, decay, ...) as built."""

    kind: str
    groups: list[dict[str, Any]]

    @classmethod
    def of(cls, kind: str, optimizer: torch.optim.Optimizer) -> Options:
        return cls(kind, [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups])


def steps(folder: Path) -> list[int]:
    """The steps that have a checkpoint, oldest first."""
    found = [p.name.removeprefix("step-") for p in folder.glob("step-*") if p.is_dir()]
    return sorted(int(name) for name in found if name.isdigit())


def to_keep(found: Sequence[int], keep: int, every: int) -> set[int]:
    """Of the steps that have a checkpoint, oldest first: the newest `keep` of those at multiples of `every`, and one in
    between while it is the newest: so the regular ones are the same whether a run was interrupted or not."""
    return {*[step for step in found if step % every == 0][-keep:], *found[-1:]}


def digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damage(checkpoint: Path, world: World = ALONE) -> str | None:
    """What is wrong with a checkpoint's files, or None. The ranks share the reading and come to the same."""
    try:
        digests: dict[str, str] = json.loads((checkpoint / "complete.json").read_text())
        mine = sorted(digests.items())[world.rank::world.size]
    except (OSError, ValueError, AttributeError):
        mine = None
    faults = world.gathered("complete.json is missing or unreadable" if mine is None else _differing(checkpoint, mine))
    return next((fault for fault in faults if fault), None)


def _differing(checkpoint: Path, digests: Iterable[tuple[str, str]]) -> str | None:
    for name, digest in digests:
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
        try:
            if digest_of(checkpoint / name) != digest:
                return f"{name} is not as it was written"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None


def newest(folder: Path, world: World = ALONE) -> Path | None:
    """The newest complete checkpoint; damaged ones are named on stderr and passed over. None where there is none at
    all. Raises UserError when all are damaged: to begin anew would write over what may be saved."""
    faults = {}
    for step in world.first(steps(folder))[::-1]:
        checkpoint = folder / f"step-{step}"
        fault = damage(checkpoint, world)
        if fault is None:
            for passed, why in faults.items() if world.first_rank else ():
                say(f"warning: {folder / passed} is incomplete ({why}); going back to the one before it")
            return checkpoint
        faults[checkpoint.name] = fault
    if faults:
        which = "; ".join(f"{name}: {fault}" for name, fault in faults.items())
        raise UserError(f"{folder}: no checkpoint can be gone on from ({which}), and nothing is begun anew over them; "
                        "put a good copy there, or give another --run")
    return None


def read_progress(checkpoint: Path) -> TrainingProgress:
    """Raises UserError when it was written by a version that kept other things."""
    said = json.loads((checkpoint / "progress.json").read_text())
    if said.keys() != {field.name for field in fields(TrainingProgress)}:
        raise UserError(f"{checkpoint}: written by another version of tryplicity; go on with that one, or begin anew")
    return TrainingProgress(**said)


def load(checkpoint: Path, strategy: Parallelism, model: Model, optimizer: torch.optim.Optimizer, options: Options,
         world: World = ALONE) -> TrainingProgress:
    """Put the weights, the optimizer and the random state back as they were, whatever strategy and world wrote them.

    options: those that the optimizer was built with now. Where they are others than the checkpoint's they hold, and
    all else in its groups is the checkpoint's. Raises UserError for an optimizer that its state does not fit.
    """
    if world.first_rank:
        _say_what_differs(checkpoint, model.spec)
    weights = saved_weights(checkpoint)
    state = strategy.state(model, optimizer)
    _check_fits(weights, state["model"])
    moments, plain = _saved_optimizer(checkpoint, state["optimizer"]["groups"])
    before = plain.get("options") or {"kind": options.kind, "groups": [{} for _ in options.groups]}
    if before["kind"] != options.kind:
        raise UserError(f"{checkpoint}: training.optimizer: this run was begun with {before['kind']}, whose state is "
                        f"of no use to {options.kind}; give {before['kind']}, or another --run")
    try:
        room = _room(moments, model)
        fill({f"model.{name}": tensor for name, tensor in state["model"].items()}
             | {f"optimizer.{parameter}.{name}": tensor for parameter, own in room.items()
                for name, tensor in own.items()}, {"model": weights, "optimizer": moments}, world)
        for parameter, own in plain["others"].items():
            room.setdefault(parameter, {}).update(own)
        strategy.load(model, optimizer, {"model": state["model"],
                                         "optimizer": {"state": room, "groups": plain["groups"]}})
    except ValueError as error:
        raise UserError(f"{checkpoint}: training.optimizer: the saved state does not fit these options: {error}; "
                        "give those it was begun with, or another --run") from None
    for group, was, now in zip(optimizer.param_groups, before["groups"], options.groups, strict=True):
        group.update({key: value for key, value in now.items() if key not in was or was[key] != value})
    progress = read_progress(checkpoint)
    _set_random(plain["random"], progress, world)
    return progress


def _say_what_differs(checkpoint: Path, spec: Spec) -> None:
    """Another version of a plugin may read its own weights and state otherwise; a checkpoint of before says none."""
    if (checkpoint / PLUGINS).is_file():
        for line in differing(json.loads((checkpoint / PLUGINS).read_text()), spec):
            say(f"warning: {checkpoint} was saved with {line}")


def _check_fits(weights: SavedTensors, own: Mapping[str, torch.Tensor]) -> None:
    wrong = [f"{name} is missing" for name in own if name not in weights.names]
    wrong += [f"there is no {name} in it" for name in sorted(weights.names - own.keys())]
    wrong += [f"{name} is {weights.shape(name)} and not {list(tensor.shape)}" for name, tensor in own.items()
              if name in weights.names and weights.shape(name) != list(tensor.shape)]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"{weights.path}: these weights belong to another spec: {'; '.join(wrong[:3])}{more}")


def _saved_optimizer(checkpoint: Path, groups: list[dict[str, Any]]) -> tuple[SavedTensors, dict[str, Any]]:
    """Its tensors by "PARAMETER.NAME", and what else is saved. groups: as the optimizer has them now, for a checkpoint
    that goes by their order. Raises ValueError where that has more of them."""
    old = checkpoint / "optimizer.pt"
    if not old.is_file():
        return indexed(checkpoint, "optimizer"), torch.load(checkpoint / "state.pt", weights_only=True)
    plain: dict[str, Any] = torch.load(old, weights_only=True, mmap=True)
    state, said = plain["optimizer"]["state"], plain["optimizer"]["param_groups"]
    numbers = [number for group in said for number in group["params"]]
    names = dict(zip(numbers, (name for group in groups for name in group["params"]), strict=False))
    own = [(f"{names.get(i, i)}.{name}", value) for i, values in state.items() for name, value in values.items()]
    tensors = [(name, value) for name, value in own if isinstance(value, torch.Tensor)]
    others: dict[str, dict[str, Any]] = {}
    for i, values in state.items():
        rest = {name: value for name, value in values.items() if not isinstance(value, torch.Tensor)}
        if rest:
            others[names.get(i, str(i))] = rest
    named = [{**group, "params": [names.get(i, str(i)) for i in group["params"]]} for group in said]
    return in_memory(checkpoint, tensors), {**plain, "others": others, "groups": named, "random": [plain["random"]]}


def _room(moments: SavedTensors, model: Model) -> dict[str, dict[str, torch.Tensor]]:
    """Tensors to fill, laid out as their parameters are. Raises ValueError for one of an unknown parameter."""
    parameters, room = dict(model.named_parameters()), {}
    for key in sorted(moments.names):
        parameter, _, name = key.rpartition(".")
        if parameter not in parameters:
            raise ValueError(f"there is no parameter {parameter}")
        entry, like = moments.entries[key], parameters[parameter].detach()
        alike = entry.shape == tuple(like.shape) and like.ndim > 0
        room.setdefault(parameter, {})[name] = (torch.zeros_like(like, dtype=entry.dtype) if alike else
                                                torch.zeros(entry.shape, dtype=entry.dtype))
    return room


def random_state() -> dict[str, Any]:
    """Of this process."""
    random: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random["cuda"] = [torch.cuda.get_rng_state()]
    return random


def _set_random(saved: list[dict[str, Any]], progress: TrainingProgress, world: World) -> None:
    """This rank's as it was; a rank that is new draws numbers of its own."""
    if world.rank >= len(saved):
        torch.manual_seed((progress.seed * 1_000_003 + progress.step) * 65_537 + world.rank)
        return
    own = saved[world.rank]
    torch.set_rng_state(own["cpu"])
    if torch.cuda.is_available() and "cuda" in own:
        torch.cuda.set_rng_state(own["cuda"][0])
