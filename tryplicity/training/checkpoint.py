"""Checkpoints: `checkpoints/step-N/`, renamed into place when complete, verified before they are resumed."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tryplicity.errors import UserError
from tryplicity.files import whole_file, whole_folder
from tryplicity.model import Model
from tryplicity.training.process import say

#: what a full or failing disk raises from Python, safetensors and torch
WRITE_ERRORS = (OSError, SafetensorError, RuntimeError)


@dataclass
class Progress:
    """How far a run is; with the weights, the optimizer and the random state, all that resuming needs."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0  # spent training
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


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_weights(model: Model, path: Path, weights: dict[str, torch.Tensor] | None = None) -> None:
    """The weights and buffers as safetensors, whole or not at all. weights: those of the model, by default."""
    tensors = weights or {name: tensor.detach().contiguous().cpu() for name, tensor in model.state_dict().items()}
    with whole_file(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt", "identity": model.spec.identity()})
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


def save(folder: Path, model: Model, optimizer: torch.optim.Optimizer, options: Options, progress: Progress, keep: int,
         every: int = 1, tensors: tuple[dict[str, torch.Tensor], dict[str, Any]] | None = None) -> Path:
    """Write `folder/step-N`, then drop old ones. Raises one of WRITE_ERRORS; the old ones stay.

    The newest `keep` of those at multiples of `every` stay, and one in between while it is the newest: so the
    regular ones are the same whether a run was interrupted or not.
    """
    target = folder / f"step-{progress.step}"  # one that is there is damaged, or of the moment before a sleep
    random = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random["cuda"] = torch.cuda.get_rng_state_all()
    with whole_folder(target) as temporary:
        weights, held = tensors or (None, optimizer.state_dict())
        save_weights(model, temporary / "model.safetensors", weights)
        torch.save({"optimizer": held, "options": asdict(options), "random": random},
                   temporary / "optimizer.pt")
        (temporary / "progress.json").write_text(json.dumps(asdict(progress), indent=1, sort_keys=True))
        digests = {file.name: _digest(file) for file in sorted(temporary.iterdir())}
        (temporary / "complete.json").write_text(json.dumps(digests, indent=1))
    found = [step for step in steps(folder) if step <= progress.step]  # a later one is damaged: see `newest`
    regular = [step for step in found if step % every == 0]
    for old in set(found) - set(regular[-keep:]) - {found[-1]}:
        shutil.rmtree(folder / f"step-{old}", ignore_errors=True)
    return target


def steps(folder: Path) -> list[int]:
    """The steps that have a checkpoint, oldest first."""
    found = [p.name.removeprefix("step-") for p in folder.glob("step-*") if p.is_dir()]
    return sorted(int(name) for name in found if name.isdigit())


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        digests: dict[str, str] = json.loads((checkpoint / "complete.json").read_text())
    except (OSError, ValueError):
        return "complete.json is missing or unreadable"
    for name, digest in digests.items():
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
        if _digest(checkpoint / name) != digest:
            return f"{name} is not as it was written"
    return None


def newest(folder: Path) -> Path | None:
    """The newest complete checkpoint; damaged ones are named on stderr and passed over. None where there is none at
    all. Raises UserError when all are damaged: to begin anew would write over what may be saved."""
    faults = {}
    for step in reversed(steps(folder)):
        checkpoint = folder / f"step-{step}"
        fault = damage(checkpoint)
        if fault is None:
            for passed, why in faults.items():
                say(f"warning: {folder / passed} is incomplete ({why}); going back to the one before it")
            return checkpoint
        faults[checkpoint.name] = fault
    if faults:
        which = "; ".join(f"{name}: {fault}" for name, fault in faults.items())
        raise UserError(f"{folder}: no checkpoint can be gone on from ({which}), and nothing is begun anew over them; "
                        "put a good copy there, or give another --run")
    return None


def read_progress(checkpoint: Path) -> Progress:
    """Raises UserError when it was written by a version that kept other things."""
    said = json.loads((checkpoint / "progress.json").read_text())
    if said.keys() != {field.name for field in fields(Progress)}:
        raise UserError(f"{checkpoint}: written by another version of tryplicity; go on with that one, or begin anew")
    return Progress(**said)


def load(checkpoint: Path, model: Model, optimizer: torch.optim.Optimizer, options: Options) -> Progress:
    """Put the weights, the optimizer and the random state back as they were.

    options: those that the optimizer was built with now. Where they are others than the checkpoint's they hold, and
    all else in its groups is the checkpoint's. Raises UserError for an optimizer that its state does not fit.
    """
    load_weights(model, checkpoint / "model.safetensors")
    state: dict[str, Any] = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    before = state.get("options") or {"kind": options.kind, "groups": [{} for _ in options.groups]}
    if before["kind"] != options.kind:
        raise UserError(f"{checkpoint}: training.optimizer: this run was begun with {before['kind']}, whose state is "
                        f"of no use to {options.kind}; give {before['kind']}, or another --run")
    try:
        optimizer.load_state_dict(state["optimizer"])
    except ValueError as error:
        raise UserError(f"{checkpoint}: training.optimizer: the saved state does not fit these options: {error}; "
                        "give those it was begun with, or another --run") from None
    for group, was, now in zip(optimizer.param_groups, before["groups"], options.groups, strict=True):
        group.update({key: value for key, value in now.items() if key not in was or was[key] != value})
    torch.set_rng_state(state["random"]["cpu"])
    if torch.cuda.is_available() and "cuda" in state["random"]:
        torch.cuda.set_rng_state_all(state["random"]["cuda"])
    return read_progress(checkpoint)
