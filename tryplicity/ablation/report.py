"""The table: paired differences between having a module and not, and whether they exceed the noise."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

#: Student's t, 97.5%, by degrees of freedom from 1 on
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
         2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)


def t_975(freedom: int) -> float:
    """The 97.5% point of Student's t; beyond the table by the first term of its expansion around the normal's."""
    z = 1.959964
    return T_975[freedom - 1] if freedom <= len(T_975) else z + (z**3 + z) / (4 * freedom)


@dataclass(frozen=True)
class Effect:
    """What having a module changes, paired by seed."""

    differences: tuple[float, ...]

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.differences) if self.differences else None

    @property
    def deviation(self) -> float | None:
        """The sample standard deviation of the differences."""
        return statistics.stdev(self.differences) if len(self.differences) > 1 else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95% t interval of the mean difference."""
        count = len(self.differences)
        if count < 2:
            return None
        half = t_975(count - 1) * self.deviation / math.sqrt(count)
        return self.mean - half, self.mean + half

    @property
    def verdict(self) -> str:
        """For a figure of which less is better."""
        if not self.differences:
            return "not finished"
        if self.interval is None:
            return "one seed"
        low, high = self.interval
        return "pays" if high < 0 else "costs" if low > 0 else "within noise"
