"""One optimizer step, top to bottom.

Shapes: B sequences of the whole step, T time.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tryplicity.components import IGNORE, Mean
from tryplicity.model import NEXT_TOKEN, Losses, Model


@dataclass
class StepResult:
    """Sums over the whole batch; tensors, not yet read by the host."""

    objectives: dict[str, Mean] = field(default_factory=dict)
    auxiliary: dict[str, Tensor] = field(default_factory=dict)  # weighted, by name, over all layers
    stats: dict[str, Mean] = field(default_factory=dict)
    nll: list[Tensor] = field(default_factory=list)  # nats of each next token, [rows, T], part by part
    gradient_norm: Tensor | None = None

    def add(self, losses: Losses, share: float) -> None:
        for name, mean in losses.objectives.items():
            mean = Mean(mean.total.detach(), mean.count)
            self.objectives[name] = self.objectives[name] + mean if name in self.objectives else mean
        for path, loss in losses.report.losses.items():
            name, value = path.rpartition(".")[2], loss.detach() * share
            self.auxiliary[name] = self.auxiliary[name] + value if name in self.auxiliary else value
        for path, stat in losses.report.stats.items():
            self.stats[path] = self.stats[path] + stat if path in self.stats else stat
        self.nll.append(losses.nll_BT)

    @property
    def loss(self) -> Mean:
        """The next token's, unweighted: what is compared between runs."""
        return Mean(torch.stack([nll.sum() for nll in self.nll]).sum(), self.objectives[NEXT_TOKEN].count)


def autocast(device_type: str, precision: str) -> Any:
    """bf16 autocast without its weight cache (which would keep a bf16 copy of every weight), or nothing."""
    if precision == "bf16":
        return torch.autocast(device_type, torch.bfloat16, cache_enabled=False)
    return nullcontext()


def on_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on the device."""
    return batch._replace(**{name: value.to(device, non_blocking=True) for name, value in batch._asdict().items()
                             if isinstance(value, Tensor)})


def forward_backward(model: Model, batch: Any, micro_batch: int, precision: str) -> StepResult:
    """Forward and backward over a batch, `micro_batch` sequences at a time; gradients are of the whole batch's
    mean loss, however it is cut.

    Each objective is divided by its number of valid targets in the whole batch, which is known from the data
    before the first forward pass; each auxiliary loss, a mean over sequences, counts by its share of them.
    """
    targets = model.targets(batch.ids_BT, batch.targets_BT, batch.doc_ids_BT)
    weights = model.weights()
    scale = {name: weights[name] / (t != IGNORE).sum().clamp(min=1) for name, t in targets.items()}
    result, rows = StepResult(), batch.ids_BT.shape[0]
    for start in range(0, rows, micro_batch):
        part = slice(start, min(start + micro_batch, rows))
        share = (part.stop - part.start) / rows
        with autocast(batch.ids_BT.device.type, precision):
            losses = model(batch.ids_BT[part], targets={n: t[part] for n, t in targets.items()},
                           doc_ids_BT=None if batch.doc_ids_BT is None else batch.doc_ids_BT[part])
        loss = sum(mean.total * scale[name] for name, mean in losses.objectives.items())
        loss = loss + share * sum(losses.report.losses.values())
        loss.backward()
        result.add(losses, share)
    return result


def decay_groups(model: torch.nn.Module) -> tuple[list, list]:
    """Parameters to decay and to leave: vectors, scalars and what a module lists as `undecayed` are left."""
    decayed, undecayed = [], []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            left = parameter.ndim < 2 or name in getattr(module, "undecayed", ())
            (undecayed if left else decayed).append(parameter)
    return decayed, undecayed


def training_step(model: Model, optimizer: torch.optim.Optimizer, strategy: Any, batch: Any, *, step: int,
                  micro_batch: int, precision: str, max_norm: float, learning_rate_factor: float) -> StepResult:
    """One optimizer step. A loss or gradient that is not finite changes nothing: the caller sees it in the result. Nor
    does a batch without a target."""
    for module in model.modules():
        if hasattr(module, "before_step"):
            module.before_step(step)
    result = forward_backward(model, batch, micro_batch, precision)
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
