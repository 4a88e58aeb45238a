"""One optimizer step, top to bottom.

Shapes: B sequences of the whole step, T time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
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
    """Sums over the whole batch, all ranks' rows; tensors, which the host reads by `on_host`."""

    objectives: dict[str, Mean] = field(default_factory=dict)
    auxiliary: dict[str, Tensor] = field(default_factory=dict)  # weighted, by name, over all layers
    stats: dict[str, Mean] = field(default_factory=dict)
    nll: list[Tensor] = field(default_factory=list)  # nats of each next token, [rows, T], part by part; this rank's
    nats: Tensor | None = None  # their sum, all ranks'
    gradient_norm: Tensor | None = None
    finite: Tensor | None = None  # bool: the loss and the gradient

    @property
    def loss(self) -> Mean:
        """The next token's, unweighted: what is compared between runs."""
        return Mean(self.nats, self.objectives[NEXT_TOKEN].count)

    def on_host(self) -> StepResult:
        """The same in the host's memory, but for `nll`; all in one transfer, which waits until the step is done."""
        names = [(kind, name) for kind in ("objectives", "stats") for name in getattr(self, kind)]
        held = [part for kind, name in names for part in getattr(self, kind)[name]]
        held += [*self.auxiliary.values(), self.nats, self.gradient_norm, self.finite]
        tensors = [part for part in held if isinstance(part, Tensor)]
        parts = iter(torch.cat([part.double().reshape(-1) for part in tensors]).cpu().split(
            [part.numel() for part in tensors]))
        read = iter([next(parts).view(part.shape).to(part.dtype) if isinstance(part, Tensor) else part
                     for part in held])
        result = StepResult(nll=self.nll)
        for kind, name in names:
            getattr(result, kind)[name] = Mean(next(read), next(read))
        result.auxiliary = {name: next(read) for name in self.auxiliary}
        result.nats, result.gradient_norm, result.finite = read
        return result


class Sums:
    """What the forward passes of a step said, summed: over the passes, then over the ranks.

    In fp64, all in one vector: then it does not matter into how many passes and ranks a batch is cut.
    """

    def __init__(self) -> None:
        self.like: dict[tuple[str, ...], Tensor] = {}  # what is summed, in order; a tensor of its shape and dtype
        self.counts: dict[tuple[str, ...], float] = {}  # of the sums, those that the host knows
        self.vector: Tensor | None = None

    def add(self, losses: Losses, share: float) -> None:
        """share: of the whole batch's rows; 0 for a row of nothing, of which the names alone count."""
        said: dict[tuple[str, ...], Any] = {("nats",): losses.nll_BT.sum()}
        for name, mean in losses.objectives.items():
            said["objectives", name, "total"], said["objectives", name, "count"] = mean
        for path, loss in losses.report.losses.items():
            name = ("auxiliary", path.rpartition(".")[2])
            said[name] = said.get(name, 0) + loss.detach()
        for path, stat in losses.report.stats.items():
            said["stats", path, "total"], said["stats", path, "count"] = stat
        tensors = {name: value.detach() for name, value in said.items() if isinstance(value, Tensor)}
        for name in (name for name in said if name not in tensors):
            self.counts[name] = self.counts.get(name, 0.0) + (said[name] if share else 0.0)
        if self.vector is None:
            self.like = tensors
            self.vector = torch.zeros(sum(tensor.numel() for tensor in tensors.values()), dtype=torch.float64,
                                      device=losses.nll_BT.device)
        if share:
            self.vector += torch.cat([(share * tensors[name] if name[0] == "auxiliary" else tensors[name]).reshape(-1)
                                      for name in self.like])

    def over(self, world: World) -> StepResult:
        """The sums over all ranks."""
        vector, counts = self.vector, self.counts
        if world.size > 1:
            held = to_device(torch.tensor(list(counts.values()), dtype=torch.float64), vector.device)
            vector, held = world.total([vector, held])
            counts = {name: count.to(self.like[*name[:-1], "total"].dtype)
                      for name, count in zip(counts, held, strict=True)}
        parts = vector.split([like.numel() for like in self.like.values()])
        sums: dict[tuple[str, ...], Any] = {name: part.view(like.shape).to(like.dtype) for (name, like), part in
                                            zip(self.like.items(), parts, strict=True)}
        sums |= counts
        result = StepResult(nats=sums["nats",])
        for kind, name, *rest in (found for found in sums if len(found) > 1):
            if rest == ["total"]:
                getattr(result, kind)[name] = Mean(sums[kind, name, "total"], sums[kind, name, "count"])
            elif not rest:
                result.auxiliary[name] = sums[kind, name]
        return result


def autocast(device_type: str, precision: str) -> Any:
    """bf16 autocast without its weight cache (which would keep a bf16 copy of every weight), or nothing."""
    if precision == "bf16":
        return torch.autocast(device_type, torch.bfloat16, cache_enabled=False)
    return nullcontext()


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host's; a card fetches it when it comes to it, for which it must lie in memory that is pinned."""
    return (x.pin_memory() if device.type == "cuda" and x.is_cpu else x).to(device, non_blocking=True)


def on_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on the device."""
    return batch._replace(**{name: to_device(value, device) for name, value in batch._asdict().items()
                             if isinstance(value, Tensor)})


def forward_backward(model: Model, batch: Any, micro_batch: int, precision: str, strategy: Parallelism = ONE,
                     world: World = ALONE, rows: int | None = None) -> StepResult:
    """Forward and backward over this rank's rows of a batch, `micro_batch` sequences at a time; gradients and sums are
    of the mean loss of the whole batch, all ranks' rows, however it is cut.

    Each objective is divided by its number of valid targets in the whole batch, which is known from the data
    before the first forward pass; each auxiliary loss, a mean over sequences, counts by its share of them. A rank that
    has fewer rows than another makes as many passes: the missing ones with a row of nothing, which counts for nothing.
    """
    own = len(batch.ids_BT)
    if own == 0:
        batch = _nothing(batch)
    targets = model.targets(batch.ids_BT, batch.targets_BT, batch.doc_ids_BT)
    weights = model.weights()
    counts = world.total([(t != IGNORE).sum() for t in targets.values()])
    scale = {name: weights[name] / count.clamp(min=1) for name, count in zip(targets, counts, strict=True)}
    if rows is None:
        rows = own if world.size == 1 else int(world.total([torch.tensor(own, device=batch.ids_BT.device)])[0])
    sums, nll = Sums(), []
    micro_batch = 1 if strategy.row_by_row else micro_batch
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
        sums.add(losses, there / rows)
        if there:
            nll.append(losses.nll_BT)
    result = sums.over(world)
    result.nll = nll
    return result


def _nothing(batch: Any) -> Any:
    """A row of nothing, for a rank that has no row of this batch."""
    def one(value_BT: Tensor, filled: int) -> Tensor:
        return value_BT.new_full((1, *value_BT.shape[1:]), filled)

    return batch._replace(ids_BT=one(batch.ids_BT, 0), targets_BT=one(batch.targets_BT, IGNORE),
                          doc_ids_BT=None if batch.doc_ids_BT is None else one(batch.doc_ids_BT, 0))


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
                  world: World = ALONE, rows: int | None = None) -> StepResult:
    """One optimizer step. A loss or gradient that is not finite changes nothing: the caller sees it in the result. Nor
    does a batch without a target.

    The host hands all of it to the device and does not wait, if the optimizer can look for itself whether to step
    (torch's fused ones can), and `rows` are given or this rank is alone: see `forward_backward`.
    """
    for module in model.modules():
        if hasattr(module, "before_step"):
            module.before_step(step)
    result = forward_backward(model, batch, micro_batch, precision, strategy, world, rows)
    result.gradient_norm = strategy.clip_gradients(model, max_norm)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * learning_rate_factor
    total, count = result.objectives[NEXT_TOKEN]
    result.finite = torch.isfinite(total) & torch.isfinite(result.gradient_norm)
    good = result.finite & (count > 0)
    if _stepped(optimizer, good):
        with _kept_unless(good, model, result.stats):
            model.after_step(step, result.stats)
    optimizer.zero_grad(set_to_none=True)
    return result


def _stepped(optimizer: torch.optim.Optimizer, good: Tensor) -> bool:
    """A step of the optimizer if `good` is true; False where the host knows that it was not. A fused optimizer is told
    as torch.amp.GradScaler tells it of gradients that are not finite, and the device finds out; else the host asks."""
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        if bool(good):
            optimizer.step()
        return bool(good)
    optimizer.grad_scale, optimizer.found_inf = None, (~good).float()
    try:
        optimizer.step()
    finally:
        del optimizer.grad_scale, optimizer.found_inf
    return True


@contextmanager
def _kept_unless(good: Tensor, model: Model, stats: Mapping[str, Mean]) -> Iterator[None]:
    """What happens inside to the buffers of the modules that have statistics is undone, on the device, unless `good`
    is true."""
    modules = dict.fromkeys(part for path in stats for part in model.get_submodule(path.rpartition(".")[0]).modules())
    before = [(module, name, buffer, buffer._version, buffer.clone()) for module in modules
              for name, buffer in module._buffers.items() if buffer is not None]
    yield
    for module, name, buffer, version, old in before:
        new = module._buffers[name]
        if new is not buffer or new._version != version:
            new.copy_(torch.where(good, new, old))
