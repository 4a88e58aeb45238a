"""Warmup, stable, decay (Hu et al., MiniCPM, arXiv:2404.06395): a plateau that can be prolonged, then a fast fall."""

from __future__ import annotations

from dataclasses import dataclass

from tryplicity import Schedule, Share, Some


class WarmupStableDecay(Schedule):
    """Linear warm-up over `warmup_steps`, a plateau, then over the last `decay` of the budget down to `floor`,
    falling as 1 - sqrt (Hagele et al., arXiv:2405.18392)."""

    name = "wsd"

    @dataclass(frozen=True)
    class Config:
        warmup_steps: Some = 100
        """optimizer steps from zero to the full learning rate"""
        decay: Share = 0.2
        """share of the budget over which the learning rate falls"""
        floor: Share = 0.0
        """share of the learning rate that is left at the end"""

    def __init__(self, config: Config) -> None:
        self.config = config


    def factor(self, progress: float, step: int) -> float:
        c = self.config
        warm = min(1.0, (step + 1) / c.warmup_steps) if c.warmup_steps else 1.0
        start = 1.0 - c.decay
        if c.decay == 0 or progress <= start:
            return warm
        fallen = min(1.0, (progress - start) / c.decay)
        return warm * (c.floor + (1.0 - c.floor) * (1.0 - fallen**0.5))
