"""A router that spends more experts on harder tokens.

Shapes: B batch, T time, D hidden, N tokens (B*T), E experts, K slots (the most experts a token can have).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tryplicity import Count, Mean, Positive, Routing
from tryplicity_plugins.layers.c_structs import Description
from tryplicity_plugins.layers.router import BalancedRouter, full_precision


class _Level(torch.autograd.Function):
    """clamp(1/2 + z/4, 0, 1), whose gradient reaches a z outside of the range too, if it leads back in.

    With a sigmoid a token that once came near an end stays there: its gradient is gone, and Adam's steps, all of
    one size, bring most tokens to an end early. And a sigmoid is never 0, so no token ever has the fewest experts.
    """

    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return (0.5 + z / 4).clamp(0, 1)

    @staticmethod
    def backward(ctx, grad):
        z, = ctx.saved_tensors
        outward = ((z > 2) & (grad < 0)) | ((z < -2) & (grad > 0))
        return (grad / 4).masked_fill(outward, 0)


class DynamicSparsityRouter(BalancedRouter):
    """From `min_experts` to `max_experts` for a token, by a learned difficulty; `mean_experts` on average.

    A linear map of the token gives a real number of experts, kappa. The expert of rank j (counted from 0) has
    its score multiplied by the gate clamp(kappa - j, 0, 1): whole for the sure ones, a fraction for the
    marginal one, which enters at weight zero. So the output is continuous in kappa, and the gradient of the
    language loss by kappa is what more of the marginal expert is worth for this token: difficulty learns from
    nothing else. An offset common to all tokens is moved once per optimizer step to hold the mean, so that
    difficulty only decides who gets more. With an `inhibition` the rank is the place in its order of choice.
    """

    name = "dynamic_sparsity"

    @dataclass(frozen=True)
    class Config(BalancedRouter.Config):
        min_experts: Count = 4
        """The fewest experts a token gets."""
        max_experts: Count = 12
        """The most experts a token gets."""
        mean_experts: Positive = 8.0
        """Experts per token on average; held by a controller, and what a budget is planned with."""

    @classmethod
    def check(cls, config, site):
        if config.min_experts > config.max_experts:
            yield "min_experts", (f"{config.min_experts} is more than max_experts {config.max_experts}; "
                                  f"use {config.max_experts} or less")
        elif not config.min_experts <= config.mean_experts <= config.max_experts:
            nearest = min(max(config.mean_experts, config.min_experts), config.max_experts)
            yield "mean_experts", (f"{config.mean_experts:g} is not between min_experts {config.min_experts} "
                                   f"and max_experts {config.max_experts}; the nearest is {nearest:g}")

    def __init__(self, config, site, experts: int, top_k: int) -> None:
        super().__init__(config, site, experts, top_k)
        self.max_k, self.mean_k = config.max_experts, float(config.mean_experts)
        self.span = config.max_experts - config.min_experts
        self.difficulty_D = nn.Parameter(torch.empty(site.hidden_size))
        self.register_buffer("offset", torch.empty(()))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.normal_(self.difficulty_D, std=0.02)
        # kappa half an expert below the target: a token gets kappa rounded up
        level = (self.mean_k - 0.5 - self.config.min_experts) / max(self.span, 1)
        nn.init.constant_(self.offset, 4 * (min(max(level, 0.02), 0.98) - 0.5))

    def forward(self, x_BTD: Tensor) -> Routing:
        logits_NE, scores_NE = self.score(x_BTD)
        with full_precision(x_BTD):
            x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
            difficulty_N1 = F.linear(x_ND.float(), self.difficulty_D.float()[None])
        level_N1 = _Level.apply(difficulty_N1 + self.offset)
        kappa_N1 = self.config.min_experts + self.span * level_N1
        rank_K = torch.arange(self.max_k, device=x_BTD.device)
        gate_NK = (kappa_N1 - rank_K).clamp(0, 1)
        k_N = (gate_NK.detach() > 0).sum(-1)
        best_NK, inhibited = self.best(scores_NE, k_N)
        weights_NK = self.weigh(scores_NE.gather(1, best_NK) * gate_NK).to(x_BTD.dtype)
        experts_NK = best_NK.where(gate_NK > 0, self.experts)
        report = self.report(x_BTD, logits_NE, scores_NE, experts_NK, inhibited)
        if self.reports(x_BTD):
            k_N = k_N.float()
            report.stats["k"] = Mean(k_N.sum(), float(len(k_N)))
            report.stats["k_squared"] = Mean(k_N.square().sum(), float(len(k_N)))
            report.stats["level"] = Mean(level_N1.detach().sum(), float(len(k_N)))
            report.stats["level_squared"] = Mean(level_N1.detach().square().sum(), float(len(k_N)))
        return Routing(experts_NK, weights_NK, report)

    def in_c(self) -> Description | None:
        return self._in_c(difficulty_D=self.difficulty_D, offset=self.offset, least=self.config.min_experts,
                          span=self.span)

    def after_step(self, step: int, stats: Mapping[str, Mean]) -> None:
        super().after_step(step, stats)
        if self.span:
            # the mean moves by at most span / 4 for one unit of offset, so this never oversteps
            self.offset.add_(((self.mean_k - stats["k"].value) / self.span).to(self.offset.dtype))

    def metrics(self, stats: Mapping[str, Mean]) -> dict[str, float | list[float]]:
        def spread(name: str) -> float:
            variance = stats[f"{name}_squared"].value - stats[name].value ** 2
            return variance.clamp(min=0).sqrt().item()

        # difficulty from 0 (the fewest experts) to 1 (the most); its mean is held, its spread is what is learned
        return {**super().metrics(stats), "experts_per_token_spread": spread("k"),
                "difficulty": stats["level"].value.item(), "difficulty_spread": spread("level")}
