"""Tokens that surprise the model count more.

Shapes: B rows, T time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from tryplicity import Mean, Objective, Positive, Report, Share, Site


class PredictiveCoding(Objective):
    """Weighs each token's loss by the model's own surprise, as the brain is held to pass on prediction errors
    and not what it foresaw (Rao & Ballard 1999).

    Surprise is s = (1 - p) ** focus, p the probability of the right token as the model stands, detached. The
    weight is w = 1 + range * (s - the mean of s over the row's valid tokens): one on average over each row,
    never outside [1 - range, 1 + range]. Being a function of the token losses alone it needs neither the
    embedding table nor another row, so it is the same under every strategy and however a batch is cut.

    With `keep` below 1 only that share of a row's positions, those of the largest loss, is propagated at all:
    their weights as above, scaled so that the mean over the row's valid tokens stays one, and zero for the rest
    (selective backpropagation, arXiv:1910.00762). The gradient is then one of hard tokens only, not an estimate
    of the whole.

    What it does to a token that is hard because it is noise (a typo, a random number, a wrong label): it cannot
    tell it from one worth learning. Such a token stays surprising for ever and so gets the largest weight for
    ever: at most (1 + range) / (1 - range) times that of an easy one, a bound that does not grow with its loss;
    with `keep` below 1 noise moreover takes a growing share of what is propagated as the model learns the rest.
    The weighted loss prefers probabilities a little flatter than the data's, so the unweighted one, logged
    beside it, is what must fall.
    """

    name = "predictive_coding"

    @dataclass(frozen=True)
    class Config:
        range: Share = 0.5
        """How far a weight may stray from one; 0 weighs all tokens alike."""
        focus: Positive = 1.0
        """Power of 1 - p: above 1 only what is wholly unforeseen counts as surprising."""
        keep: Annotated[float, Field(gt=0, le=1)] = 1.0
        """Share of each row's positions whose loss is propagated, the hardest; 1 propagates all."""

    def __init__(self, config: Config, site: Site) -> None:
        super().__init__(config, site)
        self.keep = config.keep

    def token_weights(self, nll_BT: Tensor, valid_BT: Tensor) -> tuple[Tensor, Report]:
        """A row without a valid token has weights of zero. A stage's `factor` multiplies the range, up to 1."""
        reach = min(1.0, self.config.range * self.factor)
        valid_BT = valid_BT.to(nll_BT.dtype)
        count_B1 = valid_BT.sum(1, keepdim=True)
        surprise_BT = -torch.expm1(-nll_BT.clamp(min=0))  # 1 - p, without its rounding where p is nearly 1
        surprise_BT = surprise_BT ** self.config.focus * valid_BT
        mean_B1 = surprise_BT.sum(1, keepdim=True) / count_B1.clamp(min=1)
        weights_BT = (1 + reach * (surprise_BT - mean_B1)) * valid_BT
        kept_BT = valid_BT
        if self.keep < 1:
            kept_BT = valid_BT * self._hardest(nll_BT, valid_BT)
            weights_BT = weights_BT * kept_BT
            weights_BT = weights_BT * (count_B1 / weights_BT.sum(1, keepdim=True).clamp(min=1e-9))
        tokens = count_B1.sum()
        spread = ((weights_BT - 1).square() * valid_BT).sum()
        return weights_BT, Report(stats={"surprise": Mean(surprise_BT.sum(), tokens), "spread": Mean(spread, tokens),
                                         "propagated": Mean(kept_BT.sum(), tokens)})

    def _hardest(self, nll_BT: Tensor, valid_BT: Tensor) -> Tensor:
        """1 at the ceil(keep * T) positions of the largest loss of each row, valid ones first, equal ones by
        position; else 0."""
        kept = math.ceil(self.keep * nll_BT.shape[1])
        order_BT = nll_BT.masked_fill(valid_BT == 0, -torch.inf).sort(dim=1, descending=True, stable=True).indices
        return torch.zeros_like(nll_BT).scatter(1, order_BT[:, :kept], 1.0)

    def metrics(self, stats):
        return {"surprise": stats["surprise"].value.item(), "weight_spread": stats["spread"].value.sqrt().item(),
                "propagated": stats["propagated"].value.item()}
