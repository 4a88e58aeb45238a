"""Products of a linear that is packed into a matrix of the core's kernels.

Shapes: S rows sorted by expert, O out, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tryplicity import Linear, kernels


def packed_product(linear: Linear, x: Tensor, offsets_E: Tensor | None, spread) -> Tensor:
    """`Linear.forward` of one whose `matrix` is a kernels.PackedMatrix."""
    if linear.experts is None:
        return kernels.packed_linear(x.float(), linear.matrix, linear.bias).to(x.dtype)
    x_SI = x if spread is None else spread(x)
    sizes_E = offsets_E.diff(prepend=offsets_E.new_zeros(1))
    expert_S = torch.arange(linear.experts, device=x.device).repeat_interleave(sizes_E)
    row_S = torch.arange(len(expert_S), device=x.device)
    y_SO = x_SI.new_zeros(len(x_SI), linear.out_features)  # rows that belong to no expert stay zero
    y_SO[:len(row_S)] = kernels.packed_experts(x_SI.float(), linear.matrix, row_S, expert_S).to(x.dtype)
    return y_SO
