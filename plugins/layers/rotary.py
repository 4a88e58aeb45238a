"""Rotary positions (Su et al., arXiv:2104.09864), and how they are stretched to longer texts than were learnt from.

Shapes: B batch, T tokens, H heads, K head dim, R dims of a head that are turned, P = R / 2 pairs of them.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from tryplicity import Length, Positive

#: what each kind of scaling must be told beside its factor, and what it may be told
TOLD = {"linear": ((), ()),
        "llama3": (("low_freq_factor", "high_freq_factor", "original_context"), ()),
        "yarn": (("original_context",), ("beta_fast", "beta_slow", "attention_factor"))}


@dataclass(frozen=True)
class RopeScaling:
    """How the rotations are slowed down so that longer texts turn as far as those learnt from did.

    linear: all of them (Chen et al., arXiv:2306.15595). llama3: the slow ones (Llama 3.1). yarn: the slow ones, the
    fast ones not, and attention sharper (Peng et al., arXiv:2309.00071).
    """

    type: Literal["linear", "llama3", "yarn"]
    factor: Annotated[float, Field(ge=1, le=1e6)]
    """how many times longer"""
    original_context: Length | None = None
    """llama3, yarn: tokens of the texts learnt from"""
    low_freq_factor: Positive | None = None
    """llama3: what turns fewer times than this in the original context is slowed down by the whole factor"""
    high_freq_factor: Positive | None = None
    """llama3: what turns more often than this is not slowed down"""
    beta_fast: Positive | None = None
    """yarn: what turns more often than this in the original context is not slowed down; by default 32"""
    beta_slow: Positive | None = None
    """yarn: what turns fewer times is slowed down by the whole factor; by default 1"""
    attention_factor: Positive | None = None
    """yarn: multiplies queries and keys; by default 0.1 ln(factor) + 1"""

    def __post_init__(self) -> None:
        needed, allowed = TOLD[self.type]
        given = {name for names in TOLD.values() for name in sum(names, ()) if getattr(self, name) is not None}
        if missing := [name for name in needed if name not in given]:
            raise ValueError(f"{self.type} needs {', '.join(missing)} too; add it")
        if foreign := sorted(given - {*needed, *allowed}):
            raise ValueError(f"{self.type} takes no {', '.join(foreign)}; leave it out")
        if self.type == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(f"low_freq_factor ({self.low_freq_factor:g}) must be below high_freq_factor "
                             f"({self.high_freq_factor:g})")
        if self.type == "yarn" and (self.beta_slow or 1) >= (self.beta_fast or 32):
            raise ValueError(f"beta_slow ({self.beta_slow or 1:g}) must be below beta_fast ({self.beta_fast or 32:g})")


def speeds(base: float, dims: int, scaling: RopeScaling | None) -> tuple[Tensor, float]:
    """Radians a token of each pair, [dims / 2] in fp64, and what queries and keys are multiplied by."""
    speed_P = base ** (-2 * torch.arange(dims // 2, dtype=torch.float64, device="cpu") / dims)
    if scaling is None:
        return speed_P, 1.0
    slow_P = speed_P / scaling.factor
    if scaling.type == "linear":
        return slow_P, 1.0
    if scaling.type == "llama3":
        turns_P = scaling.original_context * speed_P / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept_P = ((turns_P - low) / (high - low)).clamp(0, 1)
        return kept_P * speed_P + (1 - kept_P) * slow_P, 1.0

    def pair_of(turns: float) -> float:
        """Which pair turns so many times in the original context, were there one between pairs."""
        return dims * math.log(scaling.original_context / (turns * 2 * math.pi)) / (2 * math.log(base))

    # both ends on whole pairs, as in the paper's own code
    first = max(math.floor(pair_of(scaling.beta_fast or 32)), 0)
    last = min(math.ceil(pair_of(scaling.beta_slow or 1)), dims - 1)
    slowed_P = ((torch.arange(dims // 2, dtype=torch.float64, device="cpu") - first)
                / max(last - first, 1e-3)).clamp(0, 1)
    factor = scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1
    return slowed_P * slow_P + (1 - slowed_P) * speed_P, factor


#: one table for all layers of this process that turn alike on a device, for as long as one of them has it; of fake
#: tensors, one for each of their modes
_TABLES: weakref.WeakValueDictionary[tuple, Tensor] = weakref.WeakValueDictionary()


class Rotary(nn.Module):
    """Turns neighbouring pairs of the first `dims` dimensions of each head by angles that grow with the position.

    `rotation` is a table that others may have too: it is replaced and never written into.
    """

    def __init__(self, base: float, dims: int, scaling: RopeScaling | None, positions: int) -> None:
        """positions: to begin with; a longer text makes more."""
        super().__init__()
        self.base, self.dims, self.scaling = base, dims, scaling
        self.register_buffer("rotation", torch.empty(positions, dims // 2, 2), persistent=False)
        if self.rotation.is_meta:  # so that a plan counts it once
            self.rotation = _TABLES.setdefault((*self._key(), positions), self.rotation)

    def reset_parameters(self) -> None:
        self.rotation = self._shared(len(self.rotation))

    def _key(self) -> tuple:
        return (self.base, self.dims, self.scaling, self.rotation.device, type(self.rotation),
                getattr(self.rotation, "fake_mode", None))

    def _shared(self, positions: int) -> Tensor:
        """The table of so many positions at least."""
        key = self._key()
        table = _TABLES.get(key)
        if table is None or len(table) < positions:
            with torch.inference_mode(False), torch.no_grad():  # others may learn with it
                table = self._rotation(positions).to(self.rotation.device)
            _TABLES[key] = table
        return table

    def _rotation(self, positions: int) -> Tensor:
        """cos and sin of every position's angles, [positions, P, 2] in fp32."""
        speed_P, factor = speeds(self.base, self.dims, self.scaling)
        angle = torch.arange(positions, dtype=torch.float64, device="cpu")[:, None] * speed_P
        turned = torch.stack((angle.cos(), angle.sin()), -1)
        return (turned if factor == 1.0 else turned * factor).float()

    def table(self, end: int) -> Tensor:
        """The rotations of positions up to `end` at least."""
        rotation = self.rotation
        if torch.compiler.is_compiling() or type(rotation) is not Tensor:
            if end > len(rotation) or rotation.dtype != torch.float32:
                self.rotation = self._rotation(capacity(end)).to(rotation.device)
        elif rotation is not _TABLES.get(self._key()) or end > len(rotation):  # moved, of another dtype; a longer text
            self.rotation = self._shared(max(len(rotation), end if end <= len(rotation) else capacity(end)))
        return self.rotation

    def forward(self, x_BTHK: Tensor, start: int) -> Tensor:
        """start: the position of the first token."""
        if self.dims == x_BTHK.shape[-1]:
            return self._turned(x_BTHK, start)
        return torch.cat((self._turned(x_BTHK[..., :self.dims], start), x_BTHK[..., self.dims:]), -1)

    def turned(self, x: Tensor, turn: Tensor) -> Tensor:
        """x [..., K] by rotations of its own, rows of the table [..., P, 2]."""
        if self.dims == x.shape[-1]:
            return _by_parts(x, turn)
        return torch.cat((_by_parts(x[..., :self.dims], turn), x[..., self.dims:]), -1)

    def _turned(self, x_BTHR: Tensor, start: int) -> Tensor:
        B, T, H, R = x_BTHR.shape
        end, dtype = start + T, x_BTHR.dtype
        if torch.compiler.is_compiling():  # which fuses no complex numbers
            return _by_parts(x_BTHR, self.table(end)[start:end, None])
        turn_T1P = torch.view_as_complex(self.table(end)[start:end, None])
        if dtype.itemsize < 4:
            x_BTHR = x_BTHR.float()  # complex numbers have no bf16
        pairs_BTHP = torch.view_as_complex(x_BTHR.unflatten(-1, (R // 2, 2)))
        return torch.view_as_real(pairs_BTHP * turn_T1P).view(B, T, H, R).to(dtype)


def _by_parts(x: Tensor, turn: Tensor) -> Tensor:
    """x [..., R] turned by the cosines and sines of its pairs [..., P, 2]."""
    cos, sin = turn.unbind(-1)
    even, odd = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1)
    return turned.flatten(-2).to(x.dtype)


def capacity(tokens: int) -> int:
    """A power of two, whatever the steps that led there."""
    return max(64, 1 << (tokens - 1).bit_length())
