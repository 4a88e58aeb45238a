"""Gated DeltaNet: linear attention whose state is corrected, not only added to.

Yang, Kautz and Hatamizadeh, arXiv:2412.06464, in the form of Qwen3-Next: one projection gives queries, keys and
values, which pass a short causal convolution, an output gate z, and for each head a share beta and a decay;
`delta_rule` carries a state of constant size; the heads' outputs are normalised, then gated.

Shapes: B batch, T time, D hidden, C channels of the convolution, H value heads, G heads of queries and keys, K their
dim, V value dim, W conv width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from tryplicity import Count, Mixer, Positive, Size, State
from tryplicity_plugins.layers.delta_rule import delta_rule
from tryplicity_plugins.layers.recurrent import draw_taps, draw_time_steps, keep_tail, new_tail, runs_of, window
from tryplicity_plugins.layers.ssd import conv_silu


class GatedDeltaNet(Mixer):
    """A linear-time mixer whose state forgets by a gate and is corrected by the delta rule (arXiv:2412.06464)."""

    name = "gated_deltanet"
    undecayed = ("A_log", "dt_bias")
    trials = ({"heads": 2, "value_heads": 4, "head_dim": 8, "chunk": 4},)

    @dataclass(frozen=True)
    class Config:
        heads: Count = 4
        """heads of queries and keys"""
        value_heads: Count | None = None
        """heads of values, several to a head of queries and keys; by default as many as these"""
        head_dim: Size = 64
        """size of a query and a key"""
        value_head_dim: Size | None = None
        """size of a value; by default head_dim"""
        conv_width: Annotated[int, Field(ge=2, le=64)] = 4
        """tokens the short convolution sees, the current one included"""
        chunk: Count = 64
        """tokens per block of matrix products; changes speed and memory, not the result"""
        dt_min: Positive = 0.001
        """smallest initial time step"""
        dt_max: Positive = 0.1
        """largest initial time step"""
        A_min: Positive = 0.01
        """slowest initial decay rate of a head"""
        A_max: Positive = 16.0
        """fastest initial decay rate of a head"""
        norm_eps: Positive = 1e-6
        """added to the mean square of a head's output before its root"""

    def __init__(self, config: Config, site) -> None:
        super().__init__()
        self.config = config
        self.heads, self.value_dim = config.value_heads or config.heads, config.value_head_dim or config.head_dim
        keys, values = config.heads * config.head_dim, self.heads * self.value_dim
        self.channels = [keys, keys, values]
        self.projected = [values, sum(self.channels), self.heads, self.heads]  # z; q, k and v; beta; decay
        self.in_proj = site.linear(site.hidden_size, sum(self.projected))
        self.out_proj = site.linear(values, site.hidden_size, writes_residual=True)
        # no rounding in the decay's parameters: they act through exponentials of sums over the whole text
        wide = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.A_log = nn.Parameter(torch.empty(self.heads, dtype=wide))
        self.dt_bias = nn.Parameter(torch.empty(self.heads, dtype=wide))
        self.conv_weight = nn.Parameter(torch.empty(config.conv_width, sum(self.channels)))
        self.norm_weight = nn.Parameter(torch.empty(self.value_dim))

    @classmethod
    def check(cls, config, site):
        if config.value_heads and config.value_heads % config.heads:
            nearest = max(round(config.value_heads / config.heads), 1) * config.heads
            yield "value_heads", (f"{config.value_heads} is no multiple of heads {config.heads}; the nearest is "
                                  f"{nearest}")
        for low, high in (("dt_min", "dt_max"), ("A_min", "A_max")):
            if getattr(config, low) > getattr(config, high):
                yield low, f"{getattr(config, low)} is above {high}; it can be {getattr(config, high)} at most"

    @torch.no_grad()
    def reset_parameters(self) -> None:
        config = self.config
        self.A_log.uniform_(config.A_min, config.A_max).log_()
        draw_time_steps(self.dt_bias, config.dt_min, config.dt_max, min(config.dt_min, 1e-4))
        draw_taps(self.conv_weight, None)
        nn.init.ones_(self.norm_weight)

    def extra_flops(self, tokens: int) -> int:
        """The triangular systems: half a product of chunk rows for each head's keys and values."""
        return tokens * self.heads * self.config.chunk * (self.config.head_dim + self.value_dim)

    def path(self, device: torch.device, compiled: bool) -> str:
        return f"the delta rule in chunks of {self.config.chunk}, as plain products and a triangular system"

    def new_state(self, batch: int, *, device=None, dtype=None) -> State:
        """conv [B, W - 1, C] and doc [B]: see `recurrent`; memory [B, H, K, V]."""
        device, dtype = device or self.conv_weight.device, dtype or self.conv_weight.dtype
        state = new_tail(batch, self.config.conv_width, sum(self.channels), device=device, dtype=dtype)
        state["memory"] = torch.zeros(batch, self.heads, self.config.head_dim, self.value_dim, device=device,
                                      dtype=torch.promote_types(dtype, torch.float32))
        return state

    def forward(self, x_BTD: Tensor, *, state: State | None = None, doc_ids: Tensor | None = None) -> Tensor:
        """See `Layer.forward`. Documents are runs of equal ids."""
        config = self.config
        z_BTX, qkv_BTC, beta_BTH, dt_BTH = self.in_proj(x_BTD).split(self.projected, -1)
        runs_BT = runs_of(doc_ids, state)
        seen = window(qkv_BTC, config.conv_width, state, runs_BT)
        no_bias_C = self.conv_weight.new_zeros(sum(self.channels))
        q, k, v = conv_silu(seen.x_BTC, self.conv_weight, no_bias_C, sizes=self.channels, lead=seen.lead,
                            same_BWT=seen.same_BWT)
        wide = torch.promote_types(q.dtype, torch.float32)
        q_BTHK, k_BTHK = (self._unit(t.unflatten(-1, (config.heads, -1)).to(wide)) for t in (q, k))
        g_BTH = -self.A_log.to(wide).exp() * F.softplus(dt_BTH.to(wide) + self.dt_bias.to(wide))
        y_BTHV, last_BHKV = delta_rule(
            q_BTHK * config.head_dim**-0.5, k_BTHK, v.unflatten(-1, (self.heads, -1)), g_BTH,
            beta_BTH.to(wide).sigmoid(), chunk=config.chunk, start_BHKV=None if state is None else state["memory"],
            runs_BT=runs_BT)
        if state is not None:
            keep_tail(state, seen, doc_ids)
            state["memory"].copy_(last_BHKV.detach())
        y_BTHV = y_BTHV * (y_BTHV.square().mean(-1, keepdim=True) + config.norm_eps).rsqrt() * self.norm_weight.to(wide)
        gate_BTX = F.silu(z_BTX.to(wide))
        return self.out_proj((y_BTHV.flatten(2) * gate_BTX).to(z_BTX.dtype))

    def _unit(self, x_BTGK: Tensor) -> Tensor:
        """Vectors of length one, for each of the value heads."""
        x_BTGK = x_BTGK * (x_BTGK.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
        return x_BTGK.repeat_interleave(self.heads // self.config.heads, 2)
