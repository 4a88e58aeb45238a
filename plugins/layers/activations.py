"""Elementwise activations without parameters, and the gated product they are part of.

Shapes: S rows, F neurons.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tryplicity import Activation, output_and_report
from tryplicity_plugins.layers import native


def gated(activation: Activation, gate_up: Tensor, group_S: Tensor | None = None) -> Tensor:
    """activation(gate) * up of [..., 2 F], gate and up; for decoding, where nobody reads the activation's report.

    group_S: of each row of gate_up [S, 2 F], for an activation of several groups. In C where the activation has an
    `in_c`: its number in moe.cpp, with the thresholds and their offsets of the one that has some.
    """
    in_c = getattr(activation, "in_c", None)
    if in_c is not None and native.works_on(gate_up) and native.plain(*in_c[1:]):
        product = native.function("gated", "piiipppp")
        if product is not None:
            F2 = gate_up.shape[-1]
            y = torch.empty((*gate_up.shape[:-1], F2 // 2))
            threshold = offset = group = None
            if len(in_c) > 1:
                threshold, offset = in_c[1].data_ptr(), in_c[2].data_ptr()
                group = group_S.data_ptr() if in_c[1].ndim > 1 else None
            product(gate_up.data_ptr(), gate_up.numel() // F2, F2 // 2, in_c[0], threshold, offset, group,
                    y.data_ptr())
            return y
    gate, up = gate_up.chunk(2, dim=-1)
    return output_and_report(activation(gate, group_S))[0] * up


class Elementwise(Activation):
    """An activation that is the same for every neuron, so that features and groups do not matter."""

    def __init__(self, config, features: int, groups: int | None = None) -> None:
        super().__init__()


class SiLU(Elementwise):
    """x * sigmoid(x) (Elfwing et al., arXiv:1702.03118)."""

    name = "silu"
    in_c = (0,)

    def forward(self, x: Tensor, group: Tensor | None = None) -> Tensor:
        return F.silu(x)


class GELU(Elementwise):
    """x * Phi(x) with the exact normal distribution function (Hendrycks and Gimpel, arXiv:1606.08415)."""

    name = "gelu"
    in_c = (1,)

    def forward(self, x: Tensor, group: Tensor | None = None) -> Tensor:
        return F.gelu(x)


class ReLU2(Elementwise):
    """max(x, 0)² (So et al., arXiv:2109.08668): zero for every negative input."""

    name = "relu2"
    in_c = (2,)

    def forward(self, x: Tensor, group: Tensor | None = None) -> Tensor:
        return F.relu(x).square()
