"""Grouped-query attention with rotary positions and a cache that never re-computes.

Shapes: B batch, T new tokens, S all tokens that are seen, D hidden, H heads, G key/value heads, K head dim.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from tryplicity import Count, Length, Mixer, Positive, Rows, Site, Size, later
from tryplicity_plugins.layers import native
from tryplicity_plugins.layers.c_structs import Description, KeptStruct, Products, kept_struct, packed, products
from tryplicity_plugins.layers.fixed_pages import FixedPages
from tryplicity_plugins.layers.masked_attention import Scores, masked_attention
from tryplicity_plugins.layers.pages import PagedState
from tryplicity_plugins.layers.rotary import RopeScaling, Rotary


class AttentionInC(ctypes.Structure):
    """attention.cpp"""

    _fields_ = [*((name, ctypes.c_int64) for name in ("heads", "kv_heads", "head_dim", "rotary_dims", "window")),
                ("scale", ctypes.c_float), ("softcap", ctypes.c_float),
                ("qkv", ctypes.c_void_p), ("out", ctypes.c_void_p), ("products", Products)]


class GroupedQueryAttention(Mixer):
    """Causal attention in which groups of heads share keys and values (Ainslie et al., arXiv:2305.13245).

    q, k and v are one product; positions are rotary (Su et al., arXiv:2104.09864) and absolute in the row, on
    neighbouring pairs of each head's dimensions. With `doc_ids` a token sees only its own document.
    A call without doc_ids continues the row's last document. See PagedState for the decoding state.
    """

    name = "gqa"
    takes_rows = True

    @dataclass(frozen=True)
    class Config:
        heads: Count = 8
        """Query heads."""
        kv_heads: Count | None = None
        """Key and value heads, a divisor of heads; by default as many as heads."""
        head_dim: Size | None = None
        """Dimensions of each head, even where they are turned; by default hidden_size / heads."""
        rope_base: Annotated[float, Field(gt=1, le=1e12)] | None = 10000.0
        """Base of the rotary wavelengths, from 2 pi to 2 pi * rope_base tokens; null: no positions."""
        qk_norm: bool = False
        """Whether queries and keys are normalised before the rotation."""
        bias: bool = later(False)
        """Whether queries, keys and values have an offset."""
        out_bias: bool = later(False)
        """Whether the output has one."""
        rotary_fraction: Annotated[float, Field(gt=0, le=1)] = later(1.0)
        """How much of each head is turned, its first dimensions."""
        rope_scaling: RopeScaling | None = later(None)
        """How the rotations are slowed down for longer texts than were learnt from."""
        qk_norm_over: Literal["head", "width"] = later("head")
        """What is normalised: each head, or all heads at once."""
        window: Length | None = later(None)
        """Tokens that one sees, itself included; by default all before it. What is behind leaves the decoding state."""
        scale: Positive | None = later(None)
        """Of the scores; by default head_dim ** -0.5."""
        softcap: Positive | None = later(None)
        """softcap * tanh(score / softcap) takes the place of the scaled scores."""
        out_norm: bool = later(False)
        """Whether what the heads give is normalised before the output matrix."""

    @classmethod
    def check(cls, config: Config, site: Site) -> Iterator[tuple[str, str]]:
        heads, kv_heads, turned = config.heads, config.kv_heads or config.heads, config.rope_base is not None
        if heads % kv_heads:
            legal = _nearest(kv_heads, [n for n in range(1, heads + 1) if heads % n == 0])
            yield "kv_heads", f"{kv_heads} does not divide heads ({heads}); the nearest that does is {legal}"
        if config.head_dim is None and (site.hidden_size % heads or (turned and site.hidden_size // heads % 2)):
            pairs = site.hidden_size // 2 if turned else site.hidden_size
            legal = _nearest(heads, [n for n in range(1, pairs + 1) if pairs % n == 0])
            nearest = f"the nearest that does is {legal}; or give head_dim" if legal else "give head_dim"
            kind = "even" if turned else "equal"
            yield "heads", f"{heads} does not cut hidden_size ({site.hidden_size}) into {kind} parts; {nearest}"
        elif turned and (config.head_dim or 0) % 2:
            yield "head_dim", (f"{config.head_dim} is odd, and rotary positions turn pairs; "
                               f"the nearest even number is {config.head_dim + 1}")
        elif turned:
            size = config.head_dim or site.hidden_size // heads
            dims = int(size * config.rotary_fraction)
            if dims % 2 or not dims:
                yield "rotary_fraction", (f"{config.rotary_fraction:g} of head_dim ({size}) is {dims}, and rotary "
                                          f"positions turn pairs; {max(2, dims + dims % 2) / size:g} is an even number")
        if not turned:
            for option, default in (("rope_scaling", None), ("rotary_fraction", 1.0)):
                if getattr(config, option) != default:
                    yield option, "there are no positions to turn with rope_base: null; leave one of them out"
        if config.qk_norm_over == "width" and not config.qk_norm:
            yield "qk_norm_over", "nothing is normalised without qk_norm: true; add it"

    def __init__(self, config: Config, site: Site) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads or config.heads
        self.head_dim = config.head_dim or site.hidden_size // config.heads
        self.window, self.scores = config.window, Scores(config.scale, config.softcap)
        H, G, K = self.heads, self.kv_heads, self.head_dim
        self.qkv = site.linear(site.hidden_size, (H + 2 * G) * K, bias=config.bias, parts=(H * K, G * K, G * K))
        self.whole_norm = config.qk_norm_over == "width"
        self.q_norm = site.norm(H * K if self.whole_norm else K) if config.qk_norm else None
        self.k_norm = site.norm(G * K if self.whole_norm else K) if config.qk_norm else None
        self.out_norm = site.norm(H * K) if config.out_norm else None
        self.out = site.linear(H * K, site.hidden_size, bias=config.out_bias, writes_residual=True)
        self.rotary = None if config.rope_base is None else Rotary(
            config.rope_base, int(K * config.rotary_fraction), config.rope_scaling, site.context_length)

    def path(self, device: torch.device, compiled: bool) -> str:
        return "torch's attention; with documents or a window under a mask, of longer texts block by block"

    def new_state(self, batch: int, *, device=None, dtype=None) -> PagedState:
        return PagedState(batch, self.kv_heads, self.head_dim, device, self.window)

    def forward(self, x_BTD: Tensor, *, state: PagedState | Rows | None = None,
                doc_ids: Tensor | None = None) -> Tensor:
        plain = state is not None and not isinstance(state, FixedPages) and doc_ids is None
        if plain and native.for_inference(x_BTD):
            told, states = kept_struct(self, self._in_c), state if isinstance(state, Rows) else (state,)
            if told is not None and all(own.fits_c() for own in states):
                return self._natively(told, x_BTD, states)
        return self._projected(self._attended(self._normed(self.qkv(x_BTD)), state, doc_ids))

    def _attended(self, qkv: Tensor, state: PagedState | FixedPages | Rows | None, doc_ids: Tensor | None) -> Tensor:
        if isinstance(state, FixedPages):
            return self._attend_once(qkv, state)
        if isinstance(state, Rows):
            return torch.cat([self._attend(qkv[i:i + 1], own, doc_ids) for i, own in enumerate(state)])
        return self._attend(qkv, state, doc_ids)

    def _normed(self, qkv: Tensor) -> Tensor:
        if self.q_norm is None:
            return qkv
        H, G, K = self.heads, self.kv_heads, self.head_dim
        if self.whole_norm:
            q, k, v = qkv.split([H * K, G * K, G * K], dim=-1)
            return torch.cat((self.q_norm(q.contiguous()), self.k_norm(k.contiguous()), v), dim=-1)
        q, k, v = qkv.unflatten(-1, (-1, K)).split([H, G, G], dim=-2)
        return torch.cat((self.q_norm(q.contiguous()), self.k_norm(k.contiguous()), v), dim=-2).flatten(-2)

    def _projected(self, y: Tensor) -> Tensor:
        return self.out(y if self.out_norm is None else self.out_norm(y))

    def _in_c(self) -> Description:
        linears = (self.qkv, self.out)
        matrices = packed(*linears) if self.q_norm is None and self.out_norm is None else None
        struct = AttentionInC(self.heads, self.kv_heads, self.head_dim, self.rotary.dims if self.rotary else 0,
                              self.window or 0, self.scores.scale or 0.0, self.scores.softcap or 0.0)
        if matrices is not None:
            struct.qkv, struct.out, struct.products = *matrices, products()
        return struct, [], linears

    def _natively(self, told: KeptStruct, x_BTD: Tensor, states: tuple[PagedState, ...]) -> Tensor:
        """All that lies between the two products in C, for one state of all rows or one a row; the products too, if
        they are packed."""
        B, T, _ = x_BTD.shape
        rows = []
        for state in states:
            state.make_room(T, x_BTD.dtype, x_BTD.device)
            rows += state.rows()
        rotation = self.rotary.table(max(rows[2::3]) + T).data_ptr() if self.rotary else None
        rows_B3 = (ctypes.c_int64 * len(rows))(*rows)
        if told.struct.qkv:
            out_BTD = torch.empty_like(x_BTD)
            native.function("packed_attention", "ppppp" "ii")(
                told.address, out_BTD.data_ptr(), x_BTD.data_ptr(), rotation, rows_B3, B, T)
        else:
            qkv = self._normed(self.qkv(x_BTD)).contiguous()
            y = qkv.new_empty(B, T, self.heads * self.head_dim)
            native.function("attention_over_pages", "ppppp" "ii")(
                told.address, y.data_ptr(), qkv.data_ptr(), rotation, rows_B3, B, T)
            out_BTD = self._projected(y)
        for state in states:
            state.advance(T)
        return out_BTD

    def _attend_once(self, qkv: Tensor, state: FixedPages) -> Tensor:
        """One token of each row, at a place of its own."""
        H, G = self.heads, self.kv_heads
        q_BHK, k_BGK, v_BGK = qkv.view(len(qkv), H + 2 * G, self.head_dim).split([H, G, G], 1)
        if self.rotary is not None:
            turns_B1P2 = self.rotary.table(state["keys"].shape[2])[state.at_B].unsqueeze(1)
            q_BHK, k_BGK = self.rotary.turned(q_BHK, turns_B1P2), self.rotary.turned(k_BGK, turns_B1P2)
        return state.attend(q_BHK, k_BGK, v_BGK, self.scores).view(len(qkv), 1, -1)

    def _attend(self, qkv: Tensor, state: PagedState | None, doc_ids: Tensor | None) -> Tensor:
        seen = 0 if state is None else state["seen"]
        B, T, _ = qkv.shape
        H, G = self.heads, self.kv_heads
        qkv = qkv.view(B, T, H + 2 * G, self.head_dim)
        qk, v, documents = qkv[:, :, :H + G], qkv[:, :, H + G:].transpose(1, 2), doc_ids
        qk = (qk if self.rotary is None else self.rotary(qk, seen)).transpose(1, 2)
        q, k = qk[:, :H], qk[:, H:]
        if state is not None:
            k, v, documents = state.remember(k, v, doc_ids)
        window = None if self.window is None or k.shape[2] <= self.window else self.window
        if documents is None and window is None and self.scores.softcap is None and (T == 1 or seen == 0):
            y_BHTK = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, scale=self.scores.scale,
                                                    enable_gqa=G != H)
        else:
            y_BHTK = masked_attention(q, k, v, documents, window, self.scores)
        return y_BHTK.transpose(1, 2).flatten(2)


def _nearest(wanted: int, legal: list[int]) -> int | None:
    return min(legal, key=lambda n: (abs(n - wanted), n), default=None)
