"""A winning expert suppresses those that resemble it.

Shapes: N tokens, E experts, K chosen experts, M size of a sketch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tryplicity import Inhibition, Mean, Report, Steps, Weight
from tryplicity_plugins.layers.router import TopKRouter, full_precision


def similarity_of(sketch_EM: Tensor) -> Tensor:
    """The estimated cosine between the weights of every two experts, [E, E]: 0 to 1, its diagonal 0."""
    with full_precision(sketch_EM):
        unit_EM = F.normalize(sketch_EM.float(), dim=-1)
        similarity_EE = (unit_EM @ unit_EM.T).clamp(0, 1)
    return similarity_EE.fill_diagonal_(0)


class LateralInhibition(Inhibition):
    """Experts are chosen one after another; each winner lowers the scores of those whose weights resemble it.

    The score of expert e falls by strength * (the winner's score) * similarity(winner, e) for every winner
    before it, as a strongly firing neuron inhibits its neighbours the more. The weights of the chosen come
    from the scores themselves. Similarity is measured before every `refresh_steps`-th step and kept in a buffer,
    so a forward pass that is computed again chooses the same.
    """

    name = "lateral_inhibition"

    @dataclass(frozen=True)
    class Config:
        strength: Weight = 0.3
        """How strongly a winner suppresses an expert with the same weights; 0 gives plain top-k."""
        refresh_steps: Steps = 20
        """Optimizer steps between two measurements of similarity."""

    def __init__(self, config: Config, experts: int) -> None:
        super().__init__()
        self.config, self.experts = config, experts
        self.register_buffer("similarity_EE", torch.empty(experts, experts))
        self.measured = False  # before this step

    def reset_parameters(self) -> None:
        self.similarity_EE.zero_()

    def wants_sketch(self, step: int) -> bool:
        self.measured = step % self.config.refresh_steps == 0
        return self.measured

    @torch.no_grad()
    def take_sketch(self, sketch_EM: Tensor) -> None:
        self.similarity_EE.copy_(similarity_of(sketch_EM))

    def choose(self, scores_NE: Tensor, standing_NE: Tensor, most: int,
               k_N: Tensor | None = None) -> tuple[Tensor, Report]:
        chosen = []
        resembled_NE = torch.zeros_like(scores_NE)
        resemblance_N = scores_NE.new_zeros(len(scores_NE))  # of its experts in use, summed over their pairs
        for rank in range(most):
            winner_N1 = standing_NE.argmax(-1, keepdim=True)
            chosen.append(winner_N1)
            like_N = resembled_NE.gather(1, winner_N1)[:, 0]
            resemblance_N = resemblance_N + (like_N if k_N is None else like_N.where(rank < k_N, 0))
            similarity_NE = self.similarity_EE[winner_N1[:, 0]].to(scores_NE.dtype)
            resembled_NE = resembled_NE + similarity_NE
            inhibition_NE = self.config.strength * scores_NE.gather(1, winner_N1) * similarity_NE
            standing_NE = (standing_NE - inhibition_NE).scatter(1, winner_N1, -torch.inf)
        if k_N is None:
            pairs: Tensor | float = len(scores_NE) * most * (most - 1) / 2
        else:
            pairs = ((k_N * (k_N - 1)).sum() / 2).clamp(min=1e-9)
        return torch.cat(chosen, -1), Report(stats={"chosen_similarity": Mean(resemblance_N.sum(), pairs)})

    def in_c(self) -> tuple[Tensor, float]:
        """What C must know to choose as `choose` does."""
        return self.similarity_EE, self.config.strength

    @torch.no_grad()
    def revive(self, dead: list[int]) -> None:
        self.similarity_EE[dead] = 0  # drawn anew, it resembles no other
        self.similarity_EE[:, dead] = 0

    def metrics(self, stats: Mapping[str, Mean]) -> dict[str, float | list[float]]:
        values: dict[str, float | list[float]] = {"chosen_similarity": stats["chosen_similarity"].value.item()}
        if self.measured:
            values["similarity"] = self.similarity_EE.sum().item() / max(self.experts * (self.experts - 1), 1)
        return values


class LateralInhibitionRouter(TopKRouter):
    """The `top_k` experts, each winner suppressing those that resemble it: `top_k` with an inhibition of its own."""

    name = "lateral_inhibition"

    @dataclass(frozen=True)
    class Config(TopKRouter.Config):
        strength: Weight = 0.3
        """How strongly a winner suppresses an expert with the same weights; 0 gives plain top-k."""
        refresh_steps: Steps = 20
        """Optimizer steps between two measurements of similarity."""

    @classmethod
    def check(cls, config, site):
        if config.inhibition is not None:
            yield "inhibition", "this router has its own, by strength; or use it with the router top_k"

    def __init__(self, config, site, experts: int, top_k: int) -> None:
        super().__init__(config, site, experts, top_k)
        self.inhibition = LateralInhibition(LateralInhibition.Config(config.strength, config.refresh_steps), experts)
