"""What a person sees while cells train: a bar with the time left; a line now and then where there is no terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from tryplicity.ablation.runner import Job
from tryplicity.pages import ACCENT, duration, is_live, status

LINE_EVERY = 60.0  # seconds


@contextmanager
def measuring(rows: int) -> Iterator[Callable[[str, float], None]]:
    """A callback (module, share of its measurement) for what is measured one after another."""
    if not rows or not is_live():
        said: set[str] = set()

        def line(module: str, share: float) -> None:
            if module not in said:
                print(f"measuring the cost of {module}", file=sys.stderr, flush=True)
            said.add(module)

        yield line
        return
    columns = (TextColumn("cost of {task.description}"), BarColumn(bar_width=24, complete_style=ACCENT),
               TextColumn("{task.percentage:>3.0f}%"), TimeRemainingColumn())
    with Progress(*columns, console=status) as bar:
        task, seen = bar.add_task("", total=rows), []

        def live(module: str, share: float) -> None:
            if module not in seen:
                seen.append(module)
            bar.update(task, description=module, completed=len(seen) - 1 + share)

        yield live


@contextmanager
def cells(total: int) -> Iterator[Shown]:
    if not is_live():
        yield Shown(None, total)
        return
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24, complete_style=ACCENT),
               TextColumn("{task.percentage:>3.0f}%"), TextColumn("{task.fields[figures]}"))
    with Progress(*columns, console=status) as bar:
        yield Shown(bar, total)


class Shown:
    """The runner's display."""

    def __init__(self, bar: Progress | None, total: int) -> None:
        self.bar, self.total, self.last = bar, total, time.monotonic()
        self.task = bar.add_task("starting", total=total, figures="") if bar else None

    def update(self, finished: int, failed: int, running: list[Job], seconds_left: float | None) -> None:
        done = finished + failed + sum(job.spent for job in running)
        left = f"  {duration(seconds_left)} left" if seconds_left is not None else ""
        names = "; ".join(f"{job.name} {job.spent:.0%}" for job in running)
        if self.bar:
            self.bar.update(self.task, completed=done, description=f"cell {finished} of {self.total}",
                            figures=f"{left}  {names}")
        elif time.monotonic() - self.last > LINE_EVERY:
            self._line(f"{finished} of {self.total} cells finished, {done / self.total:.0%}{left}; {names}")

    def finished(self, job: Job, outcome: dict[str, Any]) -> None:
        self._line(f"{job.name}: held-out {outcome['held_out_bits_per_byte']:.4f} bits/byte, "
                   f"{duration(outcome['seconds'])}")

    def failed(self, job: Job) -> None:
        self._line(f"{job.name}: failed: {job.cause} (all it said: {job.log})")

    def _line(self, text: str) -> None:
        if self.bar:
            self.bar.console.print(text, markup=False)
        else:
            self.last = time.monotonic()
            print(text, file=sys.stderr, flush=True)
