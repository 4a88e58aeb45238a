"""What every component that is a torch module has: where it stands, and when it is called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from tryplicity.components.report import Mean
from tryplicity.parts import Component, Part

if TYPE_CHECKING:
    from tryplicity.components.linear import Linear, Norm


@dataclass(frozen=True)
class Site:
    """Where in the model a component stands, and the linear and norm components it should build with."""

    hidden_size: int
    vocab_size: int
    context_length: int
    layers: int
    layer: int | None = None
    sublayer: int = 0  # sub-layers before this one in its block
    linear_part: Part | None = None  # None only where a spec is checked, and nothing built
    norm_part: Part | None = None
    uses: int = 1  # layers that are this block: one, unless it is shared

    def linear(self, in_features: int, out_features: int, *, experts: int | None = None,
               active_experts: float | None = None, bias: bool = False, writes_residual: bool = False,
               parts: Sequence[int] | None = None) -> Linear:
        """The spec's linear component. `writes_residual`: initialised smaller, by 1/sqrt(2 * layers). parts: see
        `Linear.takes_parts`."""
        assert self.linear_part is not None
        options = {"parts": tuple(parts)} if parts is not None and self.linear_part.component.takes_parts else {}
        std = 0.02 / (2 * self.layers) ** 0.5 if writes_residual else 0.02
        return self.linear_part.build(in_features, out_features, experts=experts, active_experts=active_experts,
                                      bias=bias, init_std=std, **options)

    def norm(self, size: int) -> Norm:
        """The spec's norm component over the last axis of `size`."""
        assert self.norm_part is not None
        return self.norm_part.build(size)


class Repair(NamedTuple):
    """What a module repaired in itself while the model slept."""

    stats: dict[str, float]
    #: own parameters by (dotted) name -> bool mask over dim 0: rows whose optimizer state must be zeroed
    reset: dict[str, Tensor]


class Module(nn.Module, Component):
    """A component that is a torch module."""

    #: names of parameters of this module that weight decay must leave alone, beside all vectors and scalars
    undecayed: ClassVar[tuple[str, ...]] = ()
    #: share of this module's own parameters that work on one token (routed experts: chosen / all)
    active_fraction: float = 1.0

    def reset_parameters(self) -> None:
        """Initialise the parameters and buffers that this module itself holds (not its children's).

        Called once after the model, assembled on the meta device, got its memory. Whatever is left
        uninitialised raises.
        """

    def path(self, device: torch.device, compiled: bool) -> str | None:
        """Which of several ways of computing the same this takes in training on a device, and why, in a line for
        `doctor`; None where there is one way."""
        return None

    def before_step(self, step: int) -> None:
        """Called before each optimizer step with the number of steps done; decide here, on the host, what the
        step's forward passes will do beside the usual."""

    def after_step(self, step: int, stats: Mapping[str, Mean]) -> None:
        """Adapt buffers once per optimizer step, from this module's own statistics summed over the batch: tensors on
        the device, of which nothing is to be read by the host. What this does to buffers is undone after a step whose
        loss is not finite."""

    def consolidate(self, min_use: float, generator: torch.Generator) -> Repair | None:
        """Called at a sleep: repair what has gone unused or astray; None where there is nothing of the kind.

        min_use: a part used less than so many times its even share counts as dead. generator: the source of
        whatever is drawn anew.
        """
        return None

    def metrics(self, stats: Mapping[str, Mean]) -> dict[str, float | list[float]]:
        """What to log of this module's summed statistics, which are in the host's memory; by default the mean of
        each."""
        return {name: stat.value.tolist() for name, stat in stats.items()}
