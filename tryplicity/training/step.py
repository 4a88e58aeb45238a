"""One optimizer step, top to bottom.

Shapes: B sequences of the whole step, T time.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tryplicity.components import IGNORE, Mean, Parallelism
from tryplicity.model import NEXT_TOKEN, Losses, Model
from tryplicity.world import World

ALONE, ONE = World(), Parallelism()  # this process alone, and how a model lies there


@dataclass
class StepResult:
    """Sums over the whole batch; tensors, not yet read by the host."""

    objectives: dict[str, Mean] = field(default_factory=dict)
    auxiliary: dict[str, Tensor] = field(default_factory=dict)  # weighted, by name, over all layers
    stats: dict[str, Mean] = field(default_factory=dict)
    nll: list[Tensor] = field(default_factory=list)  # nats of each next token, [rows, T], part by part; this rank's
    nats: Tensor | None = None  # the sum of all ranks'
    gradient_norm: Tensor | None = None

    def add(self, losses: Losses, share: float) -> None:
        """share: of the whole batch's rows; 0 for a row of nothing, of which the names alone count."""
        def own(value: Any) -> Any:
            return value if share else value * 0 if not isinstance(value, Tensor) else torch.zeros_like(value)

        for name, mean in losses.objectives.items():
            _add(self.objectives, name, Mean(own(mean.total.detach()), own(mean.count)))
        for path, loss in losses.report.losses.items():
            _add(self.auxiliary, path.rpartition(".")[2], own(loss.detach()) * share)
        for path, stat in losses.report.stats.items():
            _add(self.stats, path, Mean(own(stat.total), own(stat.count)))
        if share:
            self.nll.append(losses.nll_BT)

    def sum_over(self, world: World) -> None:
        """Add up what the ranks have, in one message, but `nll`: that stays each rank's own."""
        self.nats = torch.stack([nll.sum() for nll in self.nll]).sum() if self.nll else torch.zeros(
            (), device=world.device)
        if world.size == 1:
            return
        stats, losses = sorted(self.stats.items()), sorted(self.auxiliary.items())
        parts = [part for _, mean in (*self.objectives.items(), *stats) for part in mean]
        parts = [part if isinstance(part, Tensor) else torch.tensor(float(part), device=world.device) for part in parts]
        self.nats, *found = world.total([self.nats, *parts, *(loss for _, loss in losses)])
        rest = iter(found)
        self.objectives = {name: Mean(next(rest), next(rest)) for name in self.objectives}
        self.stats = {name: Mean(next(rest), next(rest)) for name, _ in stats}
        self.auxiliary = {name: next(rest) for name, _ in losses}

    @property
    def loss(self) -> Mean:
        """The next token's, unweighted: what is compared between runs."""
        return Mean(self.nats, self.objectives[NEXT_TOKEN].count)


def _add(sums: dict[str, Any], name: str, value: Any) -> None:
    sums[name] = sums[name] + value if name in sums else value


def autocast(device_type: str, precision: str) -> Any:
    """bf16 autocast without its weight cache (which would keep a bf16 copy of every weight), or nothing."""
    if precision == "bf16":
        return torch.autocast(device_type, torch.bfloat16, cache_enabled=False)
    return nullcontext()


def on_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on the device."""
    return batch._replace(**{name: value.to(device, non_blocking=True) for name, value in batch._asdict().items()
                             if isinstance(value, Tensor)})


def forward_backward(model: Model, batch: Any, micro_batch: int, precision: str,
                     strategy: Parallelism = ONE, world: World = ALONE) -> StepResult:
    """Forward and backward over this rank's rows of a batch, `micro_batch` sequences at a time; gradients and sums are
    of the mean loss of the whole batch, all ranks' rows, however it is cut.

    Each objective is divided by its number of valid targets in the whole batch, which is known from the data
    before the first forward pass; each auxiliary loss, a mean over sequences, counts by its share of them. A rank that
    has fewer rows than another makes as many passes: the missing ones with a row of nothing, which counts for nothing.
    """
    targets = model.targets(batch.ids_BT, batch.targets_BT, batch.doc_ids_BT)
    weights, own = model.weights(), batch.ids_BT.shape[0]
    rows, *counts = world.total([torch.tensor(own, device=batch.ids_BT.device),
                                 *((t != IGNORE).sum() for t in targets.values())])
    scale = {name: weights[name] / count.clamp(min=1) for name, count in zip(targets, counts, strict=True)}
    rows, result = int(rows), StepResult()
    passes = -(-world.most(rows) // micro_batch)
    for number in range(passes):
        part = slice(number * micro_batch, min((number + 1) * micro_batch, own))
        there = max(0, part.stop - part.start)
        if there == 0:
            part = slice(0, 1)
        with strategy.micro_batch(model, last=number == passes - 1):
            with autocast(batch.ids_BT.device.type, precision):
                losses = strategy.forward(
                    model, batch.ids_BT[part], targets={n: t[part] for n, t in targets.items()},
                    doc_ids_BT=None if batch.doc_ids_BT is None else batch.doc_ids_BT[part])
            loss = sum(mean.total * scale[name] for name, mean in losses.objectives.items())
            loss = loss + there / rows * sum(losses.report.losses.values())
            (loss if there else 0.0 * loss).backward()
        result.add(losses, there / rows)
    result.sum_over(world)
    return result


def decay_groups(model: torch.nn.Module) -> tuple[list, list]:
    """Parameters to decay and to leave: vectors, scalars and what a module lists as `undecayed` are left."""
    decayed, undecayed = [], []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            left = parameter.ndim < 2 or name in getattr(module, "undecayed", ())
            (undecayed if left else decayed).append(parameter)
    return decayed, undecayed


def training_step(model: Model, optimizer: torch.optim.Optimizer, strategy: Parallelism, batch: Any, *, step: int,
                  micro_batch: int, precision: str, max_norm: float, learning_rate_factor: float,
                  world: World = ALONE) -> StepResult:
    """One optimizer step. A loss or gradient that is not finite changes nothing: the caller sees it in the result. Nor
    does a batch without a target."""
    for module in model.modules():
        if hasattr(module, "before_step"):
            module.before_step(step)
    result = forward_backward(model, batch, micro_batch, precision, strategy, world)
    result.gradient_norm = strategy.clip_gradients(model, max_norm)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * learning_rate_factor
    if is_finite(result, with_targets=True):
        optimizer.step()
        model.after_step(step, result.stats)
    optimizer.zero_grad(set_to_none=True)
    return result


def is_finite(result: StepResult, with_targets: bool = False) -> bool:
    """Whether the step's loss and gradient are finite, and, if asked, there was a target; where a step waits for the
    device."""
    total, count = result.objectives[NEXT_TOKEN]
    return bool(torch.isfinite(total) & torch.isfinite(result.gradient_norm) & ((count > 0) | (not with_targets)))
