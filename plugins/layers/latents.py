"""The decoding state of multi-head latent attention: of each token a latent and one rotated key, in one vector.

Shapes: B batch, T new tokens, S places for tokens, H heads, C numbers that are kept of a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tryplicity import State
from tryplicity_plugins.layers.fixed_pages import attention_from
from tryplicity_plugins.layers.masked_attention import Scores
from tryplicity_plugins.layers.rotary import capacity

NO_DOCUMENT = -1  # of tokens seen before any ids were given


class LatentState(State):
    """seen, the number of tokens; latents [B, capacity, C] of these, in the dtype the layer computes them in;
    documents [B, capacity] once any ids were given."""

    def fixed(self, rows: int, tokens: int) -> FixedLatents | None:
        if self["latents"] is None or self["documents"] is not None:
            return None
        kept = self["latents"]
        return FixedLatents(latents=kept.new_zeros(rows, tokens, kept.shape[2]),
                            seen=torch.zeros(rows, dtype=torch.int64, device=kept.device))

    def remember(self, new_BTC: Tensor, doc_ids: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Write down new tokens: the vectors [B, S, C] of all so far, and their documents if any are known. Gradients
        reach the new ones only."""
        seen, end = self["seen"], self["seen"] + new_BTC.shape[1]
        kept = self["latents"]
        if kept is None or kept.shape[1] < end:
            kept = new_BTC.new_zeros(len(new_BTC), capacity(end), new_BTC.shape[2], requires_grad=False)
            if seen:
                kept[:, :seen] = self["latents"][:, :seen]
            self["latents"] = kept
        kept[:, seen:end] = new_BTC.detach()
        documents = self["documents"]
        if documents is not None or doc_ids is not None:
            if documents is None or documents.shape[1] < end:
                documents = torch.full(kept.shape[:2], NO_DOCUMENT, device=kept.device)
                if self["documents"] is not None:
                    documents[:, :seen] = self["documents"][:, :seen]
                self["documents"] = documents
            documents[:, seen:end] = documents[:, seen - 1:seen] if doc_ids is None else doc_ids
            documents = documents[:, :end]
        self["seen"] = end
        if new_BTC.requires_grad:  # what is new keeps its way back
            return torch.cat([kept[:, :seen].to(new_BTC.dtype), new_BTC], 1), documents
        return kept[:, :end], documents


class FixedLatents(State):
    """latents [B, S, C] and seen int64 [B] of sequences that are decoded together, at addresses that stay: see
    `State.fixed`."""

    def put(self, row: int, own: LatentState) -> None:
        seen = own["seen"]
        self["latents"][row, :seen].copy_(own["latents"][0, :seen])
        self["seen"][row] = seen

    def take(self, row: int, own: LatentState) -> None:
        before, seen = own["seen"], int(self["seen"][row])
        if seen > before:
            own.remember(self["latents"][row:row + 1, before:seen], None)

    @property
    def at_B(self) -> Tensor:
        """Where the next token of each row goes. A row in which nobody sits stays at the last place."""
        return self["seen"].clamp(max=self["latents"].shape[1] - 1)

    def attend(self, q_BHTC: Tensor, new_BTC: Tensor, scores: Scores) -> Tensor:
        """[B, H, 1, C]: write down a new token of each row; what it sees of those before it and of itself."""
        kept, at_B = self["latents"], self.at_B
        kept.scatter_(1, at_B[:, None, None].expand_as(new_BTC), new_BTC.to(kept.dtype))
        self["seen"].add_(1)
        kept_B1SC = kept[:, None].to(q_BHTC.dtype)
        return attention_from(at_B, q_BHTC[:, :, 0], kept_B1SC, kept_B1SC, scores)[:, :, None]
