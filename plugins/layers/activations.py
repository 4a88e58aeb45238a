"""Elementwise activations without parameters."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from tryplicity import Activation


class Elementwise(Activation):
    """An activation that is the same for every neuron, so that features and groups do not matter."""

    def __init__(self, config, features: int, groups: int | None = None) -> None:
        super().__init__()


class SiLU(Elementwise):
    """x * sigmoid(x) (Elfwing et al., arXiv:1702.03118)."""

    name = "silu"

    def forward(self, x: Tensor, group: Tensor | None = None) -> Tensor:
        return F.silu(x)


class GELU(Elementwise):
    """x * Phi(x) with the exact normal distribution function (Hendrycks and Gimpel, arXiv:1606.08415)."""

    name = "gelu"

    def forward(self, x: Tensor, group: Tensor | None = None) -> Tensor:
        return F.gelu(x)


class ReLU2(Elementwise):
    """max(x, 0)² (So et al., arXiv:2109.08668): zero for every negative input."""

    name = "relu2"

    def forward(self, x: Tensor, group: Tensor | None = None) -> Tensor:
        return F.relu(x).square()
