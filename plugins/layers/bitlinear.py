"""Ternary weights and int8 activations, trained straight through the rounding.

Shapes: D in, O out, E experts, ... any leading axes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from tryplicity import Linear, Some, UserError, grouped_linear, kernels, later
from tryplicity_plugins.layers.products import packed_product

WEIGHT_FLOOR = 1e-5  # least weight scale, so that an all-zero matrix divides by something
INPUT_FLOOR = 1e-5  # least absmax of a normalised token, likewise
NORM_EPS = 1e-6  # added to the mean square of a token before it is quantised
DECODING_ROWS = 64  # up to so many tokens at once the ternary weights are worth keeping


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Rounding needs fp32 at least: bf16 cannot tell 127 steps of a scale apart."""
    return torch.promote_types(dtype, torch.float32)


def without_autocast(x: Tensor):
    kind = x.device.type
    return torch.autocast(kind if kind != "meta" else "cpu", enabled=False)


def ternary(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Digits -1, 0, 1 [..., O, D] and each matrix's scale [..., 1, 1], its mean |weight|; at least fp32."""
    scale = weight.abs().mean((-2, -1), keepdim=True, dtype=_wide(weight.dtype)).clamp_(min=WEIGHT_FLOOR)
    return (weight / scale).round_().clamp_(-1, 1), scale


def ternary_weight(weight: Tensor) -> Tensor:
    """Every weight as -scale, 0 or scale, in the weight's dtype."""
    digits, scale = ternary(weight)
    return digits.mul_(scale).to(weight.dtype)


def int8_input(x: Tensor) -> tuple[Tensor, Tensor]:
    """(y, rstd): each token times rstd [..., 1] = 1/rms, rounded to 127 steps either way up to its absmax.

    The norm only moves the step: x / absmax(x) is norm(x) / absmax(norm(x)), so normalising costs no pass.
    """
    rstd = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=_wide(x.dtype))
    rstd = rstd.square_().div_(x.shape[-1]).add_(NORM_EPS).rsqrt_()
    step = (x.abs().amax(-1, keepdim=True) * rstd).clamp_(min=INPUT_FLOOR).div_(127)
    return (x * (rstd / step)).round_().mul_(step).to(x.dtype), rstd


class _TernaryWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight):
        return ternary_weight(weight)

    @staticmethod
    def backward(ctx, grad):
        return grad


class _Int8Input(torch.autograd.Function):
    """The gradient is the norm's alone: rounding lets it straight through."""

    @staticmethod
    def forward(ctx, x):
        y, rstd = int8_input(x)
        ctx.save_for_backward(x, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, rstd = ctx.saved_tensors
        along_x = torch.linalg.vecdot(grad.to(rstd.dtype), x.to(rstd.dtype)).unsqueeze(-1)
        along_x = along_x.mul_(rstd.pow(3)).div_(-x.shape[-1])
        return (grad * rstd).addcmul_(x.to(rstd.dtype), along_x).to(x.dtype)


def _straight_through(rounded: Tensor, x: Tensor) -> Tensor:
    """The rounded values exactly, with x's gradient: what is added to them is zero."""
    return rounded.detach() + (x - x.detach())


def rounded_weight(weight: Tensor) -> Tensor:
    """Every weight as -scale, 0 or scale, with the gradient of the weight itself."""
    if torch.compiler.is_compiling():  # torch 2.11 loses the gradients of a Function that changes its result in place
        return _straight_through(ternary_weight(weight), weight)
    return _TernaryWeight.apply(weight)


def rounded_input(x: Tensor) -> Tensor:
    """`int8_input`, with the gradient of the norm."""
    if torch.compiler.is_compiling():
        steps, step = integer_input(x)
        return (steps * step).to(x.dtype)
    return _Int8Input.apply(x) if torch.is_grad_enabled() else int8_input(x)[0]


def integer_input(x: Tensor) -> tuple[Tensor, Tensor]:
    """The steps of `int8_input` themselves, integers up to 127 either way, and the size of a step [..., 1], a
    constant; with the gradient of the norm."""
    wide = _wide(x.dtype)
    rstd = (x.to(wide).square().mean(-1, keepdim=True) + NORM_EPS).rsqrt()
    step = (x.detach().abs().amax(-1, keepdim=True) * rstd.detach()).clamp(min=INPUT_FLOOR) / 127
    return _straight_through((x * (rstd / step)).round(), x * rstd / step), step


class BitLinear(Linear):
    """BitNet b1.58 (Ma et al., arXiv:2402.17764): x normalised and in int8, weights -1, 0 or 1 times a scale.

    The scale is the mean |weight| of each matrix (of each expert in a stack), the step of the input the
    absmax of each token over 127; both sides are in their own dtype again when they meet. The norm has no
    parameters. Gradients pass the rounding unchanged. While decoding (no gradients, not in training mode, few
    tokens) the ternary weights are kept until the parameter changes; after `adopt` there is no parameter, and `matrix`
    holds them at two bits each.

    With `fade_steps` a model that was trained without all this becomes ternary bit by bit: for a weight w and its
    rounded value q(w), w + fade (q(w) - w) is what multiplies, and x + fade (q(x) - x) what is multiplied (norm and
    rounding are one q), where fade goes from 0, a plain linear, to 1 in as many steps. It is a buffer: saved, and
    nothing that compiled code depends on; it never goes back.
    """

    name = "bitlinear"
    packed_bits = 1.6  # five ternary digits to a byte
    packed_format = "ternary"

    @dataclass(frozen=True)
    class Config:
        fade_steps: Some = later(0)
        """Optimizer steps in which the rounding fades in, for a training that begins from plain weights."""

    def __init__(self, config, in_features: int, out_features: int, **options) -> None:
        super().__init__(config, in_features, out_features, **options)
        self.register_buffer("fade", torch.empty(()) if config is not None and config.fade_steps else None)
        self._kept: tuple[Tensor, int, Tensor] | None = None  # parameter, its version, its ternary weights
        self.matrix: kernels.TernaryMatrix | None = None

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.fade is not None:
            nn.init.zeros_(self.fade)

    def before_step(self, step: int) -> None:
        if self.fade is not None:
            self.fade.clamp_(min=min(1.0, (step + 1) / self.config.fade_steps))

    def faded(self, plain: Tensor, rounded: Tensor) -> Tensor:
        """What lies between them; at the end `rounded` itself, to the bit."""
        return rounded if self.fade is None else torch.lerp(plain, rounded, self.fade.to(plain.dtype))

    def ready_to_pack(self) -> bool:
        return self.fade is None or bool(self.fade == 1)

    def path(self, device: torch.device, compiled: bool) -> str:
        if compiled and self.fade is None:
            return "products of integers, scaled afterwards: in bf16 exact, as ternary inference has them"
        return "weights and inputs rounded, in their own dtype again when they are multiplied"

    def effective_weight(self, weight: Tensor) -> Tensor:
        return self.faded(weight, rounded_weight(weight))

    def effective_input(self, x: Tensor) -> Tensor:
        return self.faded(x, rounded_input(x))

    def packed_like(self) -> dict[str, Tensor]:
        stack = () if self.experts is None else (self.experts,)
        return {"weight_ternary": torch.empty(*stack, self.out_features, -(-self.in_features // 5),
                                              dtype=torch.uint8, device="meta"),
                "weight_scale": torch.empty(*stack, 1, 1, dtype=torch.float32, device="meta")}

    def pack(self) -> dict[str, Tensor]:
        digits, scale = ternary(self.weight.detach())
        return {"weight_ternary": kernels.pack(digits.to(torch.int8)), "weight_scale": scale.float()}

    def adopt(self, packed: Mapping[str, Tensor]) -> None:
        stack = () if self.experts is None else (self.experts,)
        if (found := packed["weight_ternary"].shape[:-1]) != (*stack, self.out_features):
            raise UserError(f"packed weights of {list(found)} rows where the spec has {[*stack, self.out_features]}: "
                            "another model's file?")
        self.weight, self._kept = None, None
        self.matrix = kernels.TernaryMatrix.from_packed(packed["weight_ternary"], packed["weight_scale"],
                                                        self.in_features)

    def unpack(self) -> Tensor:
        return self.matrix.weight()

    def packed_nbytes(self) -> int:
        return 0 if self.matrix is None else self.matrix.nbytes

    def forward(self, x: Tensor, offsets_E: Tensor | None = None, spread=None) -> Tensor:
        if self.matrix is not None:
            return packed_product(self, x, offsets_E, spread)
        if torch.compiler.is_compiling() and self.fade is None:
            return self._by_integers(x, offsets_E, spread)
        if not self._decoding(x):
            return super().forward(x, offsets_E, spread)
        x = self.effective_input(x)
        if self.experts is None:
            return F.linear(x, self._kept_weight(), self.bias)
        return grouped_linear(x if spread is None else spread(x), self._kept_weight(), offsets_E)

    def _by_integers(self, x: Tensor, offsets_E: Tensor | None, spread) -> Tensor:
        """Products of integers, scaled afterwards: in bf16 they are exact, and so what ternary inference computes. The
        operations are plain ones for a compiler to fuse; eager PyTorch does the same faster in `_Int8Input`."""
        digits, scale = ternary(self.weight.detach())
        weight = _straight_through(digits, self.weight / scale).to(self.weight.dtype)
        n, step = integer_input(x)
        n = n.to(x.dtype)
        if self.experts is None:
            y, scale = F.linear(n, weight), scale.view(())
        else:
            if spread is not None:
                n = spread(n)
                with without_autocast(step):  # which would round the steps
                    step = spread(step)
            row_S = torch.arange(len(n), device=n.device, dtype=offsets_E.dtype)
            expert_S = torch.bucketize(row_S, offsets_E, right=True).clamp(max=self.experts - 1)
            y, scale = grouped_linear(n, weight, offsets_E), scale.view(-1, 1)[expert_S]
        y = (y.to(step.dtype) * (step * scale)).to(y.dtype)
        return y if self.bias is None or self.experts is not None else y + self.bias.to(y.dtype)

    def expert_weight(self, expert: int) -> Tensor:
        if self.matrix is not None:
            return self.matrix.weight(expert)
        return self._kept_weight()[expert] if self._can_keep() else super().expert_weight(expert)

    def _decoding(self, x: Tensor) -> bool:
        return self._can_keep() and x.numel() <= DECODING_ROWS * self.in_features

    def _can_keep(self) -> bool:
        # an inference tensor has no version to notice a change by
        return self.fade is None and not (self.training or torch.is_grad_enabled() or self.weight.is_inference())

    def _kept_weight(self) -> Tensor:
        kept, weight = self._kept, self.weight
        if kept is None or kept[0] is not weight or kept[1] != weight._version:
            self._kept = kept = (weight, weight._version, self._rounded(weight))
        return kept[2]

    def _rounded(self, weight: Tensor) -> Tensor:
        return ternary_weight(weight)

    def train(self, mode: bool = True) -> BitLinear:
        self._kept = None
        return super().train(mode)

    def _apply(self, *args, **options) -> BitLinear:
        self._kept = None  # another device or dtype leaves the version as it was
        return super()._apply(*args, **options)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_kept": None}
