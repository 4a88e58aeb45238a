"""A linear in four bits, as a stranger writes it: a step and a least value for each row, two weights to a byte."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from tryplicity import Linear, hookimpl


class Affine4(Linear):
    """Weights are low + step * code, code from 0 to 15; trained straight through the rounding. What is learned beside
    them is a factor for each row."""

    name = "affine4"
    packed_bits = 4.0
    packed_format = "affine4"

    def __init__(self, config, in_features, out_features, **options):
        super().__init__(config, in_features, out_features, **options)
        self.gain = nn.Parameter(torch.empty(*self.weight.shape[:-1]))

    def reset_parameters(self):
        super().reset_parameters()
        nn.init.ones_(self.gain)

    def codes(self, weight):
        low, high = weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True)
        step = ((high - low) / 15).clamp_(min=1e-6).half().float()
        return ((weight - low) / step).round().clamp(0, 15), step, low

    def effective_weight(self, weight):
        code, step, low = self.codes(weight.detach())
        rounded = low + step * code
        gain = self.gain if weight.dim() == self.weight.dim() else None  # of one expert of a stack: see expert_weight
        rounded = weight + (rounded - weight).detach()
        return rounded if gain is None else rounded * gain[..., None]

    def expert_weight(self, expert):
        if self.weight is None:
            return super().expert_weight(expert)
        return self.effective_weight(self.weight[expert]) * self.gain[expert][..., None]

    def packed_like(self):
        stack = () if self.experts is None else (self.experts,)
        rows = (*stack, self.out_features)

        def like(columns, dtype):
            return torch.empty(*rows, columns, dtype=dtype, device="meta")

        return {"nibbles": like(-(-self.in_features // 2), torch.uint8), "step": like(1, torch.float16),
                "low": like(1, torch.float32)}

    def pack(self):
        code, step, low = self.codes(self.weight.detach())
        code = F.pad(code.to(torch.uint8), (0, self.in_features % 2))
        return {"nibbles": code[..., ::2] + 16 * code[..., 1::2], "step": step.half(), "low": low}

    def unpack(self):
        code = torch.stack([self.codes_of(0), self.codes_of(1)], -1).flatten(-2)[..., :self.in_features]
        return (self.low + self.step.float() * code) * self.gain[..., None]

    def codes_of(self, half):
        return (self.nibbles >> 4 * half) % 16


@hookimpl
def tryplicity_layers():
    return [Affine4]
