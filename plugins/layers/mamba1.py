"""The first Mamba: a selective state space with a decay of its own for every number of the state.

Gu and Dao (arXiv:2312.00752); with norms on the time steps, B and C as in Jamba (arXiv:2403.19887). One projection
gives x and a gate z; x passes a short causal convolution; of the result a second one makes B, C and the time steps
(through a few numbers, their rank); `selective_scan` carries a state of constant size; z gates the result.

Shapes: B batch, T time, D hidden, I inner channels, N state, R rank of the time steps, W conv width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from tryplicity import Count, Mixer, Positive, Size, State
from tryplicity_plugins.layers.recurrent import (
    begins,
    draw_taps,
    draw_time_steps,
    keep_tail,
    new_tail,
    runs_of,
    window,
)
from tryplicity_plugins.layers.selective_scan import selective_scan
from tryplicity_plugins.layers.ssd import conv_silu


class Mamba1(Mixer):
    """Mamba (arXiv:2312.00752): a linear-time mixer whose decoding state does not grow with the text. Trains slower
    than `mamba2`, whose scan is matrix products."""

    name = "mamba1"
    undecayed = ("A_log", "dt_bias", "D")
    trials = ({"state_size": 4, "inner_norms": True, "chunk": 4},)

    @dataclass(frozen=True)
    class Config:
        state_size: Size = 16
        """numbers each channel remembers"""
        expand: Annotated[int, Field(ge=1, le=64)] = 2
        """inner channels per hidden channel"""
        conv_width: Annotated[int, Field(ge=2, le=64)] = 4
        """tokens the short convolution sees, the current one included"""
        dt_rank: Size | None = None
        """numbers that the time steps of all channels are made from; by default hidden_size / 16, rounded up"""
        bias: bool = False
        """whether the projections into and out of the mixer have one"""
        conv_bias: bool = True
        """whether the convolution has one"""
        inner_norms: bool = False
        """whether the numbers that make the time steps, B and C are each normalised (Jamba)"""
        norm_eps: Positive = 1e-6
        """added to their mean square before its root"""
        chunk: Count = 16
        """tokens whose decays are made at a time; changes speed and memory, not the result"""
        dt_min: Positive = 0.001
        """smallest initial time step"""
        dt_max: Positive = 0.1
        """largest initial time step"""
        dt_floor: Positive = 1e-4
        """initial time steps below this are raised to it"""

    def __init__(self, config: Config, site) -> None:
        super().__init__()
        self.config = config
        self.inner = site.hidden_size * config.expand
        self.rank = config.dt_rank or -(-site.hidden_size // 16)
        self.parts = [self.rank, config.state_size, config.state_size]  # time steps, B, C
        self.in_proj = site.linear(site.hidden_size, 2 * self.inner, bias=config.bias)  # x and z
        self.x_proj = site.linear(self.inner, sum(self.parts))
        self.out_proj = site.linear(self.inner, site.hidden_size, bias=config.bias, writes_residual=True)
        # no rounding in the decay's parameters: they act through exponentials of sums over the whole text
        wide = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.dt_weight = nn.Parameter(torch.empty(self.inner, self.rank))
        self.dt_bias = nn.Parameter(torch.empty(self.inner, dtype=wide))
        self.A_log = nn.Parameter(torch.empty(self.inner, config.state_size, dtype=wide))
        self.D = nn.Parameter(torch.empty(self.inner, dtype=wide))
        self.conv_weight = nn.Parameter(torch.empty(config.conv_width, self.inner))
        self.conv_bias = nn.Parameter(torch.empty(self.inner)) if config.conv_bias else None
        names = ("dt_norm", "B_norm", "C_norm")
        for name, size in zip(names, self.parts, strict=True):
            self.register_parameter(name, nn.Parameter(torch.empty(size)) if config.inner_norms else None)

    @classmethod
    def check(cls, config, site):
        if config.dt_min > config.dt_max:
            yield "dt_min", f"{config.dt_min} is above dt_max; it can be {config.dt_max} at most"

    @torch.no_grad()
    def reset_parameters(self) -> None:
        config = self.config
        nn.init.uniform_(self.dt_weight, -self.rank**-0.5, self.rank**-0.5)
        draw_time_steps(self.dt_bias, config.dt_min, config.dt_max, config.dt_floor)
        self.A_log.copy_(torch.arange(1, config.state_size + 1, device=self.A_log.device).log())
        nn.init.ones_(self.D)
        draw_taps(self.conv_weight, self.conv_bias)
        for norm in (self.dt_norm, self.B_norm, self.C_norm):
            if norm is not None:
                nn.init.ones_(norm)

    def extra_flops(self, tokens: int) -> int:
        """Decay (a product and an exponential), input and update of every number of the state."""
        return 5 * tokens * self.inner * self.config.state_size

    def path(self, device: torch.device, compiled: bool) -> str:
        return (f"the scan by doubling in chunks of {self.config.chunk}, in plain operations" if compiled else
                "the scan token by token, with gradients written by hand"
                + ("" if device.type == "cpu" else ": slow here, training.compile: on is faster"))

    def new_state(self, batch: int, *, device=None, dtype=None) -> State:
        """conv [B, W - 1, I] and doc [B]: see `recurrent`; ssm [B, I, N]."""
        device, dtype = device or self.conv_weight.device, dtype or self.conv_weight.dtype
        state = new_tail(batch, self.config.conv_width, self.inner, device=device, dtype=dtype)
        state["ssm"] = torch.zeros(batch, self.inner, self.config.state_size, device=device,
                                   dtype=torch.promote_types(dtype, torch.float32))
        return state

    def forward(self, x_BTD: Tensor, *, state: State | None = None, doc_ids: Tensor | None = None) -> Tensor:
        """See `Layer.forward`. Documents are runs of equal ids."""
        config = self.config
        x_BTI, z_BTI = self.in_proj(x_BTD).chunk(2, -1)
        runs_BT = runs_of(doc_ids, state)
        seen = window(x_BTI, config.conv_width, state, runs_BT)
        bias_I = self.conv_weight.new_zeros(self.inner) if self.conv_bias is None else self.conv_bias
        (x_BTI,) = conv_silu(seen.x_BTC, self.conv_weight, bias_I, sizes=[self.inner], lead=seen.lead,
                             same_BWT=seen.same_BWT)
        wide = torch.promote_types(x_BTI.dtype, torch.float32)
        raw = self.x_proj(x_BTI).to(wide).split(self.parts, -1)
        dt_BTR, B_BTN, C_BTN = (self._normed(part, norm) for part, norm in zip(
            raw, (self.dt_norm, self.B_norm, self.C_norm), strict=True))
        with torch.autocast(x_BTI.device.type, enabled=False):
            dt_BTI = F.softplus(F.linear(dt_BTR, self.dt_weight.to(wide), self.dt_bias.to(wide)))
        y_BTI, last_BIN = selective_scan(
            x_BTI, dt_BTI, -self.A_log.to(wide).exp(), B_BTN, C_BTN, chunk=config.chunk,
            start_BIN=None if state is None else state["ssm"].to(wide),
            begins_BT=None if runs_BT is None else begins(runs_BT))
        if state is not None:
            keep_tail(state, seen, doc_ids)
            state["ssm"].copy_(last_BIN.detach())
        y_BTI = torch.addcmul(y_BTI, x_BTI.to(wide), self.D.to(wide)) * F.silu(z_BTI.to(wide))
        return self.out_proj(y_BTI.to(z_BTI.dtype))

    def _normed(self, x: Tensor, weight: Tensor | None) -> Tensor:
        if weight is None:
            return x
        return x * (x.square().mean(-1, keepdim=True) + self.config.norm_eps).rsqrt() * weight.to(x.dtype)
