"""Normalisation of the last axis.

Shapes: D the axis normalised, ... any leading axes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from tryplicity import Norm, Positive
from tryplicity_plugins.layers import fused, native

#: for torch.addcmul as a product of three in one operation: ZERO + x * weight * value
ZERO = torch.zeros((), device="cpu")


def _rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The normalised x, and 1 / sqrt(mean(x²) + eps) in fp32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    rstd = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    rstd = rstd.square_().mul_(1 / x.shape[-1]).add_(eps).rsqrt_()
    return (x * rstd).mul_(weight_D).to(x.dtype), rstd


def plain_rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """The same as a compiler likes it, in operations of their own and without a function to differentiate."""
    wide = torch.promote_types(x.dtype, torch.float32)
    rstd = (x.to(wide).square().mean(-1, keepdim=True) + eps).rsqrt()
    return (x.to(wide) * rstd * weight_D.to(wide)).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """RMS norm with a hand-written backward: torch's on CPU is a chain of a dozen passes over x."""

    @staticmethod
    def forward(ctx, x, weight_D, eps):
        y, rstd = fused.rms_norm(x, weight_D, eps) or _rms_norm(x, weight_D, eps)
        ctx.save_for_backward(x, weight_D, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight_D, rstd = ctx.saved_tensors
        if (gradients := fused.rms_norm_backward(grad, x, weight_D, rstd)) is not None:
            return *gradients, None
        D = x.shape[-1]
        grad_times_x = (grad * x).reshape(-1, D).to(rstd.dtype)
        weight = weight_D.to(rstd.dtype)
        with torch.autocast("cpu", enabled=False):  # backward may be called inside one
            grad_weight_D = rstd.reshape(1, -1) @ grad_times_x
            # d/dx of x * rstd(x): the part along x shrinks, since rstd falls as x grows
            along_x = (grad_times_x @ weight).view_as(rstd).mul_(rstd.pow(3)).div_(-D)
        del grad_times_x  # before there is another of its size
        grad_x = (grad * weight).mul_(rstd).addcmul_(x.to(rstd.dtype), along_x)
        return grad_x.to(x.dtype), grad_weight_D[0].to(weight_D.dtype), None


class RMSNorm(Norm):
    """x / sqrt(mean(x²) + eps) * weight (Zhang and Sennrich, arXiv:1910.07467). Keeps x's dtype."""

    name = "rmsnorm"

    @dataclass(frozen=True)
    class Config:
        eps: Positive = 1e-6
        """Added to the mean square, so that zeros stay zeros."""

    def __init__(self, config: Config, size: int) -> None:
        super().__init__()
        self.eps, self.size = config.eps, size
        self.weight = nn.Parameter(torch.empty(size))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def path(self, device: torch.device, compiled: bool) -> str:
        if compiled:
            return "plain operations, which the compiler makes one of"
        return ("a backward pass written by hand: torch's is a dozen passes over x" if device.type == "cpu"
                else "torch's fused kernel")

    def forward(self, x: Tensor) -> Tensor:
        if native.for_inference(x):
            norm, weight = native.function("rms_norm", "pppiif"), native.own_parameters(self, "weight")
            if norm is not None and weight is not None:
                y = torch.empty_like(x)
                norm(x.data_ptr(), *weight, y.data_ptr(), x.numel() // self.size, self.size, self.eps)
                return y
        if torch.compiler.is_compiling():
            return plain_rms_norm(x, self.weight, self.eps)
        if (x.numel() == self.size and x.dtype == torch.float32 and x.device.type == "cpu"
                and not torch.is_grad_enabled()):
            # one decoded token: the scalar part costs less on the host than as five operations, and addcmul
            # multiplies by it on the way, where a product with a number first makes a tensor of that
            mean_square = float(torch.linalg.vector_norm(x)) ** 2 / self.size
            return torch.addcmul(ZERO, x, self.weight, value=(mean_square + self.eps) ** -0.5)
        if x.device.type == "cpu":  # elsewhere torch has a fused kernel
            return _RMSNorm.apply(x, self.weight, self.eps) if torch.is_grad_enabled() else _rms_norm(
                x, self.weight, self.eps)[0]
        return F.rms_norm(x, (self.size,), self.weight.to(x.dtype), self.eps)


class LayerNorm(Norm):
    """(x - mean) / sqrt(variance + eps) * weight + bias (Ba et al., arXiv:1607.06450). Keeps x's dtype."""

    name = "layernorm"

    @dataclass(frozen=True)
    class Config:
        eps: Positive = 1e-5
        """Added to the variance."""
        bias: bool = False
        """Whether to learn an offset too."""

    def __init__(self, config: Config, size: int) -> None:
        super().__init__()
        self.eps, self.size = config.eps, size
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size)) if config.bias else None

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, (self.size,), self.weight.to(x.dtype), bias, self.eps).to(x.dtype)
