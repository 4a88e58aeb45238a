"""An activation that fires only above a threshold, each neuron its own.

Shapes: S rows, F neurons, G groups of neurons (experts).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from tryplicity import Activation, Mean, Positive, Repair, Report
from tryplicity_plugins.layers.activations import GateInC
from tryplicity_plugins.layers.c_structs import Description, address

RECENT = 0.1  # weight of the latest step in the running zero rates: they are of the last 20 steps or so


def membership(group_S: Tensor, groups: int) -> Tensor:
    """[G, S] in fp32: 1 where the row is of the group; a row of no group has none."""
    return (group_S == torch.arange(groups, device=group_S.device)[:, None]).float()


def without_autocast(x: Tensor):
    kind = x.device.type
    return torch.autocast(kind if kind != "meta" else "cpu", enabled=False)


def _quantile(rate: Tensor) -> Tensor:
    """The threshold below which a standard normal variable has such a share of its values."""
    return torch.special.ndtri(rate.clamp(0.01, 0.99))


class _Jump(torch.autograd.Function):
    """x where x > threshold, else 0, with a rectangle for the derivative of the jump."""

    @staticmethod
    def forward(ctx, x_SF, threshold, group_S, bandwidth):
        fires_SF = x_SF > _per_row(threshold, group_S)
        if group_S is not None:
            fires_SF = fires_SF & (group_S < len(threshold))[:, None]
        ctx.save_for_backward(x_SF, threshold, group_S)
        ctx.bandwidth = bandwidth
        return x_SF.where(fires_SF, 0)

    @staticmethod
    def backward(ctx, grad_SF):
        x_SF, threshold, group_S = ctx.saved_tensors
        threshold_SF = _per_row(threshold, group_S)
        fires_SF = x_SF > threshold_SF
        near_SF = (x_SF - threshold_SF).abs() < ctx.bandwidth / 2
        if group_S is not None:
            used_S1 = (group_S < len(threshold))[:, None]
            fires_SF, near_SF = fires_SF & used_S1, near_SF & used_S1
        # raising the threshold past x loses x: d y / d threshold = -x * delta(x - threshold)
        lost_SF = torch.where(near_SF, -x_SF.float() * grad_SF.float() / ctx.bandwidth, 0)
        with without_autocast(x_SF):
            if group_S is None:
                grad_threshold = lost_SF.sum(0)
            else:
                grad_threshold = membership(group_S, len(threshold)) @ lost_SF
        return grad_SF.where(fires_SF, 0), grad_threshold.to(threshold.dtype), None, None


def _per_row(threshold: Tensor, group_S: Tensor | None) -> Tensor:
    return threshold if group_S is None else threshold[group_S.clamp(max=len(threshold) - 1)]


class Spike(Activation):
    """y = x where x exceeds the neuron's threshold, else 0 (JumpReLU, arXiv:2407.14435), with a steady rate
    of zeros.

    The threshold is the sum of a learned part and a homeostatic one. The learned part gets a gradient through
    a rectangle of width `bandwidth` in place of the derivative of the jump. The homeostatic part is moved
    once per optimizer step, from the firing of the whole batch: the mean over neurons to `zero_rate`, and any
    single neuron back to within `band` of it; inside the band neurons keep the rate they learn. Its steps are
    in units of the input's root mean square, so the scale of the input does not matter. A sleep does at one
    stroke what these small steps have not got done.
    """

    name = "spike"
    undecayed = ("threshold",)

    @dataclass(frozen=True)
    class Config:
        zero_rate: Annotated[float, Field(ge=0.6, le=0.8)] = 0.7
        """Share of zeros in the output that the thresholds are steered to."""
        band: Annotated[float, Field(ge=0, le=0.3)] = 0.1
        """How far a single neuron's rate may stray from it."""
        rate: Annotated[float, Field(gt=0, le=1)] = 0.5
        """Speed of the steering: how many root mean squares a threshold moves for an error of 1."""
        threshold: Annotated[float, Field(ge=-1e3, le=1e3)] = 0.1
        """Initial threshold, in units of the input."""
        bandwidth: Positive = 0.1
        """Width of the rectangle that carries the thresholds' gradient, in units of the input."""

    def __init__(self, config, features: int, groups: int | None = None) -> None:
        super().__init__()
        self.config, self.groups = config, groups
        shape = (features,) if groups is None else (groups, features)
        self.threshold = nn.Parameter(torch.empty(shape))
        self.register_buffer("offset", torch.empty(shape))
        # running means for a sleep to work from
        self.register_buffer("zero_rate", torch.empty(shape))
        self.register_buffer("square", torch.empty((*shape[:-1], 1)))

    def in_c(self) -> Description:
        struct = GateInC(3, address(self.threshold), address(self.offset), self.groups is not None)
        return struct, [self.threshold, self.offset], []

    def reset_parameters(self) -> None:
        nn.init.constant_(self.threshold, self.config.threshold)
        nn.init.zeros_(self.offset)
        nn.init.constant_(self.zero_rate, self.config.zero_rate)
        nn.init.zeros_(self.square)

    def forward(self, x: Tensor, group: Tensor | None = None):
        x_SF = x.reshape(-1, x.shape[-1])
        if self.groups is None:
            group = None
        y_SF = _Jump.apply(x_SF, self.threshold.float() + self.offset.float(), group, self.config.bandwidth)
        y = y_SF.view_as(x)
        if torch.is_grad_enabled() or self.training:
            return y, Report(stats=self._firing(x_SF.detach(), y_SF.detach(), group))
        return y

    @torch.no_grad()
    def _firing(self, x_SF: Tensor, y_SF: Tensor, group_S: Tensor | None) -> dict[str, Mean]:
        zero_SF, square_SF = (y_SF == 0).float(), x_SF.float().square()
        if group_S is None:
            rows = torch.full((), float(len(x_SF)), device=x_SF.device)
            return {"zero_rate": Mean(zero_SF.sum(0), rows), "square": Mean(square_SF.mean(-1).sum(), rows)}
        with without_autocast(x_SF):
            member_GS = membership(group_S, self.groups)
            zeros_GF = member_GS @ zero_SF
            used_S = group_S < self.groups
            square_G1 = member_GS @ square_SF.mean(-1).where(used_S, 0)[:, None]
        rows_G1 = member_GS.sum(-1, keepdim=True)
        return {"zero_rate": Mean(zeros_GF, rows_G1), "square": Mean(square_G1, rows_G1)}

    def after_step(self, step: int, stats: Mapping[str, Mean]) -> None:
        zeros, rows = stats["zero_rate"]
        rate = zeros / rows.clamp(min=1)
        square = stats["square"].total.view_as(self.square) / rows.clamp(min=1)
        scale = square.sqrt()
        error = self.config.zero_rate - rate
        stray = error - error.clamp(-self.config.band, self.config.band)
        # a rate seen in few rows is little known, and one never seen is not known at all
        trust = rows / (rows + 16)
        move = self.config.rate * trust * scale * (error.mean(-1, keepdim=True) + stray)
        self.offset.add_(move.to(self.offset.dtype))
        for running, now in ((self.zero_rate, rate), (self.square, square)):
            running.add_((RECENT * trust * (now - running.float())).to(running.dtype))

    @torch.no_grad()
    def consolidate(self, min_use: float, generator: torch.Generator) -> Repair:
        """Re-centre: a neuron that has strayed from its band goes to the target, and all together move the mean
        there; the rates learned inside the band keep their order. A normal input is assumed, and no threshold
        moves by more than its root mean square; what this leaves is for the steps to come."""
        rate, target = self.zero_rate.float().clone(), self.config.zero_rate
        astray = (rate - target).abs() > self.config.band
        wanted = rate.where(~astray, target)
        wanted = wanted + target - wanted.mean(-1, keepdim=True)
        move = (_quantile(wanted) - _quantile(rate)).clamp(-1, 1)
        self.offset.add_((move * self.square.float().sqrt()).to(self.offset.dtype))
        self.zero_rate.copy_((_quantile(rate) + move).mul_(0.5 ** 0.5).erf_().add_(1).div_(2))
        return Repair({"zero_rate_before": rate.mean().item(), "zero_rate_expected": self.zero_rate.mean().item(),
                       "neurons_astray": astray.float().mean().item()}, {})

    def metrics(self, stats: Mapping[str, Mean]) -> dict[str, float | list[float]]:
        zeros, rows = stats["zero_rate"]
        rate = zeros / rows.clamp(min=1)
        seen = (rows > 0).expand_as(zeros)
        return {"zero_rate": (zeros.sum() / rows.expand_as(zeros).sum().clamp(min=1)).item(),
                "zero_rate_spread": rate[seen].std(correction=0).item() if seen.any() else 0.0}
