"""What a component says beside its output: means that add up, auxiliary losses, statistics."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

IGNORE = -100  # the target of a position that has none


class Mean(NamedTuple):
    """A mean kept as its total and its count, so that parts of a batch (and ranks) add up exactly."""

    total: Tensor
    count: Tensor | float  # type: ignore[assignment]

    def __add__(self, other: Mean) -> Mean:  # type: ignore[override]
        return Mean(self.total + other.total, self.count + other.count)

    @property
    def value(self) -> Tensor:
        return self.total / (self.count if isinstance(self.count, Tensor) else max(self.count, 1e-9))


@dataclass
class Report:
    """What a layer says beside its output.

    losses: auxiliary losses by name, already weighted; each a mean over the rows (sequences) of this
        micro-batch of something computed per row, so that a batch cut into parts gives the same sum.
    stats: statistics by name, as totals and counts, detached.
    """

    losses: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    stats: dict[str, Mean] = dataclasses.field(default_factory=dict)

    def include(self, attribute: str, child: Report) -> None:
        """Add what the submodule held as `attribute` reported, under that name; to what it reported before, if it is
        used more than once."""
        for name, loss in child.losses.items():
            path = f"{attribute}.{name}"
            self.losses[path] = self.losses[path] + loss if path in self.losses else loss
        for name, stat in child.stats.items():
            path = f"{attribute}.{name}"
            self.stats[path] = self.stats[path] + stat if path in self.stats else stat


def output_and_report(result: Tensor | tuple[Tensor, Report]) -> tuple[Tensor, Report]:
    """A component may return its output alone or with a Report; this gives both."""
    return result if isinstance(result, tuple) else (result, Report())
