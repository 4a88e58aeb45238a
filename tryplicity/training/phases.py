"""Which phase of a training comes when: a pure function of the share of the budget that is spent."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tryplicity.spec.model import Phase


class PhasePlan:
    """The phases of a spec on one budget. Training phases take their shares of it; a sleep lies between two."""

    def __init__(self, phases: Sequence[Phase]) -> None:
        self.phases = phases
        shares = [0.0 if phase.kind == "sleep" else phase.share or 1.0 for phase in phases]
        ends = list(accumulate(shares))
        self.ends = [end / ends[-1] for end in ends]
        self.starts = [0.0, *self.ends[:-1]]

    def at(self, spent: float, slept: int) -> int | None:
        """The phase to go on with when `spent` of the budget is used and `slept` sleep phases are done; None: all
        are done."""
        sleeps = 0
        for index, phase in enumerate(self.phases):
            if phase.kind == "sleep":
                sleeps += 1
                if sleeps > slept:
                    return index
            elif spent < self.ends[index]:
                return index
        return None

    def within(self, index: int, spent: float) -> float:
        """The share of a training phase's own budget that is spent, 0 to 1."""
        start, end = self.starts[index], self.ends[index]
        return min(1.0, max(0.0, (spent - start) / (end - start)))
