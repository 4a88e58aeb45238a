"""Nucleus routing (Huang et al., arXiv:2403.07652): a token gets as few experts as make up a share of its probability.

Shapes: B batch, T time, D hidden, N tokens (B*T), E experts, K slots of a token.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F

from tryplicity import Count, Mean, Report, Router, Routing, Weight


class Nucleus(Router):
    """The most probable experts, until `share` is reached; at most `most`."""

    name = "nucleus"
    trials = ({}, {"share": 0.9, "most": 3})

    @dataclass(frozen=True)
    class Config:
        share: Annotated[float, Field(gt=0, le=1)] = 0.6
        """of a token's probability that its experts make up"""
        most: Count | None = None
        """experts that a token gets at most; by default twice the mixture's top_k"""
        entropy_loss: Weight = 1e-4
        """weight of the entropy of the choice, which keeps tokens from asking for all experts"""

    def __init__(self, config, site, experts, top_k):
        super().__init__()
        self.config, self.experts = config, experts
        self.max_k = min(experts, config.most or 2 * top_k)  # slots of a token, used or not
        self.mean_k = min(float(top_k), float(self.max_k))  # what a budget is planned with
        self.weight = nn.Parameter(torch.empty(experts, site.hidden_size))

    def reset_parameters(self):
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x_BTD):
        kind = x_BTD.device.type
        with nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False):
            chance_BTE = F.linear(x_BTD.float(), self.weight.float()).softmax(-1)
        chance_NK, experts_NK = chance_BTE.flatten(0, 1).topk(self.max_k)
        before_NK = chance_NK.detach().cumsum(-1) - chance_NK.detach()
        used_NK = before_NK < self.config.share  # the first always is, and the others come before what is unused
        weights_NK = chance_NK * used_NK
        weights_NK = weights_NK / weights_NK.sum(-1, keepdim=True)
        entropy_BT = -torch.special.xlogy(chance_BTE, chance_BTE).sum(-1)
        report = Report(losses={"entropy": self.config.entropy_loss * entropy_BT.mean(1).mean()},
                        stats={"experts_per_token": Mean(used_NK.float().sum(), float(len(used_NK)))})
        # the number of experts itself stands for a slot that is not used
        return Routing(experts_NK.masked_fill(~used_NK, self.experts), weights_NK.to(x_BTD.dtype), report)
