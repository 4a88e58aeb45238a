"""BitLinear of a published model that has norms of its own before every linear.

Shapes: D in, O out, ... any leading axes.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace

import torch
from torch import Tensor

from tryplicity_plugins.layers.bitlinear import INPUT_FLOOR, NORM_EPS, BitLinear, _straight_through, _wide
from tryplicity_plugins.layers.products import packed_product


def _steps(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each token in steps [..., D] of its absmax over 127, with x's gradient over the step's; and the step [..., 1]."""
    wide = x.to(_wide(x.dtype))
    step = wide.detach().abs().amax(-1, keepdim=True).clamp(min=INPUT_FLOOR) / 127
    return _straight_through((wide / step).round(), wide / step), step


class UnnormedBitLinear(BitLinear):
    """BitLinear whose input is rounded as it is and not normalised before (BitNet b1.58 2B4T, arXiv:2504.12285).

    Packed it is multiplied by as a BitLinear is, whose norm only moves the size of a step, and what comes out goes
    back by the token's root mean square.
    """

    name = "bitlinear_unnormed"

    def __init__(self, config, in_features: int, out_features: int, **options) -> None:
        super().__init__(config, in_features, out_features, **options)
        self._packed: SimpleNamespace | None = None  # as `matrix` it would be multiplied by as a normed one

    def effective_input(self, x: Tensor) -> Tensor:
        steps, step = _steps(x)
        return (steps * step).to(x.dtype)

    def integers(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return _steps(x)

    def adopt(self, packed: Mapping[str, Tensor]) -> None:
        super().adopt(packed)
        self._packed = SimpleNamespace(matrix=self.matrix, experts=self.experts, out_features=self.out_features,
                                       bias=None)
        self.matrix = None

    def unpack(self) -> Tensor:
        return self._packed.matrix.weight()

    def packed_nbytes(self) -> int:
        return 0 if self._packed is None else self._packed.matrix.nbytes

    def expert_weight(self, expert: int) -> Tensor:
        return super().expert_weight(expert) if self._packed is None else self._packed.matrix.weight(expert)

    def forward(self, x: Tensor, offsets_E: Tensor | None = None, spread=None) -> Tensor:
        if self._packed is None:
            return super().forward(x, offsets_E, spread)
        x = x if spread is None else spread(x)
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        rms = size.square_().div_(x.shape[-1]).add_(NORM_EPS).sqrt_()
        y = (packed_product(self._packed, x, offsets_E, None) * rms).to(x.dtype)
        return y if self.bias is None or self.experts is not None else y + self.bias.to(y.dtype)
