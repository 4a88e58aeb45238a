"""The feed-forward without a gate.

Shapes: B batch, T time, D hidden, F inner.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tryplicity import FeedForward, Part, Report, Site, Size, output_and_report, uses
from tryplicity_plugins.layers.activations import decoded


class MLP(FeedForward):
    """down(activation(up(x))) (Vaswani et al., arXiv:1706.03762)."""

    name = "mlp"

    @dataclass(frozen=True)
    class Config:
        inner_size: Size | None = None
        """Neurons; by default 4 times hidden_size."""
        activation: Part = uses("activation", default="relu2")
        """What the neurons go through."""
        bias: bool = False
        """Whether up and down have an offset."""

    def __init__(self, config: Config, site: Site) -> None:
        super().__init__()
        inner = config.inner_size or 4 * site.hidden_size
        self.up = site.linear(site.hidden_size, inner, bias=config.bias)
        self.activation = config.activation.build(inner)
        self.down = site.linear(inner, site.hidden_size, bias=config.bias, writes_residual=True)

    def forward(self, x_BTD: Tensor, *, state=None, doc_ids=None):
        if not (self.training or torch.is_grad_enabled()):
            return self.down(decoded(self.activation, self.up(x_BTD), gate=False))
        y_BTF, said = output_and_report(self.activation(self.up(x_BTD)))
        report = Report()
        report.include("activation", said)
        return self.down(y_BTF), report
