"""The gated feed-forward (SwiGLU with its default activation).

Shapes: B batch, T time, D hidden, F inner.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tryplicity import (
    Activation,
    FeedForward,
    Linear,
    Part,
    Positive,
    Report,
    Site,
    Size,
    later,
    uses,
)
from tryplicity_plugins.layers import native
from tryplicity_plugins.layers.activations import GateInC, activated, decoded, gate_in_c
from tryplicity_plugins.layers.c_structs import Description, Products, kept_struct, packed, products


class GatedMLPInC(ctypes.Structure):
    """moe.cpp"""

    _fields_ = [("hidden", ctypes.c_int64), ("inner", ctypes.c_int64), ("activation", GateInC),
                ("gate_up", ctypes.c_void_p), ("down", ctypes.c_void_p), ("products", Products)]


def mlp_in_c(gate_up: Linear, activation: Activation, down: Linear) -> Description | None:
    """What C must know of down(activation(gate) * up); None where it cannot do all of it."""
    matrices, gate = packed(gate_up, down), gate_in_c(activation)
    if matrices is None or gate is None:
        return None
    struct = GatedMLPInC(gate_up.in_features, down.in_features, gate[0], *matrices, products())
    return struct, gate[1], [gate_up, down]


def run_mlp(module: nn.Module, x: Tensor) -> Tensor:
    """down(activation(gate) * up) of a module with gate_up, activation and down, for inference: in one call of C if
    they are packed."""
    told = None
    if native.for_inference(x):
        told = kept_struct(module, lambda: mlp_in_c(module.gate_up, module.activation, module.down))
    if told is None:
        return module.down(decoded(module.activation, module.gate_up(x), gate=True))
    out = torch.empty_like(x)
    native.function("gated_mlp", "ppip")(told.address, x.data_ptr(), x.numel() // x.shape[-1], out.data_ptr())
    return out


class GatedMLP(FeedForward):
    """down(activation(gate(x)) * up(x)) (Shazeer, arXiv:2002.05202); gate and up are one product.

    With an inner norm it stands before down; the multipliers are those of maximal update parametrisation, which some
    models keep (Falcon-H1).
    """

    name = "gated_mlp"

    @dataclass(frozen=True)
    class Config:
        inner_size: Size | None = None
        """Neurons; by default 8/3 of hidden_size, rounded up to a multiple of 64."""
        activation: Part = uses("activation", default="silu")
        """What the gate goes through."""
        bias: bool = later(False)
        """Whether gate, up and down have an offset."""
        inner_norm: bool = later(False)
        """Whether activation(gate) * up is normalised before down."""
        gate_multiplier: Positive = later(1.0)
        """Of the gate before its activation."""
        down_multiplier: Positive = later(1.0)
        """Of the output."""

    def __init__(self, config: Config, site: Site) -> None:
        super().__init__()
        inner = config.inner_size or -(-8 * site.hidden_size // (3 * 64)) * 64
        self.gate_up = site.linear(site.hidden_size, 2 * inner, bias=config.bias, parts=(inner, inner))
        self.activation = config.activation.build(inner)
        self.inner_norm = site.norm(inner) if config.inner_norm else None
        self.gate_multiplier, self.down_multiplier = config.gate_multiplier, config.down_multiplier
        self.down = site.linear(inner, site.hidden_size, bias=config.bias, writes_residual=True)

    def forward(self, x_BTD: Tensor, *, state=None, doc_ids=None):
        inferring = not (self.training or torch.is_grad_enabled())
        if inferring and self.inner_norm is None and self.gate_multiplier == self.down_multiplier == 1.0:
            return run_mlp(self, x_BTD)
        gate_up_BTF, report = self.gate_up(x_BTD), Report()
        if self.gate_multiplier != 1.0:
            gate_BTF, up_BTF = gate_up_BTF.chunk(2, dim=-1)
            gate_up_BTF = torch.cat((gate_BTF * self.gate_multiplier, up_BTF), -1)
        if inferring:
            y_BTF = decoded(self.activation, gate_up_BTF, gate=True)
        else:
            y_BTF, said = activated(self.activation, gate_up_BTF, gate=True)
            report.include("activation", said)
        y_BTD = self.down(y_BTF if self.inner_norm is None else self.inner_norm(y_BTF))
        return y_BTD if self.down_multiplier == 1.0 else y_BTD * self.down_multiplier, report
