"""The gated feed-forward (SwiGLU with its default activation).

Shapes: B batch, T time, D hidden, F inner.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from tryplicity import FeedForward, Part, Report, Site, output_and_report, uses
from tryplicity_plugins.layers.activations import gated


class GatedMLP(FeedForward):
    """down(activation(gate(x)) * up(x)) (Shazeer, arXiv:2002.05202); gate and up are one product."""

    name = "gated_mlp"

    @dataclass(frozen=True)
    class Config:
        inner_size: Annotated[int, Field(gt=0)] | None = None
        """Neurons; by default 8/3 of hidden_size, rounded up to a multiple of 64."""
        activation: Part = uses("activation", default="silu")
        """What the gate goes through."""

    def __init__(self, config: Config, site: Site) -> None:
        super().__init__()
        inner = config.inner_size or -(-8 * site.hidden_size // (3 * 64)) * 64
        self.gate_up = site.linear(site.hidden_size, 2 * inner)
        self.activation = config.activation.build(inner)
        self.down = site.linear(inner, site.hidden_size, writes_residual=True)

    def forward(self, x_BTD: Tensor, *, state=None, doc_ids=None):
        if not (self.training or torch.is_grad_enabled()):
            return self.down(gated(self.activation, self.gate_up(x_BTD)))
        gate_BTF, up_BTF = self.gate_up(x_BTD).chunk(2, dim=-1)
        gate_BTF, said = output_and_report(self.activation(gate_BTF))
        report = Report()
        report.include("activation", said)
        return self.down(gate_BTF * up_BTF), report
