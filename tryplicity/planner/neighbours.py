"""Other ways to lay the same step over the same machine, and the fastest that fits. Loads no torch by itself.

The step stays what it is: batch times accumulation is kept, so that the model learns the same from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tryplicity.planner import GB, Plan, flops_of_a_token, gather_facts, plan_strategies
from tryplicity.planner.memory import MemoryPlan
from tryplicity.planner.speed import estimate_speed

if TYPE_CHECKING:
    from tryplicity.hardware import Hardware
    from tryplicity.model import Model
    from tryplicity.planner.stages import Blocks
    from tryplicity.registry import Registry

#: a speed this much above another is one: estimates are no better
FASTER = 1.005


@dataclass(frozen=True)
class Neighbour:
    """A set of a profile's values, by the closed form."""

    hardware: Hardware
    strategy: str
    memory: MemoryPlan
    tokens_per_second: float

    @property
    def fits(self) -> bool:
        return self.memory.fits(self.hardware.memory_bytes)

    def settings(self) -> dict[str, Any]:
        """The profile's values that make it; its strategy where that is another, so that options are kept."""
        own = {} if self.strategy == self.hardware.strategy_name else {"strategy": self.strategy}
        return {"batch": self.hardware.batch, "accumulation": self.hardware.accumulation,
                "activation_checkpointing": self.hardware.activation_checkpointing, **own}

    def as_dict(self) -> dict[str, Any]:
        return {**self.settings(), "strategy": self.strategy, "total_gb": self.memory.total / GB, "fits": self.fits,
                "tokens_per_second": self.tokens_per_second}


def variants(hardware: Hardware) -> Iterator[Hardware]:
    """The profile, and those with a half, a quarter, twice and four times its batch, each with and without
    checkpointing."""
    for checkpointing in (hardware.activation_checkpointing, not hardware.activation_checkpointing):
        for up, down in ((1, 1), (1, 2), (1, 4), (2, 1), (4, 1)):
            if hardware.accumulation % up or hardware.batch % down:
                continue
            yield replace(hardware, batch=hardware.batch * up // down, accumulation=hardware.accumulation * down // up,
                          activation_checkpointing=checkpointing)


def neighbours(model: Model, planned: Plan, registry: Registry) -> list[Neighbour]:
    """Every variant under every strategy that can be used here, the fastest that fit first; of those as fast the one
    that is nearest to what was asked for, then the one with the most room."""
    found: list[Neighbour] = []
    blocks: Blocks = "eager" if planned.blocks == "eager" else "at most"  # the compiler is not asked dozens of times
    for hardware in variants(planned.hardware):
        facts = gather_facts(model, hardware, planned.counts, blocks)
        costs = facts.measured("fp32", hardware.accumulation > 1 or hardware.devices > 1)
        options, refused = plan_strategies(model, facts, hardware, registry, blocks)
        for option in options:
            if option.memory is not None and option.name not in refused:
                speed = estimate_speed(flops_of_a_token(costs, facts), facts.tokens, option.memory, hardware)
                found.append(Neighbour(hardware, option.name, option.memory, speed.tokens_per_second))
    asked = planned.hardware, planned.nearest.name

    def changed(n: Neighbour) -> int:
        """How many of the profile's values."""
        return sum(getattr(n.hardware, name) != getattr(asked[0], name)
                   for name in ("batch", "activation_checkpointing")) + (n.strategy != asked[1])

    best = max((n.tokens_per_second for n in found if n.fits), default=0.0)

    def order(n: Neighbour) -> tuple[bool, float, int, int]:
        about_best = n.tokens_per_second * FASTER >= best
        return not n.fits, -best if about_best else -n.tokens_per_second, changed(n), n.memory.total

    return sorted(found, key=order)
