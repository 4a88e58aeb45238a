"""Grouped-query attention with rotary positions and a cache that never re-computes.

Shapes: B batch, T new tokens, S all tokens so far, D hidden, H heads, G key/value heads, K head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from tryplicity import Mixer, Site, State

NO_DOCUMENT = -1  # of tokens seen before any ids were given


class GroupedQueryAttention(Mixer):
    """Causal attention in which groups of heads share keys and values (Ainslie et al., arXiv:2305.13245).

    q, k and v are one product; positions are rotary (Su et al., arXiv:2104.09864) and absolute in the row, on
    neighbouring pairs of each head's dimensions. With `doc_ids` a token sees only its own document.
    State: `keys`, `values` [B, G, capacity, K], rotated, in the dtype the layer computes them in, growing by
    doubling; `documents` [B, capacity] once any ids were given; `seen`, the number of tokens. A call without
    doc_ids continues the row's last document.
    """

    name = "gqa"

    @dataclass(frozen=True)
    class Config:
        heads: Annotated[int, Field(gt=0)] = 8
        """Query heads."""
        kv_heads: Annotated[int, Field(gt=0)] | None = None
        """Key and value heads, a divisor of heads; by default as many as heads."""
        head_dim: Annotated[int, Field(gt=0)] | None = None
        """Dimensions of each head, even; by default hidden_size / heads."""
        rope_base: Annotated[float, Field(gt=1)] = 10000.0
        """Base of the rotary wavelengths, from 2 pi to 2 pi * rope_base tokens."""
        qk_norm: bool = False
        """Whether each head's query and key are normalised before the rotation."""

    @classmethod
    def check(cls, config: Config, site: Site) -> Iterator[tuple[str, str]]:
        heads, kv_heads = config.heads, config.kv_heads or config.heads
        if heads % kv_heads:
            legal = _nearest(kv_heads, [n for n in range(1, heads + 1) if heads % n == 0])
            yield "kv_heads", f"{kv_heads} does not divide heads ({heads}); the nearest that does is {legal}"
        if config.head_dim is None and (site.hidden_size % heads or site.hidden_size // heads % 2):
            pairs = site.hidden_size // 2
            legal = _nearest(heads, [n for n in range(1, pairs + 1) if pairs % n == 0])
            nearest = f"the nearest that does is {legal}; or give head_dim" if legal else "give head_dim"
            yield "heads", f"{heads} does not cut hidden_size ({site.hidden_size}) into even parts; {nearest}"
        if config.head_dim is not None and config.head_dim % 2:
            yield "head_dim", (f"{config.head_dim} is odd, and rotary positions turn pairs; "
                               f"the nearest even number is {config.head_dim + 1}")

    def __init__(self, config: Config, site: Site) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads or config.heads
        self.head_dim = config.head_dim or site.hidden_size // config.heads
        self.rope_base = config.rope_base
        self.qkv = site.linear(site.hidden_size, (self.heads + 2 * self.kv_heads) * self.head_dim)
        self.q_norm = site.norm(self.head_dim) if config.qk_norm else None
        self.k_norm = site.norm(self.head_dim) if config.qk_norm else None
        self.out = site.linear(self.heads * self.head_dim, site.hidden_size, writes_residual=True)
        rotation = torch.empty(site.context_length, self.head_dim // 2, 2)
        self.register_buffer("rotation", rotation, persistent=False)

    def reset_parameters(self) -> None:
        self.rotation.copy_(self._rotation(len(self.rotation)))

    def _rotation(self, positions: int) -> Tensor:
        """cos and sin of every position's angles, [positions, K/2, 2] in fp32."""
        pairs = torch.arange(self.head_dim // 2, dtype=torch.float64, device="cpu")
        speed = self.rope_base ** (-2 * pairs / self.head_dim)
        angle = torch.arange(positions, dtype=torch.float64, device="cpu")[:, None] * speed
        return torch.stack((angle.cos(), angle.sin()), -1).float()

    def _rotate(self, x_BTHK: Tensor, start: int) -> Tensor:
        B, T, H, K = x_BTHK.shape
        end, dtype = start + T, x_BTHK.dtype
        if end > len(self.rotation) or self.rotation.dtype != torch.float32:  # longer text, or model.to(bf16)
            self.rotation = self._rotation(_capacity(end)).to(self.rotation.device)
        turn_T1P = torch.view_as_complex(self.rotation[start:end, None])
        if dtype.itemsize < 4:
            x_BTHK = x_BTHK.float()  # complex numbers have no bf16
        pairs_BTHP = torch.view_as_complex(x_BTHK.view(B, T, H, K // 2, 2))
        return torch.view_as_real(pairs_BTHP * turn_T1P).view(B, T, H, K).to(dtype)

    def new_state(self, batch: int, *, device=None, dtype=None) -> State:
        return State(seen=0)

    def forward(self, x_BTD: Tensor, *, state: State | None = None, doc_ids: Tensor | None = None) -> Tensor:
        seen = 0 if state is None else state["seen"]
        B, T, _ = x_BTD.shape
        H, G = self.heads, self.kv_heads
        qkv = self.qkv(x_BTD).view(B, T, H + 2 * G, self.head_dim)
        qk, v = qkv[:, :, :H + G], qkv[:, :, H + G:].transpose(1, 2)
        if self.q_norm is not None:
            qk = torch.cat((self.q_norm(qk[:, :, :H]), self.k_norm(qk[:, :, H:])), dim=2)
        qk = self._rotate(qk, seen).transpose(1, 2)
        q, k, documents = qk[:, :H], qk[:, H:], doc_ids
        if state is not None:
            k, v, documents = _remember(state, k, v, doc_ids)
        mask = None
        if documents is not None:
            mask = documents[:, seen:, None] == documents[:, None, :]
            if T > 1:
                mask = mask & _causal(T, seen, x_BTD.device)
            mask = mask.unsqueeze(1)
        elif T > 1 and seen > 0:
            mask = _causal(T, seen, x_BTD.device)
        y_BHTK = F.scaled_dot_product_attention(q, k, v, mask, is_causal=T > 1 and mask is None,
                                                enable_gqa=G != H)
        return self.out(y_BHTK.transpose(1, 2).flatten(2))


def _causal(new: int, seen: int, device: torch.device) -> Tensor:
    return torch.ones(new, seen + new, dtype=torch.bool, device=device).tril(seen)


def _capacity(tokens: int) -> int:
    """The cache's length for so many tokens: a power of two, whatever the steps that led there."""
    return max(64, 1 << (tokens - 1).bit_length())


def _write(state: State, name: str, value: Tensor, seen: int, dim: int, empty: int = 0) -> None:
    """Put `value` at `seen` along `dim`, after making room; places never written hold `empty`."""
    old, end = state.get(name), seen + value.shape[dim]
    if old is None or old.shape[dim] < end:
        shape = list(value.shape)
        shape[dim] = _capacity(end)
        state[name] = value.new_full(shape, empty)
        if old is not None:
            state[name].narrow(dim, 0, seen).copy_(old.narrow(dim, 0, seen))
    state[name].narrow(dim, seen, end - seen).copy_(value.detach())


def _remember(state: State, k: Tensor, v: Tensor,
              doc_ids: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Append to the cache; all keys, values and documents so far. Gradients reach the new tokens only."""
    seen = state["seen"]
    end = seen + k.shape[2]
    _write(state, "keys", k, seen, 2)
    _write(state, "values", v, seen, 2)
    documents = None
    if doc_ids is not None or "documents" in state:
        if doc_ids is None:  # goes on with each row's last document
            doc_ids = state["documents"][:, seen - 1:seen].expand(-1, end - seen)
        _write(state, "documents", doc_ids, seen, 1, empty=NO_DOCUMENT)
        documents = state["documents"][:, :end]
    state["seen"] = end
    if seen > 0:
        old_k, old_v = state["keys"][:, :, :seen], state["values"][:, :, :seen]
        if k.requires_grad:
            k, v = torch.cat((old_k, k), 2), torch.cat((old_v, v), 2)
        else:
            k, v = state["keys"][:, :, :end], state["values"][:, :, :end]
    return k, v, documents


def _nearest(wanted: int, legal: list[int]) -> int | None:
    return min(legal, key=lambda n: (abs(n - wanted), n), default=None)
