"""Keys and values of sequences that are decoded together, at addresses that stay: see `State.fixed`.

Shapes: B rows, S places for tokens, H heads, G key/value heads, X = H / G heads that share a key, K head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tryplicity import State
from tryplicity_plugins.layers.masked_attention import Scores
from tryplicity_plugins.layers.pages import PAGE, PagedState


class FixedPages(State):
    """keys and values [B, G, S, K], of each row the pages of a PagedState one after the other; seen int64 [B], how many
    tokens of each. One token more of each row is a function of these tensors alone: where it is written and what it
    sees are numbers on the device.
    """

    window: int | None = None

    @classmethod
    def like(cls, own: PagedState, rows: int, tokens: int) -> FixedPages:
        page = own["pages"][-1]
        keys = page.new_zeros(rows, own.kv_heads, tokens, own.head_dim)
        room = cls(keys=keys, values=torch.zeros_like(keys),
                   seen=torch.zeros(rows, dtype=torch.int64, device=page.device))
        room.window = own.window
        return room

    def put(self, row: int, own: PagedState) -> None:
        seen, first = own["seen"], own["freed"] * PAGE
        for held, read in zip((self["keys"], self["values"]), own.read(seen, first), strict=True):
            held[row, :, first:seen].copy_(read[0])
        self["seen"][row] = seen

    def take(self, row: int, own: PagedState) -> None:
        before, seen = own["seen"], int(self["seen"][row])
        if seen > before:
            k_1GTK, v_1GTK = (self[name][row:row + 1, :, before:seen] for name in ("keys", "values"))
            own._write(k_1GTK, v_1GTK)
            own.advance(seen - before)

    @property
    def at_B(self) -> Tensor:
        """Where the next token of each row goes. A row in which nobody sits stays at the last place."""
        return self["seen"].clamp(max=self["keys"].shape[2] - 1)

    def attend(self, q_BHK: Tensor, k_BGK: Tensor, v_BGK: Tensor, scores: Scores) -> Tensor:
        """[B, H, K]: write down a new token of each row; what it sees of those before it and of itself."""
        at_B = self.at_B
        place_BG1K = at_B[:, None, None, None].expand_as(k_BGK[:, :, None])
        self["keys"].scatter_(2, place_BG1K, k_BGK.to(self["keys"].dtype)[:, :, None])
        self["values"].scatter_(2, place_BG1K, v_BGK.to(self["values"].dtype)[:, :, None])
        self["seen"].add_(1)
        return attention_from(at_B, q_BHK, self["keys"], self["values"], scores, self.window)


def attention_from(at_B: Tensor, q_BHK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, scores: Scores,
                   window: int | None = None) -> Tensor:
    """[B, H, K]: what a token at a place of its own in each row sees of the places up to there."""
    (B, H, K), (G, S) = q_BHK.shape, k_BGSK.shape[1:3]
    wide = torch.promote_types(q_BHK.dtype, torch.float32)
    score_BGXS = (q_BHK.view(B, G, H // G, K) @ k_BGSK.mT).to(wide)
    score_BGXS = score_BGXS * (K ** -0.5 if scores.scale is None else scores.scale)
    if scores.softcap is not None:
        score_BGXS = (score_BGXS / scores.softcap).tanh() * scores.softcap
    place_S = torch.arange(S, device=k_BGSK.device)
    seen_BS = place_S <= at_B[:, None]
    if window is not None:
        seen_BS = seen_BS & (place_S > at_B[:, None] - window)
    p_BGXS = score_BGXS.masked_fill(~seen_BS[:, None, None], -torch.inf).softmax(-1)
    return (p_BGXS.to(v_BGSK.dtype) @ v_BGSK).reshape(B, H, K)
