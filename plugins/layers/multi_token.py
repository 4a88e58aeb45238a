"""Prediction of further tokens ahead.

Shapes: B batch, T time, D hidden, F inner, K depths (tokens ahead beyond the next), V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tryplicity import IGNORE, Head, Mean, Site, Size, Weight, chunked_cross_entropy
from tryplicity_plugins.layers.activations import SiLU
from tryplicity_plugins.layers.gated_mlp import run_mlp


class _Depth(nn.Module):
    """h + down(silu(gate) * up) of the normalised h: what one more token ahead looks like from here."""

    def __init__(self, site: Site, inner: int) -> None:
        super().__init__()
        self.norm = site.norm(site.hidden_size)
        self.gate_up = site.linear(site.hidden_size, 2 * inner)
        self.activation = SiLU(None, inner)
        self.down = site.linear(inner, site.hidden_size, writes_residual=True)

    def forward(self, h_BTD: Tensor) -> Tensor:
        return h_BTD + run_mlp(self, self.norm(h_BTD))


class MultiTokenPrediction(Head):
    """Predicts tokens 2 to `tokens` ahead by independent heads over the shared unembedding.

    After Gloeckle et al., arXiv:2404.19737, whose heads are transformer layers; here gated MLPs. Each depth's
    loss counts where the token that far ahead is in the row, in the same document and not masked.
    """

    name = "multi_token_prediction"

    @dataclass(frozen=True)
    class Config:
        tokens: Size = 4
        """How many tokens ahead in all: 4 adds the 2nd, 3rd and 4th to the next one."""
        weight: Weight = 0.5
        """Factor of this mean loss in the total."""
        inner_size: Size | None = None
        """Neurons of each depth's MLP; by default 4 times hidden_size."""

    def __init__(self, config: Config, site: Site) -> None:
        super().__init__()
        self.weight = config.weight
        inner = config.inner_size or 4 * site.hidden_size
        self.depths = nn.ModuleList(_Depth(site, inner) for _ in range(2, config.tokens + 1))

    def targets(self, ids_BT: Tensor, targets_BT: Tensor, doc_ids_BT: Tensor | None) -> Tensor:
        """The tokens 2, 3, ... ahead of each position, [B, T, K]. targets_BT: the next tokens."""
        targets_BTK = targets_BT.new_full((*targets_BT.shape, len(self.depths)), IGNORE)
        for depth in range(len(self.depths)):
            shift = depth + 1  # the next token of the position `shift` on
            if shift >= targets_BT.shape[1]:
                break
            target = targets_BT[:, shift:]
            if doc_ids_BT is not None:
                same = doc_ids_BT[:, shift:] == doc_ids_BT[:, :-shift]
                # the next token itself may begin another document, if the data did not mask it there
                same[:, :-1] &= doc_ids_BT[:, shift + 1:] == doc_ids_BT[:, :-shift - 1]
                target = target.where(same, torch.full_like(target, IGNORE))
            targets_BTK[:, :-shift, depth] = target
        return targets_BTK

    def draft(self, h_BTD: Tensor) -> Tensor:
        """The hidden states that the unembedding turns into tokens 2, 3, ... ahead, [B, T, K, D]."""
        return torch.stack([depth(h_BTD) for depth in self.depths], dim=-2)

    def forward(self, h_BTD: Tensor, targets: Tensor, unembedding_VD: Tensor) -> Mean:
        h_ND, targets_N = self.draft(h_BTD).flatten(0, 2), targets.flatten()
        return Mean(chunked_cross_entropy(h_ND, unembedding_VD, targets_N), (targets_N != IGNORE).sum())
