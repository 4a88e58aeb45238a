"""How fast a training is by a stopwatch, and how long it will take. Loads no torch."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

SHORT, LONG = 30.0, 300.0  # seconds: the windows of the speed that is shown, and of what the time left is reckoned from
APART = 0.1  # seconds between two marks that are kept


class Mark(NamedTuple):
    seconds: float
    tokens: int
    spent: float


class Pace:
    """Whatever happens between two steps (validation, checkpoints, a plugin's hook) takes time like the steps do: the
    speed is tokens over elapsed time, in a window, and never a mean of the speeds of steps."""

    def __init__(self, tokens: int, spent: float, clock: Callable[[], float] = time.perf_counter) -> None:
        """tokens, spent: what a run that goes on has done before."""
        self.clock = clock
        self.marks = deque([Mark(clock(), tokens, spent)])
        self.scored_rows, self.scoring_seconds = 0, 0.0

    def step(self, tokens: int, spent: float) -> None:
        """A step is done; tokens, spent: of the whole run so far."""
        now = Mark(self.clock(), tokens, spent)
        if len(self.marks) > 1 and now.seconds - self.marks[-2].seconds < APART:
            self.marks[-1] = now
        else:
            self.marks.append(now)
        while len(self.marks) > 2 and self.marks[1].seconds < now.seconds - LONG:
            self.marks.popleft()

    def tokens_per_second(self) -> float:
        """Over the last `SHORT` seconds, or the last step where that took longer."""
        last = self.marks[-1]
        first = next((mark for mark in list(self.marks)[:-1] if mark.seconds >= last.seconds - SHORT), self.marks[-2])
        return (last.tokens - first.tokens) / max(last.seconds - first.seconds, 1e-9)

    def scored(self, rows: int, seconds: float) -> None:
        """So many held-out rows took so long."""
        self.scored_rows, self.scoring_seconds = self.scored_rows + rows, self.scoring_seconds + seconds

    def seconds_left(self, rows_to_score: int, tokens_per_row: int) -> float:
        """Until all is done: the rest of the budget, then scoring so many held-out rows. Before any were scored, a
        row is held to take a third of what training on it does: the forward pass alone."""
        first, last = self.marks[0], self.marks[-1]
        elapsed = last.seconds - first.seconds
        training = max(0.0, 1.0 - last.spent) * elapsed / max(last.spent - first.spent, 1e-12)
        if self.scored_rows:
            row = self.scoring_seconds / self.scored_rows
        else:
            row = elapsed / max(last.tokens - first.tokens, 1) * tokens_per_row / 3
        return training + rows_to_score * row
