"""Multi-head latent attention: what is kept of a token is one short vector, whatever the number of heads.

DeepSeek-V2 (arXiv:2405.04434, section 2.1). Keys and values of all heads are made from a latent of the token, beside
one rotated key that the heads share. A text that is read has them made; a few new tokens are decoded without: each
head's queries are brought into the latent's space instead, where the latents are keys and values themselves.

Shapes: B batch, T new tokens, S all tokens that are seen, D hidden, H heads, N dims of a head without positions, P with
them, V of a value, R latent, C what is kept of a token (R + P).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from tryplicity import Count, Mixer, Positive, Site, Size
from tryplicity_plugins.layers.latents import FixedLatents, LatentState
from tryplicity_plugins.layers.masked_attention import Scores, masked_attention
from tryplicity_plugins.layers.rotary import RopeScaling, Rotary


class LatentAttention(Mixer):
    """Causal attention whose decoding state is a latent and one rotated key for each token (DeepSeek-V2,
    arXiv:2405.04434). With `doc_ids` a token sees only its own document; a call without continues the row's last.

    What makes keys and values of latents is no linear of the spec but full numbers: decoding multiplies by it from the
    other side.
    """

    name = "mla"
    trials = ({"heads": 4, "head_dim": 8, "rope_dim": 4, "latent_size": 16, "query_latent_size": 12},)

    @dataclass(frozen=True)
    class Config:
        heads: Count = 8
        """how many"""
        head_dim: Size = 64
        """dimensions of a query and a key without positions (qk_nope_head_dim)"""
        rope_dim: Size = 32
        """even: those beside them with positions, of which all heads share the key (qk_rope_head_dim)"""
        value_head_dim: Size | None = None
        """size of a value; by default head_dim"""
        latent_size: Size = 256
        """of a token, that keys and values are made from (kv_lora_rank)"""
        query_latent_size: Size | None = None
        """of a token, that queries are made from (q_lora_rank); by default they are made from the token itself"""
        rope_base: Annotated[float, Field(gt=1, le=1e12)] = 10000.0
        """base of the rotary wavelengths"""
        rope_scaling: RopeScaling | None = None
        """how the rotations are slowed down for longer texts than were learnt from"""
        scale: Positive | None = None
        """of the scores; by default (head_dim + rope_dim) ** -0.5"""
        bias: bool = False
        """whether what makes the latents, and the output, have an offset"""

    @classmethod
    def check(cls, config, site):
        if config.rope_dim % 2:
            yield "rope_dim", (f"{config.rope_dim} is odd, and rotary positions turn pairs; the nearest even number "
                               f"is {config.rope_dim + 1}")
        if (config.value_head_dim or 0) > config.head_dim + config.rope_dim:
            yield "value_head_dim", (f"{config.value_head_dim} is above head_dim + rope_dim; it can be "
                                     f"{config.head_dim + config.rope_dim} at most")

    def __init__(self, config: Config, site: Site) -> None:
        super().__init__()
        self.config, self.heads = config, config.heads
        self.value_dim = config.value_head_dim or config.head_dim
        hidden, queries = site.hidden_size, config.heads * (config.head_dim + config.rope_dim)
        self.q_down = self.q_norm = None
        if config.query_latent_size:
            self.q_down = site.linear(hidden, config.query_latent_size, bias=config.bias)
            self.q_norm = site.norm(config.query_latent_size)
        self.q = site.linear(config.query_latent_size or hidden, queries)
        self.kv_down = site.linear(hidden, config.latent_size + config.rope_dim, bias=config.bias)
        self.kv_norm = site.norm(config.latent_size)
        self.kv_up = nn.Parameter(torch.empty(config.heads, config.head_dim + self.value_dim, config.latent_size))
        self.out = site.linear(config.heads * self.value_dim, hidden, bias=config.bias, writes_residual=True)
        self.rotary = Rotary(config.rope_base, config.rope_dim, config.rope_scaling, site.context_length)
        self.scores = Scores(config.scale or (config.head_dim + config.rope_dim) ** -0.5)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.kv_up, std=0.02)

    def path(self, device: torch.device, compiled: bool) -> str:
        return "keys and values made of the latents; with documents under a mask, of longer texts block by block"

    def new_state(self, batch: int, *, device=None, dtype=None) -> LatentState:
        return LatentState(seen=0, latents=None, documents=None)

    def forward(self, x_BTD: Tensor, *, state: LatentState | FixedLatents | None = None,
                doc_ids: Tensor | None = None) -> Tensor:
        config, (B, T, _) = self.config, x_BTD.shape
        given = x_BTD if self.q_down is None else self.q_norm(self.q_down(x_BTD))
        q_BTHN, turn_BTHP = self.q(given).view(B, T, self.heads, -1).split([config.head_dim, config.rope_dim], -1)
        latent_BTR, key_BTP = self.kv_down(x_BTD).split([config.latent_size, config.rope_dim], -1)
        turn_BTHP, key_BT1P = self._turned(turn_BTHP, state), self._turned(key_BTP[:, :, None], state)
        new_BTC = torch.cat([self.kv_norm(latent_BTR.contiguous()), key_BT1P[:, :, 0]], -1)
        if isinstance(state, FixedLatents):
            y_BHTC = state.attend(self._into_latents(q_BTHN, turn_BTHP), new_BTC, self.scores)
            return self.out(self._out_of_latents(y_BHTC).flatten(2))
        seen = 0 if state is None else state["seen"]
        seen_BSC, documents = (new_BTC, doc_ids) if state is None else state.remember(new_BTC, doc_ids)
        less_work_up_to = (config.head_dim + self.value_dim) // 2
        few = state is not None and less_work_up_to >= T
        y_BTHV = (self._in_latents if few else self._made)(q_BTHN, turn_BTHP, seen_BSC, documents, seen)
        return self.out(y_BTHV.flatten(2))

    def _turned(self, x_BTHP: Tensor, state: LatentState | FixedLatents | None) -> Tensor:
        """By the places of its tokens."""
        if isinstance(state, FixedLatents):
            turns_B11P2 = self.rotary.table(state["latents"].shape[1])[state.at_B][:, None, None]
            return self.rotary.turned(x_BTHP, turns_B11P2)
        return self.rotary(x_BTHP, 0 if state is None else state["seen"])

    def _made(self, q_BTHN: Tensor, turn_BTHP: Tensor, seen_BSC: Tensor, documents: Tensor | None,
              seen: int) -> Tensor:
        """With keys and values made of the latents."""
        latent_BSR, key_BSP = seen_BSC.split([self.config.latent_size, self.config.rope_dim], -1)
        made = F.linear(latent_BSR, self.kv_up.flatten(0, 1)).unflatten(-1, (self.heads, -1))
        k_BSHN, v_BSHV = made.split([self.config.head_dim, self.value_dim], -1)
        key_BSHP = key_BSP[:, :, None].expand(-1, -1, self.heads, -1)
        q, k = torch.cat([q_BTHN, turn_BTHP], -1), torch.cat([k_BSHN, key_BSHP.to(k_BSHN.dtype)], -1)
        v = F.pad(v_BSHV, (0, k.shape[-1] - self.value_dim))  # of one size with keys, as the kernels want them
        y_BHTK = self._attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), documents, seen)
        return y_BHTK[..., :self.value_dim].transpose(1, 2)

    def _in_latents(self, q_BTHN: Tensor, turn_BTHP: Tensor, seen_BSC: Tensor, documents: Tensor | None,
                    seen: int) -> Tensor:
        """With queries in the latents' space: one key of all heads, which is what is kept, and its value too."""
        q_BHTC = self._into_latents(q_BTHN, turn_BTHP)
        kept_B1SC = seen_BSC[:, None].to(q_BHTC.dtype)
        return self._out_of_latents(self._attend(q_BHTC, kept_B1SC, kept_B1SC, documents, seen))

    def _into_latents(self, q_BTHN: Tensor, turn_BTHP: Tensor) -> Tensor:
        k_HNR = self.kv_up[:, :self.config.head_dim]
        q_BHTR = q_BTHN.transpose(1, 2) @ k_HNR.to(q_BTHN.dtype)
        return torch.cat([q_BHTR, turn_BTHP.transpose(1, 2).to(q_BHTR.dtype)], -1)

    def _out_of_latents(self, y_BHTC: Tensor) -> Tensor:
        v_HVR = self.kv_up[:, self.config.head_dim:]
        y_BHTV = y_BHTC[..., :self.config.latent_size] @ v_HVR.to(y_BHTC.dtype).transpose(1, 2)
        return y_BHTV.transpose(1, 2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, seen: int) -> Tensor:
        T = q.shape[2]
        if documents is None and (T == 1 or seen == 0):
            return F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, scale=self.scores.scale,
                                                  enable_gqa=q.shape[1] != k.shape[1])
        return masked_attention(q, k, v, documents, None, self.scores)
