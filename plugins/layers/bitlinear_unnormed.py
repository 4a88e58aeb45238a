"""BitLinear of a published model that has norms of its own before every linear.

Shapes: D in, O out, E experts, ... any leading axes.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace

import torch
from torch import Tensor

from tryplicity import Linear, kernels
from tryplicity_plugins.layers.bitlinear import (
    INPUT_FLOOR,
    NORM_EPS,
    BitLinear,
    _straight_through,
    _wide,
    rounded_weight,
    ternary,
    ternary_weight,
)
from tryplicity_plugins.layers.products import packed_product


class UnnormedBitLinear(BitLinear):
    """BitLinear whose input is rounded as it is and not normalised before, and in which matrices that a layer
    multiplies by at once (q, k and v; gate and up) have each a scale (BitNet b1.58 2B4T, arXiv:2504.12285).

    Packed it is multiplied by as a BitLinear is, whose norm only moves the size of a step: what comes out goes back by
    the token's root mean square, and by the scale of its row.
    """

    name = "bitlinear_unnormed"
    takes_parts = True

    def __init__(self, config, in_features: int, out_features: int, *, parts: tuple[int, ...] | None = None,
                 **options) -> None:
        super().__init__(config, in_features, out_features, **options)
        self.parts = parts or (out_features,)
        self._packed: SimpleNamespace | None = None  # as `matrix` it would be multiplied by as a normed one
        self._scale: Tensor | None = None  # [..., 1, O] of what is packed

    def effective_weight(self, weight: Tensor) -> Tensor:
        rounded = torch.cat([rounded_weight(part) for part in weight.split(self.parts, -2)], -2)
        return self.faded(weight, rounded)

    def effective_input(self, x: Tensor) -> Tensor:
        wide = x.to(_wide(x.dtype))
        step = wide.detach().abs().amax(-1, keepdim=True).clamp(min=INPUT_FLOOR) / 127
        return self.faded(x, (_straight_through((wide / step).round(), wide / step) * step).to(x.dtype))

    def _rounded(self, weight: Tensor) -> Tensor:
        return torch.cat([ternary_weight(part) for part in weight.split(self.parts, -2)], -2)

    def packed_like(self) -> dict[str, Tensor]:
        stack = () if self.experts is None else (self.experts,)
        return {**super().packed_like(),
                "weight_scale": torch.empty(*stack, 1, self.out_features, dtype=torch.float32, device="meta")}

    def pack(self) -> dict[str, Tensor]:
        digits, scales = zip(*map(ternary, self.weight.detach().split(self.parts, -2)), strict=True)
        rows = [scale.expand(*scale.shape[:-1], part) for scale, part in zip(scales, self.parts, strict=True)]
        return {"weight_ternary": kernels.pack(torch.cat(digits, -2).to(torch.int8)),
                "weight_scale": torch.cat(rows, -1).float()}

    def adopt(self, packed: Mapping[str, Tensor]) -> None:
        self._scale = packed["weight_scale"]
        super().adopt({**packed, "weight_scale": torch.ones_like(self._scale[..., :1])})
        self._packed = SimpleNamespace(matrix=self.matrix, experts=self.experts, out_features=self.out_features,
                                       bias=None)
        self.matrix = None

    def unpack(self) -> Tensor:
        return self._packed.matrix.weight() * self._scale.mT

    def packed_nbytes(self) -> int:
        return 0 if self._packed is None else self._packed.matrix.nbytes + self._scale.nbytes

    def expert_weight(self, expert: int) -> Tensor:
        if self._packed is None:
            return super().expert_weight(expert)
        return self._packed.matrix.weight(expert) * self._scale[expert].mT

    def forward(self, x: Tensor, offsets_E: Tensor | None = None, spread=None) -> Tensor:
        if self._packed is None:
            return (Linear.forward if torch.compiler.is_compiling() else BitLinear.forward)(self, x, offsets_E, spread)
        x = x if spread is None else spread(x)
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        rms = size.square_().div_(x.shape[-1]).add_(NORM_EPS).sqrt_()
        scale = self._scale.squeeze(-2)
        if self.experts is not None:
            row_S = torch.arange(len(x), device=x.device, dtype=offsets_E.dtype)
            scale = scale[torch.bucketize(row_S, offsets_E, right=True).clamp(max=self.experts - 1)]
        y = (packed_product(self._packed, x, offsets_E, None) * rms * scale).to(x.dtype)
        return y if self.bias is None or self.experts is not None else y + self.bias.to(y.dtype)
