"""A router in which a winning expert suppresses those that resemble it.

Shapes: N tokens, E experts, K chosen experts, M size of a sketch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tryplicity import Mean, Routing, Steps, Weight
from tryplicity_plugins.layers.prepared import Told
from tryplicity_plugins.layers.router import BalancedRouter, full_precision


def similarity_of(sketch_EM: Tensor) -> Tensor:
    """The estimated cosine between the weights of every two experts, [E, E]: 0 to 1, its diagonal 0."""
    with full_precision(sketch_EM):
        unit_EM = F.normalize(sketch_EM.float(), dim=-1)
        similarity_EE = (unit_EM @ unit_EM.T).clamp(0, 1)
    return similarity_EE.fill_diagonal_(0)


class LateralInhibitionRouter(BalancedRouter):
    """Experts are chosen one after another; each winner lowers the scores of those whose weights resemble it.

    The score of expert e falls by strength * (the winner's score) * similarity(winner, e) for every winner
    before it, as a strongly firing neuron inhibits its neighbours the more. The weights of the chosen come
    from the scores themselves. Similarity is measured every `refresh_steps` steps and kept in a buffer that
    changes only between optimizer steps, so a forward pass that is computed again chooses the same.
    """

    name = "lateral_inhibition"

    @dataclass(frozen=True)
    class Config(BalancedRouter.Config):
        strength: Weight = 0.3
        """How strongly a winner suppresses an expert with the same weights; 0 gives plain top-k."""
        refresh_steps: Steps = 20
        """Optimizer steps between two measurements of similarity."""

    def __init__(self, config, site, experts: int, top_k: int) -> None:
        super().__init__(config, site, experts, top_k)
        self.register_buffer("similarity_EE", torch.empty(experts, experts))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.similarity_EE)

    def before_step(self, step: int) -> None:
        self.wants_sketch = step % self.config.refresh_steps == 0

    def forward(self, x_BTD: Tensor, sketch_EM: Tensor | None = None) -> Routing:
        logits_NE, scores_NE = self.score(x_BTD)
        experts_NK, resemblance_N = self._choose(scores_NE.detach())
        weights_NK = self.weigh(scores_NE.gather(1, experts_NK)).to(x_BTD.dtype)
        report = self.report(x_BTD, logits_NE, scores_NE, experts_NK)
        if self.reports(x_BTD):
            pairs = len(experts_NK) * self.max_k * (self.max_k - 1) / 2
            report.stats["chosen_similarity"] = Mean(resemblance_N.sum(), float(pairs))
        if sketch_EM is not None:
            report.stats["similarity"] = Mean(similarity_of(sketch_EM.detach()), 1.0)
        return Routing(experts_NK, weights_NK, report)

    def in_c(self) -> Told:
        return self._in_c(similarity_EE=self.similarity_EE, strength=self.config.strength)

    def _choose(self, scores_NE: Tensor) -> tuple[Tensor, Tensor]:
        """The winners, and the similarity of each token's winners summed over their pairs."""
        standing_NE, chosen = scores_NE + self.bias, []
        resembled_NE = torch.zeros_like(scores_NE)
        resemblance_N = scores_NE.new_zeros(len(scores_NE))
        for _ in range(self.max_k):
            winner_N1 = standing_NE.argmax(-1, keepdim=True)
            chosen.append(winner_N1)
            resemblance_N = resemblance_N + resembled_NE.gather(1, winner_N1)[:, 0]
            similarity_NE = self.similarity_EE[winner_N1[:, 0]].to(scores_NE.dtype)
            resembled_NE = resembled_NE + similarity_NE
            inhibition_NE = self.config.strength * scores_NE.gather(1, winner_N1) * similarity_NE
            standing_NE = (standing_NE - inhibition_NE).scatter(1, winner_N1, -torch.inf)
        return torch.cat(chosen, -1), resemblance_N

    def after_step(self, step: int, stats: Mapping[str, Mean]) -> None:
        super().after_step(step, stats)
        if "similarity" in stats:
            self.similarity_EE.copy_(stats["similarity"].value.to(self.similarity_EE.dtype))

    @torch.no_grad()
    def revive(self, dead: list[int], models: list[int], generator: torch.Generator) -> None:
        super().revive(dead, models, generator)
        self.similarity_EE[dead] = 0  # drawn anew, it resembles no other
        self.similarity_EE[:, dead] = 0

    def metrics(self, stats: Mapping[str, Mean]) -> dict[str, float | list[float]]:
        values = {**super().metrics(stats), "chosen_similarity": stats["chosen_similarity"].value.item()}
        if "similarity" in stats:
            pairs = max(self.experts * (self.experts - 1), 1)
            values["similarity"] = stats["similarity"].value.sum().item() / pairs
        return values
