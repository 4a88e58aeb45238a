"""Grouped-query attention with rotary positions and a cache that never re-computes.

Shapes: B batch, T new tokens, S all tokens so far, D hidden, H heads, G key/value heads, K head dim, C head dim rounded
up to a multiple of 8.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from tryplicity import Count, Mixer, Rows, Site, Size, State, later
from tryplicity_plugins.layers import native
from tryplicity_plugins.layers.masked_attention import masked_attention
from tryplicity_plugins.layers.prepared import Prepared, Products, Told, packed, prepared, products

NO_DOCUMENT = -1  # of tokens seen before any ids were given
PAGE = 64  # tokens; attention.cpp knows it too


class PagedState(State):
    """The keys and values of the tokens so far, in pages of 64 tokens.

    `seen`, the number of tokens; `pages`, tensors [B, G * (K * 64 + 64 * C)]: of each head first the rotated keys
    [K, 64], then the values [64, C], in the dtype the layer computes them in; `documents` [B, capacity] once any ids
    were given. A page that is full is never written again, so clones share it.
    """

    def __init__(self, batch: int, kv_heads: int, head_dim: int, device: torch.device | None) -> None:
        super().__init__(seen=0, pages=[])
        self.batch, self.kv_heads, self.head_dim, self.device = batch, kv_heads, head_dim, device
        self.columns = -(-head_dim // 8) * 8
        self.page_size = kv_heads * PAGE * (head_dim + self.columns)  # numbers of one row
        self.addresses = array("q")  # of the pages

    def clone(self) -> PagedState:
        twin = PagedState(self.batch, self.kv_heads, self.head_dim, self.device)
        twin["seen"], twin["pages"] = self["seen"], list(self["pages"])
        twin.addresses = array("q", self.addresses)
        if self["seen"] % PAGE:
            twin["pages"][-1] = page = self["pages"][-1].clone()
            twin.addresses[-1] = page.data_ptr()
        if "documents" in self:
            twin["documents"] = self["documents"].clone()
        return twin

    def make_room(self, tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        """Pages for so many more."""
        pages = self["pages"]
        for _ in range(-(-(self["seen"] + tokens) // PAGE) - len(pages)):
            pages.append(torch.zeros(self.batch, self.page_size, dtype=dtype, device=device))
            self.addresses.append(pages[-1].data_ptr())

    def fits_c(self) -> bool:
        return "documents" not in self and (not self["pages"] or native.works_on(self["pages"][-1]))

    def rows(self) -> list[int]:
        """For C: each row's table of pages, its place in a page, the tokens seen."""
        table, seen = self.addresses.buffer_info()[0], self["seen"]
        return [number for row in range(self.batch) for number in (table, row * self.page_size, seen)]

    def _views(self, page: Tensor) -> tuple[Tensor, Tensor]:
        """Its keys [B, G, 64, K] and values [B, G, 64, K]."""
        keys, values = page.view(self.batch, self.kv_heads, -1).split(
            [self.head_dim * PAGE, PAGE * self.columns], dim=-1)
        return (keys.unflatten(-1, (self.head_dim, PAGE)).transpose(-1, -2),
                values.unflatten(-1, (PAGE, self.columns))[..., :self.head_dim])

    def append(self, k_BGTK: Tensor, v_BGTK: Tensor) -> None:
        """Write down new tokens' keys and values."""
        seen, new = self["seen"], k_BGTK.shape[2]
        self.make_room(new, k_BGTK.dtype, k_BGTK.device)
        done = 0
        while done < new:
            page, place = divmod(seen + done, PAGE)
            count = min(PAGE - place, new - done)
            for view, value in zip(self._views(self["pages"][page]), (k_BGTK, v_BGTK), strict=True):
                view[:, :, place:place + count].copy_(value[:, :, done:done + count].detach())
            done += count
        self["seen"] = seen + new

    def read(self, tokens: int) -> tuple[Tensor, Tensor]:
        """The keys and values of the first so many, [B, G, S, K]."""
        views = [self._views(page) for page in self["pages"][:-(-tokens // PAGE)]]
        return tuple(torch.cat(parts, 2)[:, :, :tokens] for parts in zip(*views, strict=True))


class AttentionInC(ctypes.Structure):
    """attention.cpp"""

    _fields_ = [*((name, ctypes.c_int64) for name in ("heads", "kv_heads", "head_dim")),
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
        """Dimensions of each head, even; by default hidden_size / heads."""
        rope_base: Annotated[float, Field(gt=1, le=1e12)] | None = 10000.0
        """Base of the rotary wavelengths, from 2 pi to 2 pi * rope_base tokens; null: no positions."""
        qk_norm: bool = False
        """Whether each head's query and key are normalised before the rotation."""
        bias: bool = later(False)
        """Whether queries, keys and values have an offset."""
        out_bias: bool = later(False)
        """Whether the output has one."""

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
        self.qkv = site.linear(site.hidden_size, (self.heads + 2 * self.kv_heads) * self.head_dim, bias=config.bias)
        self.q_norm = site.norm(self.head_dim) if config.qk_norm else None
        self.k_norm = site.norm(self.head_dim) if config.qk_norm else None
        self.out = site.linear(self.heads * self.head_dim, site.hidden_size, bias=config.out_bias,
                               writes_residual=True)
        rotation = torch.empty(site.context_length, self.head_dim // 2, 2)
        self.register_buffer("rotation", rotation, persistent=False)

    def reset_parameters(self) -> None:
        self.rotation.copy_(self._rotation(len(self.rotation)))

    def _rotation(self, positions: int) -> Tensor:
        """cos and sin of every position's angles, [positions, K/2, 2] in fp32; without positions those of no turn."""
        if self.rope_base is None:
            return torch.tensor([1.0, 0.0], device="cpu").expand(positions, self.head_dim // 2, 2).clone()
        pairs = torch.arange(self.head_dim // 2, dtype=torch.float64, device="cpu")
        speed = self.rope_base ** (-2 * pairs / self.head_dim)
        angle = torch.arange(positions, dtype=torch.float64, device="cpu")[:, None] * speed
        return torch.stack((angle.cos(), angle.sin()), -1).float()

    def _table(self, end: int) -> Tensor:
        """The rotations of positions up to `end` at least."""
        if end > len(self.rotation) or self.rotation.dtype != torch.float32:  # longer text, or model.to(bf16)
            self.rotation = self._rotation(_capacity(end)).to(self.rotation.device)
        return self.rotation

    def _rotate(self, x_BTHK: Tensor, start: int) -> Tensor:
        if self.rope_base is None:
            return x_BTHK
        B, T, H, K = x_BTHK.shape
        end, dtype = start + T, x_BTHK.dtype
        if torch.compiler.is_compiling():  # which fuses no complex numbers
            cos_T1P, sin_T1P = self._table(end)[start:end, None].unbind(-1)
            wide_BTHK = x_BTHK.to(torch.promote_types(dtype, torch.float32))
            even_BTHP, odd_BTHP = wide_BTHK.unflatten(-1, (K // 2, 2)).unbind(-1)
            turned = (even_BTHP * cos_T1P - odd_BTHP * sin_T1P, even_BTHP * sin_T1P + odd_BTHP * cos_T1P)
            return torch.stack(turned, -1).view(B, T, H, K).to(dtype)
        turn_T1P = torch.view_as_complex(self._table(end)[start:end, None])
        if dtype.itemsize < 4:
            x_BTHK = x_BTHK.float()  # complex numbers have no bf16
        pairs_BTHP = torch.view_as_complex(x_BTHK.view(B, T, H, K // 2, 2))
        return torch.view_as_real(pairs_BTHP * turn_T1P).view(B, T, H, K).to(dtype)

    def path(self, device: torch.device, compiled: bool) -> str:
        return "torch's attention; with documents under a mask, of longer texts block by block"

    def new_state(self, batch: int, *, device=None, dtype=None) -> PagedState:
        return PagedState(batch, self.kv_heads, self.head_dim, device)

    def forward(self, x_BTD: Tensor, *, state: PagedState | Rows | None = None,
                doc_ids: Tensor | None = None) -> Tensor:
        if state is not None and doc_ids is None and native.works_on(x_BTD):
            told, states = prepared(self, self._in_c), state if isinstance(state, Rows) else (state,)
            if told is not None and all(own.fits_c() for own in states):
                return self._natively(told, x_BTD, states)
        qkv = self._normed(self.qkv(x_BTD))
        if isinstance(state, Rows):
            y = torch.cat([self._attend(qkv[i:i + 1], own, doc_ids) for i, own in enumerate(state)])
        else:
            y = self._attend(qkv, state, doc_ids)
        return self.out(y)

    def _normed(self, qkv: Tensor) -> Tensor:
        if self.q_norm is None:
            return qkv
        q, k, v = qkv.unflatten(-1, (-1, self.head_dim)).split([self.heads, self.kv_heads, self.kv_heads], dim=-2)
        return torch.cat((self.q_norm(q.contiguous()), self.k_norm(k.contiguous()), v), dim=-2).flatten(-2)

    def _in_c(self) -> Told:
        linears = (self.qkv, self.out)
        matrices = packed(*linears) if self.q_norm is None else None
        struct = AttentionInC(self.heads, self.kv_heads, self.head_dim)
        if matrices is not None:
            struct.qkv, struct.out, struct.products = *matrices, products()
        return struct, [], linears

    def _natively(self, told: Prepared, x_BTD: Tensor, states: tuple[PagedState, ...]) -> Tensor:
        """All that lies between the two products in C, for one state of all rows or one a row; the products too, if
        they are packed."""
        B, T, _ = x_BTD.shape
        rows = []
        for state in states:
            state.make_room(T, x_BTD.dtype, x_BTD.device)
            rows += state.rows()
        rotation = self._table(max(rows[2::3]) + T).data_ptr()
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
            out_BTD = self.out(y)
        for state in states:
            state["seen"] += T
        return out_BTD

    def _attend(self, qkv: Tensor, state: PagedState | None, doc_ids: Tensor | None) -> Tensor:
        seen = 0 if state is None else state["seen"]
        B, T, _ = qkv.shape
        H, G = self.heads, self.kv_heads
        qkv = qkv.view(B, T, H + 2 * G, self.head_dim)
        v = qkv[:, :, H + G:].transpose(1, 2)
        qk = self._rotate(qkv[:, :, :H + G], seen).transpose(1, 2)
        q, k, documents = qk[:, :H], qk[:, H:], doc_ids
        if state is not None:
            k, v, documents = _remember(state, k, v, doc_ids)
        if documents is None and (T == 1 or seen == 0):
            y_BHTK = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, enable_gqa=G != H)
        else:
            y_BHTK = masked_attention(q, k, v, documents)
        return y_BHTK.transpose(1, 2).flatten(2)


def _capacity(tokens: int) -> int:
    """A power of two, whatever the steps that led there."""
    return max(64, 1 << (tokens - 1).bit_length())


def _remember(state: PagedState, k: Tensor, v: Tensor,
              doc_ids: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Append to the cache; all keys, values and documents so far. Gradients reach the new tokens only."""
    seen = state["seen"]
    state.append(k, v)
    end, documents = state["seen"], None
    if doc_ids is not None or "documents" in state:
        if doc_ids is None:  # goes on with each row's last document
            doc_ids = state["documents"][:, seen - 1:seen].expand(-1, end - seen)
        known = state.get("documents")
        if known is None or known.shape[1] < end:
            state["documents"] = doc_ids.new_full((len(doc_ids), _capacity(end)), NO_DOCUMENT)
            if known is not None:
                state["documents"][:, :seen] = known[:, :seen]
        state["documents"][:, seen:end] = doc_ids
        documents = state["documents"][:, :end]
    if seen > 0:
        if k.requires_grad:
            old_k, old_v = state.read(seen)
            k, v = torch.cat((old_k, k), 2), torch.cat((old_v, v), 2)
        else:
            k, v = state.read(end)
    return k, v, documents


def _nearest(wanted: int, legal: list[int]) -> int | None:
    return min(legal, key=lambda n: (abs(n - wanted), n), default=None)
