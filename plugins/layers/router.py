"""Routers: which experts a token goes to. The plain top-k, and what the other routers share with it.

Shapes: B batch, T time, D hidden, N tokens (B*T), E experts, K chosen experts, M size of a sketch, S pairs of a token
and an expert of its.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tryplicity import Count, Mean, Part, Positive, Report, Router, Routing, Weight, later, uses
from tryplicity_plugins.layers import native
from tryplicity_plugins.layers.c_structs import Description, address, describes, kept_struct

#: use_E goes a share of 1 / USE_STEPS of the way to each step's load: 95% of it is of the last 300 steps
USE_STEPS = 100


#: noise that parts a router's row from the copy of it, in units of the row's root mean square
COPY_NOISE = 0.1


def full_precision(x: Tensor):
    """A context in which autocast leaves fp32 alone."""
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


class RouterInC(ctypes.Structure):
    """moe.cpp"""

    _fields_ = [(name, kind) for kind, names in [
        (ctypes.c_int64, ["hidden", "experts", "most", "softmax", "normalize", "groups", "groups_kept", "group_best"]),
        (ctypes.c_void_p, ["weight_ED", "bias_E", "similarity_EE", "difficulty_D", "offset"]),
        (ctypes.c_float, ["strength", "least", "span", "scale"])] for name in names]


class BalancedRouter(Router):
    """What every router here shares: fp32 scores, load balance and statistics. A subclass says how to choose.

    Balance comes from two sides. A bias per expert, added to the scores for the choice alone, moves once per
    optimizer step towards even load (arXiv:2408.15664): it costs the language loss no gradient. A small loss,
    computed for each sequence apart, keeps single sequences from piling onto few experts (arXiv:2412.19437,
    section 2.1.2; the load is that of the choice actually made). Both are the same however a batch is cut
    into parts, since the loss is a mean over sequences and the bias reads the load of the whole batch.
    """

    undecayed = ("bias",)

    @dataclass(frozen=True)
    class Config:
        score: Literal["sigmoid", "softmax"] = "sigmoid"
        """How logits become scores; the weights of the chosen experts are their scores."""
        normalize: bool = True
        """Scale the weights of a token's experts to sum to 1 (with softmax: a softmax over the chosen)."""
        bias_rate: Weight = 1e-3
        """How far the balancing bias of an expert moves in one optimizer step; 0 switches it off."""
        balance_loss: Weight = 1e-4
        """Weight of the balance loss of each sequence."""
        z_loss: Weight = 0.0
        """Weight of the squared log-sum-exp of the logits (arXiv:2202.08906), which keeps them small."""
        inhibition: Part | None = uses("inhibition", optional=True)
        """What the choice of an expert does to the others; by default nothing."""
        groups: Count = later(1)
        """Sets of neighbouring experts; a token's experts all come from groups_kept of them (arXiv:2412.19437,
        section 2.1.2)."""
        groups_kept: Count = later(1)
        """Groups that a token's experts may come from, the best ones."""
        group_best: Count = later(2)
        """How many of a group's experts, the best ones, decide by the sum of their scores how good it is."""
        scale: Positive = later(1.0)
        """A constant factor of all weights."""

    def __init__(self, config, site, experts: int, top_k: int) -> None:
        super().__init__()
        self.config, self.experts = config, experts
        self.max_k, self.mean_k = top_k, float(top_k)
        self.inhibition = config.inhibition.build(experts) if config.inhibition is not None else None
        self.weight = nn.Parameter(torch.empty(experts, site.hidden_size))
        self.register_buffer("bias", torch.empty(experts))
        # how often an expert is chosen, a running mean in units of the even share; 1 until something is known
        self.register_buffer("use_E", torch.empty(experts))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)
        nn.init.ones_(self.use_E)

    def score(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and scores, [N, E], in fp32."""
        with full_precision(x_BTD):
            logits_NE = F.linear(x_BTD.reshape(-1, x_BTD.shape[-1]).float(), self.weight.float())
            return logits_NE, logits_NE.sigmoid() if self.config.score == "sigmoid" else logits_NE.softmax(-1)

    def best(self, scores_NE: Tensor, k_N: Tensor | None = None) -> tuple[Tensor, Report]:
        """The `max_k` experts of each token, best first, and what their inhibition reports. k_N: how many are used."""
        scores_NE = scores_NE.detach()
        standing_NE = self.kept(scores_NE + self.bias)
        if self.inhibition is None:
            return standing_NE.topk(self.max_k).indices, Report()
        return self.inhibition.choose(scores_NE, standing_NE, self.max_k, k_N)

    def kept(self, standing_NE: Tensor) -> Tensor:
        """The same, -inf for the experts of groups that are not among the best."""
        config = self.config
        if config.groups == 1:
            return standing_NE
        standing_NGX = standing_NE.unflatten(1, (config.groups, -1))
        group_NG = standing_NGX.topk(config.group_best).values.sum(-1)
        best_NG = torch.zeros_like(group_NG, dtype=torch.bool)
        best_NG = best_NG.scatter(1, group_NG.topk(config.groups_kept).indices, True)
        return standing_NGX.where(best_NG[..., None], -torch.inf).flatten(1)

    def weigh(self, scores_NK: Tensor) -> Tensor:
        """The weights of chosen experts from their scores."""
        if self.config.normalize:
            scores_NK = scores_NK / (scores_NK.sum(-1, keepdim=True) + 1e-20)
        return scores_NK if self.config.scale == 1 else scores_NK * self.config.scale

    def in_c(self) -> Description | None:
        """What C must know to choose as `forward` does, to rounding; None where it cannot."""
        return None

    def _in_c(self, *, difficulty_D: Tensor | None = None, offset: Tensor | None = None, least: float = 0.0,
              span: float = 0.0) -> Description | None:
        similarity_EE, strength = None, 0.0
        if self.inhibition is not None:
            tell = getattr(self.inhibition, "in_c", None)
            if tell is None or not describes(self.inhibition, ("in_c",), ("choose",)):
                return None
            similarity_EE, strength = tell()
        tensors = [self.weight, self.bias, similarity_EE, difficulty_D, offset]
        config, (experts, hidden) = self.config, self.weight.shape
        struct = RouterInC(hidden, experts, self.max_k, config.score == "softmax", config.normalize,
                           config.groups, config.groups_kept, config.group_best, *map(address, tensors), strength,
                           least, span, config.scale)
        return struct, [tensor for tensor in tensors if tensor is not None], []

    def pairs(self, x_ND: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """What `forward` chooses, as pairs: the token, the expert and the weight of each [S], those of a token one
        after another; with the same bits whatever other tokens there are. None where C may not."""
        told = kept_struct(self, lambda: router_in_c(self)) if native.for_inference(x_ND) else None
        if told is None:
            return None
        most, count = len(x_ND) * self.max_k, ctypes.c_int64()
        row_S, expert_S = torch.empty(2, most, dtype=torch.int64).unbind()
        weight_S = x_ND.new_empty(most)
        native.function("route", "ppipppp")(told.address, x_ND.data_ptr(), len(x_ND), row_S.data_ptr(),
                                            expert_S.data_ptr(), weight_S.data_ptr(), ctypes.addressof(count))
        S = count.value
        return row_S[:S], expert_S[:S], weight_S[:S]

    def reports(self, x_BTD: Tensor) -> bool:
        """A single token that is decoded has no statistics worth their time."""
        return torch.is_grad_enabled() or x_BTD.shape[1] > 1

    def report(self, x_BTD: Tensor, logits_NE: Tensor, scores_NE: Tensor, experts_NK: Tensor,
               inhibited: Report) -> Report:
        """Load and balance of a choice, and what its inhibition reported."""
        if not self.reports(x_BTD):
            return Report()
        batch, time, _ = x_BTD.shape
        chosen_BS = experts_NK.reshape(batch, -1)
        count_BE = scores_NE.new_zeros(batch, self.experts + 1)  # the last column counts unused slots
        count_BE = count_BE.scatter_add_(1, chosen_BS, torch.ones_like(chosen_BS, dtype=count_BE.dtype))
        count_BE = count_BE[:, :-1]
        report = Report(stats={"load": Mean(count_BE.sum(0), float(batch * time))})
        report.include("inhibition", inhibited)
        if torch.is_grad_enabled() and self.config.balance_loss:
            share_NE = scores_NE / scores_NE.sum(-1, keepdim=True)
            share_BE = share_NE.view(batch, time, -1).mean(1)
            load_BE = count_BE / count_BE.sum(-1, keepdim=True)
            loss = self.experts * (load_BE * share_BE).sum(-1).mean()
            report.losses["balance"] = self.config.balance_loss * loss
        if torch.is_grad_enabled() and self.config.z_loss:
            report.losses["z"] = self.config.z_loss * logits_NE.logsumexp(-1).square().mean()
        return report

    def after_step(self, step: int, stats: Mapping[str, Mean]) -> None:
        load_E = stats["load"].total
        error_E = load_E.mean() - load_E
        self.bias.add_((self.config.bias_rate * error_E.sign()).to(self.bias.dtype))
        use_E = (load_E / load_E.mean().clamp(min=1e-9)).to(self.use_E.dtype)
        self.use_E.lerp_(use_E, 1 / USE_STEPS)

    @torch.no_grad()
    def revive(self, dead: list[int], models: list[int], generator: torch.Generator) -> None:
        """Make each dead expert a candidate wherever its model, an expert much in use, is one."""
        row_XD = self.weight[models]
        size_X1 = row_XD.square().mean(-1, keepdim=True).sqrt()
        noise_XD = torch.randn(row_XD.shape, generator=generator).to(row_XD)
        self.weight[dead] = row_XD + COPY_NOISE * size_X1 * noise_XD
        self.bias[dead] = self.bias[models]
        self.use_E[dead] = 1.0  # its past says nothing about it any more
        if self.inhibition is not None:
            self.inhibition.revive(dead)

    def metrics(self, stats: Mapping[str, Mean]) -> dict[str, float | list[float]]:
        load = stats["load"]
        share_E = (load.total / load.total.sum().clamp(min=1)).double()
        entropy = -torch.special.xlogy(share_E, share_E).sum().item()
        return {
            "load": [round(share, 4) for share in share_E.tolist()],
            "load_max_over_mean": share_E.max().item() * self.experts,
            "dead_experts": float((load.total == 0).sum()),
            "load_entropy": entropy / math.log(self.experts) if self.experts > 1 else 1.0,
            "experts_per_token": float(load.total.sum() / load.count),
            "experts_per_token_spread": 0.0,  # every token has as many
        }


def groups_that_fail(options: BalancedRouter.Config, experts: int, chosen: int) -> Iterator[tuple[str, str]]:
    """What is wrong with a router's groups where there are so many experts, and a token gets so many of them."""
    groups, size = options.groups, experts // options.groups
    if experts % groups:
        nearest = min((d for d in range(1, experts + 1) if experts % d == 0), key=lambda d: abs(d - groups))
        yield "router.groups", f"{groups} does not divide {experts} experts; the nearest that does is {nearest}"
    elif options.groups_kept > groups:
        yield "router.groups_kept", f"{options.groups_kept} of {groups} groups; at most {groups}"
    elif options.groups_kept * size < chosen:
        yield "router.groups_kept", (f"{options.groups_kept} groups of {size} experts hold less than the {chosen} that "
                                     f"a token gets; at least {-(-chosen // size)}")
    elif options.group_best > size:
        yield "router.group_best", f"{options.group_best} of the {size} experts of a group; at most {size}"


def router_in_c(router: Router) -> Description | None:
    """What C must know of a router; None where it does not know it."""
    knows = isinstance(router, BalancedRouter) and describes(router, ("in_c",),
                                                                   ("forward", "score", "best", "kept", "weigh"))
    return router.in_c() if knows else None


class TopKRouter(BalancedRouter):
    """The `top_k` experts with the highest scores."""

    name = "top_k"

    def forward(self, x_BTD: Tensor) -> Routing:
        logits_NE, scores_NE = self.score(x_BTD)
        experts_NK, inhibited = self.best(scores_NE)
        weights_NK = self.weigh(scores_NE.gather(1, experts_NK)).to(x_BTD.dtype)
        return Routing(experts_NK, weights_NK, self.report(x_BTD, logits_NE, scores_NE, experts_NK, inhibited))

    def choose(self, x_D: Tensor) -> list[tuple[int, float]]:
        if self.inhibition is not None or self.config.groups > 1:
            return super().choose(x_D)
        # the same as forward: on the host a few numbers cost less than the launch of one operation
        logits_E = torch.mv(self.weight.float(), x_D.float())
        scores = (logits_E.sigmoid() if self.config.score == "sigmoid" else logits_E.softmax(-1)).tolist()
        standing = [score + bias for score, bias in zip(scores, self.bias.tolist(), strict=True)]
        experts = sorted(range(self.experts), key=standing.__getitem__, reverse=True)[:self.max_k]
        total = sum(scores[expert] for expert in experts) + 1e-20 if self.config.normalize else 1.0
        return [(expert, scores[expert] / total * self.config.scale) for expert in experts]

    def in_c(self) -> Description | None:
        return self._in_c()
