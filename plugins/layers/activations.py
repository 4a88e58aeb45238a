"""Elementwise activations without parameters, and the gated product they are part of.

Shapes: S rows, F neurons.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from tryplicity import Activation, Report, output_and_report
from tryplicity_plugins.layers import fused, native
from tryplicity_plugins.layers.c_structs import Description, address, describes, kept_struct


class GateInC(ctypes.Structure):
    """moe.cpp"""

    _fields_ = [("kind", ctypes.c_int64), ("threshold", ctypes.c_void_p), ("offset", ctypes.c_void_p),
                ("grouped", ctypes.c_int64)]


def gate_in_c(activation: Activation) -> Description | None:
    """What C must know of an activation on the gate; None where it does not know it."""
    tell = getattr(activation, "in_c", None)
    return tell() if tell is not None and describes(activation, ("in_c", "kind"), ("forward",)) else None


class _GatedSiLU(torch.autograd.Function):
    """silu(gate) * up of [..., 2 F]: nothing is kept but its argument, and on a CPU it is one pass each way."""

    @staticmethod
    def forward(ctx, gate_up):
        ctx.save_for_backward(gate_up)
        if (h := fused.gated_silu(gate_up)) is not None:
            return h
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (gate_up,) = ctx.saved_tensors
        if (gradient := fused.gated_silu_backward(grad, gate_up)) is not None:
            return gradient
        gradient = torch.empty_like(gate_up)
        (gate, up), (to_gate, to_up) = gate_up.chunk(2, dim=-1), gradient.chunk(2, dim=-1)
        torch.ops.aten.silu.out(gate, out=to_up).mul_(grad)
        torch.ops.aten.silu_backward.grad_input(torch.mul(grad, up, out=to_gate), gate, grad_input=to_gate)
        return gradient


def activated(activation: Activation, first: Tensor, group_S: Tensor | None = None, *,
              gate: bool) -> tuple[Tensor, Report]:
    """What goes into an MLP's second product, of what its first one gave: activation(gate) * up of [..., 2 F], gate
    and up; without a gate activation(up) of [..., F]. And the activation's report."""
    if not gate:
        return output_and_report(activation(first, group_S))
    if type(activation) is SiLU and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _GatedSiLU.apply(first), Report()
    gate_F, up_F = first.chunk(2, dim=-1)
    gate_F, report = output_and_report(activation(gate_F, group_S))
    return gate_F * up_F, report


def decoded(activation: Activation, first: Tensor, group_S: Tensor | None = None, *, gate: bool) -> Tensor:
    """The same for decoding, where nobody reads the report: in C, which gives a token the same bits however many there
    are. group_S: of each row of `first`, for an activation of several groups."""
    told = kept_struct(activation, lambda: gate_in_c(activation)) if native.for_inference(first) else None
    if told is None:
        return activated(activation, first, group_S, gate=gate)[0]
    width = first.shape[-1]
    F = width // 2 if gate else width
    y = first.new_empty(*first.shape[:-1], F)
    native.function("activated", "ppiiipp")(told.address, first.data_ptr(), first.numel() // width, F, gate,
                                            address(group_S), y.data_ptr())
    return y


class Elementwise(Activation):
    """An activation that is the same for every neuron, so that features and groups do not matter."""

    kind: int | None = None  # its number in moe.cpp; a subclass of one that has it and does otherwise sets it to None

    def __init__(self, config, features: int, groups: int | None = None) -> None:
        super().__init__()

    def in_c(self) -> Description | None:
        return None if self.kind is None else (GateInC(self.kind), [], [])


class SiLU(Elementwise):
    """x * sigmoid(x) (Elfwing et al., arXiv:1702.03118)."""

    name = "silu"
    kind = 0

    def forward(self, x: Tensor, group: Tensor | None = None) -> Tensor:
        return F.silu(x)


class GELU(Elementwise):
    """x * Phi(x) with the exact normal distribution function (Hendrycks and Gimpel, arXiv:1606.08415)."""

    name = "gelu"
    kind = 1

    def forward(self, x: Tensor, group: Tensor | None = None) -> Tensor:
        return F.gelu(x)


class ReLU2(Elementwise):
    """max(x, 0)² (So et al., arXiv:2109.08668): zero for every negative input."""

    name = "relu2"
    kind = 2

    def forward(self, x: Tensor, group: Tensor | None = None) -> Tensor:
        return F.relu(x).square()
