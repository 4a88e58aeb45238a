"""The plain linear layer, and the shape every other one has.

Shapes: D in, O out, E experts, ... any leading axes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tryplicity import Linear, kernels
from tryplicity_plugins.layers.products import packed_product

_DTYPES = {"int8": torch.int8, "bf16": torch.bfloat16}


class PlainLinear(Linear):
    """x @ W.T in the weights' own precision, dense or a stack of experts; what `Linear` itself computes.

    For inference it may keep its rows in int8, each with a scale, or in bf16; inputs and sums stay fp32, and a product
    is that with the weight rounded so, to fp32's own rounding. `matrix` then holds them.
    """

    name = "linear"
    forms = tuple(_DTYPES)

    def __init__(self, config, in_features: int, out_features: int, **options) -> None:
        super().__init__(config, in_features, out_features, **options)
        self.matrix: kernels.RowsMatrix | None = None

    @property
    def packed_format(self) -> str:
        return self.form or "packed"

    @property
    def packed_bits(self) -> float:
        if self.form is None:
            return 16.0
        return 8 + 32 / self.in_features if self.form == "int8" else 16.0

    def packed_like(self) -> dict[str, Tensor]:
        if self.form is None:
            return {}
        stack = () if self.experts is None else (self.experts,)
        rows = torch.empty(*stack, self.out_features, self.in_features, dtype=_DTYPES[self.form], device="meta")
        if self.form == "bf16":
            return {"weight_rows": rows}
        return {"weight_rows": rows,
                "weight_scale": torch.empty(*stack, self.out_features, dtype=torch.float32, device="meta")}

    def pack(self) -> dict[str, Tensor] | None:
        if self.form is None:
            return None
        weight = self.weight.detach()
        if self.form == "bf16":
            return {"weight_rows": weight.bfloat16()}
        return dict(zip(("weight_rows", "weight_scale"), kernels.int8_rows(weight), strict=True))

    def adopt(self, packed: Mapping[str, Tensor]) -> None:
        self.weight = None
        self.matrix = kernels.RowsMatrix.from_rows(packed["weight_rows"], packed.get("weight_scale"))

    def unpack(self) -> Tensor:
        return self.matrix.weight()

    def packed_nbytes(self) -> int:
        return 0 if self.matrix is None else self.matrix.nbytes

    def forward(self, x: Tensor, offsets_E: Tensor | None = None, spread=None) -> Tensor:
        if self.matrix is None:
            return super().forward(x, offsets_E, spread)
        return packed_product(self, x, offsets_E, spread)

    def expert_weight(self, expert: int) -> Tensor:
        return super().expert_weight(expert) if self.matrix is None else self.matrix.weight(expert)
