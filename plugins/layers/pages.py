"""The decoding state of attention: keys and values in pages, which are never computed again.

Shapes: B batch, T new tokens, S all tokens that are kept, G key/value heads, K head dim, C head dim rounded up to a
multiple of 8.
"""

from __future__ import annotations

from array import array

import torch
from torch import Tensor

from tryplicity import State
from tryplicity_plugins.layers import native
from tryplicity_plugins.layers.rotary import capacity

NO_DOCUMENT = -1  # of tokens seen before any ids were given
PAGE = 64  # tokens; attention.cpp knows it too


class PagedState(State):
    """The keys and values of the tokens so far, in pages of 64 tokens; with a window, of those that the next token may
    still see.

    `seen`, the number of tokens; `freed`, of pages behind the window, which are gone; `pages`, those after them,
    tensors [B, G * (K * 64 + 64 * C)]: of each head first the rotated keys [K, 64], then the values [64, C], in the
    dtype the layer computes them in; `documents` [B, capacity] of the same tokens once any ids were given. A page that
    is full is never written again, so clones share it.
    """

    def __init__(self, batch: int, kv_heads: int, head_dim: int, device: torch.device | None,
                 window: int | None = None) -> None:
        super().__init__(seen=0, freed=0, pages=[])
        self.batch, self.kv_heads, self.head_dim, self.device, self.window = batch, kv_heads, head_dim, device, window
        self.columns = -(-head_dim // 8) * 8
        self.page_size = kv_heads * PAGE * (head_dim + self.columns)  # numbers of one row
        self.addresses = array("q")  # of the pages

    def clone(self) -> PagedState:
        twin = PagedState(self.batch, self.kv_heads, self.head_dim, self.device, self.window)
        twin["seen"], twin["freed"], twin["pages"] = self["seen"], self["freed"], list(self["pages"])
        twin.addresses = array("q", self.addresses)
        if self["seen"] % PAGE:
            twin["pages"][-1] = page = self["pages"][-1].clone()
            twin.addresses[-1] = page.data_ptr()
        if "documents" in self:
            twin["documents"] = self["documents"].clone()
        return twin

    def fixed(self, rows: int, tokens: int) -> State | None:
        from tryplicity_plugins.layers.fixed_pages import FixedPages

        if not self["pages"] or "documents" in self:
            return None
        return FixedPages.like(self, rows, tokens)

    def make_room(self, tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        """Pages for so many more."""
        pages = self["pages"]
        for _ in range(-(-(self["seen"] + tokens) // PAGE) - self["freed"] - len(pages)):
            pages.append(torch.zeros(self.batch, self.page_size, dtype=dtype, device=device))
            self.addresses.append(pages[-1].data_ptr())

    def advance(self, tokens: int) -> None:
        """So many more have been seen. What no later one will see is let go; the last token's document is needed."""
        self["seen"] += tokens
        if self.window is None:
            return
        behind = max(0, self["seen"] - self.window) // PAGE - self["freed"]
        if behind > 0:
            del self["pages"][:behind], self.addresses[:behind]
            self["freed"] += behind
            if "documents" in self:
                self["documents"] = self["documents"][:, behind * PAGE:].clone()

    def fits_c(self) -> bool:
        return "documents" not in self and (not self["pages"] or native.for_inference(self["pages"][-1]))

    def rows(self) -> list[int]:
        """For C: each row's table of pages, counted from the first there ever was, its place in a page, the tokens
        seen."""
        table, seen = self.addresses.buffer_info()[0] - self["freed"] * self.addresses.itemsize, self["seen"]
        return [number for row in range(self.batch) for number in (table, row * self.page_size, seen)]

    def _views(self, page: Tensor) -> tuple[Tensor, Tensor]:
        """Its keys [B, G, 64, K] and values [B, G, 64, K]."""
        keys, values = page.view(self.batch, self.kv_heads, -1).split(
            [self.head_dim * PAGE, PAGE * self.columns], dim=-1)
        return (keys.unflatten(-1, (self.head_dim, PAGE)).transpose(-1, -2),
                values.unflatten(-1, (PAGE, self.columns))[..., :self.head_dim])

    def remember(self, k_BGTK: Tensor, v_BGTK: Tensor, doc_ids: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Write down new tokens; the keys and values [B, G, S, K] and documents [B, S] of all that these may see.
        Gradients reach the new tokens only."""
        seen, new = self["seen"], k_BGTK.shape[2]
        end = seen + new
        start = 0 if self.window is None else max(0, seen + 1 - self.window)
        self._write(k_BGTK, v_BGTK)
        documents = self._documents(new, doc_ids, start)
        k, v = k_BGTK, v_BGTK
        if seen > start and k.requires_grad:
            old_k, old_v = self.read(seen, start)
            k, v = torch.cat((old_k, k), 2), torch.cat((old_v, v), 2)
        elif seen > start:
            k, v = self.read(end, start)
        self.advance(new)
        return k, v, documents

    def _write(self, k_BGTK: Tensor, v_BGTK: Tensor) -> None:
        seen, new = self["seen"], k_BGTK.shape[2]
        self.make_room(new, k_BGTK.dtype, k_BGTK.device)
        done = 0
        while done < new:
            page, place = divmod(seen + done, PAGE)
            count = min(PAGE - place, new - done)
            views = self._views(self["pages"][page - self["freed"]])
            for view, value in zip(views, (k_BGTK, v_BGTK), strict=True):
                view[:, :, place:place + count].copy_(value[:, :, done:done + count].detach())
            done += count

    def _documents(self, new: int, doc_ids: Tensor | None, start: int) -> Tensor | None:
        """Write down the new tokens' ids; those of all tokens from `start` on, None where there never were any."""
        known = self.get("documents")
        if doc_ids is None and known is None:
            return None
        gone = self["freed"] * PAGE
        seen, end = self["seen"] - gone, self["seen"] - gone + new
        if doc_ids is None:  # goes on with each row's last document
            doc_ids = known[:, seen - 1:seen].expand(-1, new)
        if known is None or known.shape[1] < end:
            self["documents"] = doc_ids.new_full((len(doc_ids), capacity(end)), NO_DOCUMENT)
            if known is not None:
                self["documents"][:, :seen] = known[:, :seen]
        self["documents"][:, seen:end] = doc_ids
        return self["documents"][:, start - gone:end]

    def read(self, end: int, start: int = 0) -> tuple[Tensor, Tensor]:
        """The keys and values of tokens `start` to `end`, [B, G, S, K]."""
        first, gone = start // PAGE, self["freed"]
        views = [self._views(page) for page in self["pages"][first - gone:-(-end // PAGE) - gone]]
        return tuple(torch.cat(parts, 2)[:, :, start - first * PAGE:end - first * PAGE]
                     for parts in zip(*views, strict=True))
