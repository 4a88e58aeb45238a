"""The gated short convolution of LFM2: a mixer that sees a few tokens and remembers no more.

Shapes: B batch, T time, D hidden, W width of the convolution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from tryplicity import Mixer, State
from tryplicity_plugins.layers.recurrent import causal_conv, draw_taps, keep_tail, new_tail, runs_of, window


class ShortConv(Mixer):
    """out_proj(C * conv(B * x)): B, C and x are projections of the token, the convolution is causal, and each channel
    has its own (LFM2, arXiv:2511.23404)."""

    name = "short_conv"

    @dataclass(frozen=True)
    class Config:
        conv_width: Annotated[int, Field(ge=2, le=64)] = 3
        """tokens the convolution sees, the current one included"""
        bias: bool = False
        """whether the projections and the convolution have an offset"""

    def __init__(self, config: Config, site) -> None:
        super().__init__()
        self.config, self.hidden = config, site.hidden_size
        self.in_proj = site.linear(self.hidden, 3 * self.hidden, bias=config.bias)  # B, C, x
        self.out_proj = site.linear(self.hidden, self.hidden, bias=config.bias, writes_residual=True)
        self.conv_weight = nn.Parameter(torch.empty(config.conv_width, self.hidden))
        self.conv_bias = nn.Parameter(torch.empty(self.hidden)) if config.bias else None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        draw_taps(self.conv_weight, self.conv_bias)

    def new_state(self, batch: int, *, device=None, dtype=None) -> State:
        """conv [B, W - 1, D] and doc [B]: see `recurrent`."""
        return new_tail(batch, self.config.conv_width, self.hidden, device=device or self.conv_weight.device,
                        dtype=dtype or self.conv_weight.dtype)

    def forward(self, x_BTD: Tensor, *, state: State | None = None, doc_ids: Tensor | None = None) -> Tensor:
        """See `Layer.forward`. Documents are runs of equal ids."""
        B_BTD, C_BTD, x_BTD = self.in_proj(x_BTD).chunk(3, -1)
        seen = window(B_BTD * x_BTD, self.config.conv_width, state, runs_of(doc_ids, state))
        y_BTD = causal_conv(seen.x_BTC, self.conv_weight, self.conv_bias, seen.lead, seen.same_BWT).to(C_BTD.dtype)
        if state is not None:
            keep_tail(state, seen, doc_ids)
        return self.out_proj(C_BTD * y_BTD)
