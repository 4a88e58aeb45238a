"""AdamW (Loshchilov and Hutter, arXiv:1711.05101) in torch's fused form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field

from tryplicity import Optimizer, Positive, Weight


class AdamW(Optimizer):
    """Adam with decoupled weight decay; vectors and scalars are not decayed."""

    name = "adamw"
    state_bytes = 8  # two fp32 moments

    @dataclass(frozen=True)
    class Config:
        learning_rate: Positive = 1e-3
        """at the schedule's plateau"""
        beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
        beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
        epsilon: Positive = 1e-8
        weight_decay: Weight = 0.1
        fused: bool = True
        """one pass over all parameters; off, slower: a CPU then rounds a parameter alike however it is sharded"""

    def __init__(self, config: Config) -> None:
        self.config = config

    def build(self, decayed, undecayed) -> torch.optim.Optimizer:
        c = self.config
        groups = [{"params": decayed, "weight_decay": c.weight_decay}, {"params": undecayed, "weight_decay": 0.0}]
        # fused explicitly: torch's default on CUDA, foreach, takes 4 more bytes a parameter in the step
        return torch.optim.AdamW([g for g in groups if g["params"]], lr=c.learning_rate, betas=(c.beta1, c.beta2),
                                 eps=c.epsilon, fused=c.fused, foreach=False)
