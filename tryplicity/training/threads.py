"""How many threads a training on a CPU uses: as many as there are cores that nobody else keeps busy.

OpenMP divides an operation among its threads and waits for the last of them. A thread that has no core, because
another process has it, comes last by a time slice of the system's, thousands of times a step: with one busy process
beside it, two threads on two cores train slower than one. So the load is looked at between steps, and a core that
others use is left to them.

Another number of threads rounds differently. A run is the same to the bit only where the number stays, which
`TRYPLICITY_THREADS` (or OpenMP's own OMP_NUM_THREADS) sees to.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from tryplicity.errors import UserError

FORCE = "TRYPLICITY_THREADS"
WINDOW = 5.0  # seconds of load that one look sums up; two of them in a row must want the same
MOST = 1024


class Load(NamedTuple):
    """Seconds of work since the machine or this process began."""

    at: float  # of the clock
    busy: float  # of the cores that we may run on, whoever used them
    own: float  # of this process


def forced() -> int | None:
    """The number of threads that the user wants, if he says so. Raises UserError for what is no number."""
    text = os.environ.get(FORCE)
    if text is None:
        return torch.get_num_threads() if os.environ.get("OMP_NUM_THREADS") else None
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= MOST):
        raise UserError(f"{FORCE}={text}: expected a whole number from 1 to {MOST}; leave it out to use what is free")
    return int(text)


def cores() -> set[int]:
    """The numbers of the cores that this process may run on."""
    return set(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def quota(groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float | None:
    """Cores' worth of time that a control group (of a container) grants, the least of it and those above; None where
    it sets no limit. Version 2 (docs.kernel.org/admin-guide/cgroup-v2.html, cpu.max), and version 1."""
    found = []
    try:
        paths = [line.split(":", 2)[2].strip("/") for line in own.read_text().splitlines() if line.startswith("0::")]
    except OSError:
        paths = []
    for path in paths or [""]:
        here = groups / path
        for folder in (here, *here.parents):
            if folder != groups and groups not in folder.parents:
                break
            found.append(_granted(folder / "cpu.max"))
    try:
        spent, period = (int((groups / "cpu" / f"cpu.cfs_{what}_us").read_text()) for what in ("quota", "period"))
        found.append(spent / period if spent > 0 else None)
    except (OSError, ValueError):
        pass
    return min((one for one in found if one), default=None)


def _granted(file: Path) -> float | None:
    try:
        spent, period = file.read_text().split()
        return None if spent == "max" else int(spent) / int(period)
    except (OSError, ValueError):
        return None


def load(allowed: set[int], stat: Path = Path("/proc/stat")) -> Load | None:
    """The load until now (man 5 proc_stat); None where the system does not tell."""
    try:
        ticks, busy, seen = os.sysconf("SC_CLK_TCK"), 0, set()
        for line in stat.read_text().splitlines():
            name, *numbers = line.split()
            if name.startswith("cpu") and name != "cpu" and int(name[3:]) in allowed:
                # user, nice, system, (idle, waiting), interrupts, soft interrupts, taken by other virtual machines
                user, nice, system, _, _, irq, soft, *steal = map(int, numbers[:8])
                busy += user + nice + system + irq + soft + sum(steal)
                seen.add(int(name[3:]))
    except (OSError, ValueError, AttributeError):
        return None
    return Load(time.monotonic(), busy / ticks, time.process_time()) if seen == allowed and busy else None


def others(before: Load, now: Load) -> float:
    """Cores that others kept busy in between."""
    return max(0.0, (now.busy - before.busy - (now.own - before.own)) / max(now.at - before.at, 1e-9))


def wanted(most: int, available: float, by_others: float) -> int:
    """Threads for what is left of the cores: half a core that is free is worth a thread, but not less."""
    return max(1, min(most, int(available - by_others + 0.5)))


class Threads:
    """Sets the number of torch's threads, for the length of a `with`.

    `kept`: the number that a run which is resumed had (0: none yet); it begins with that. `fixed`: leave torch's number
    as it is, as where a GPU does the work. ranks: those of one training that share this machine; each takes as many
    of its cores and keeps to that.
    """

    def __init__(self, kept: int = 0, *, fixed: bool = False, look: Callable[[], Load | None] | None = None,
                 window: float = WINDOW, ranks: int = 1) -> None:
        self.before = torch.get_num_threads()
        self.forced = self.before if fixed else forced()
        allowed, granted = cores(), quota()
        self.ranks, self.available = ranks, min(len(allowed), granted or len(allowed))
        self.most = max(1, min(self.before, int(self.available / ranks)))
        self.number = self.forced or min(kept or self.most, self.most)
        self.window, self._look = window, look or (lambda: load(allowed))
        self._seen, self._last_wanted = self._look() if ranks == 1 else None, self.number

    def __enter__(self) -> Threads:
        if torch.get_num_threads() != self.number:
            torch.set_num_threads(self.number)
        return self

    def __exit__(self, *exception: object) -> None:
        if torch.get_num_threads() != self.before:
            torch.set_num_threads(self.before)

    @property
    def chosen(self) -> str:
        """The number and why, for people."""
        threads = f"{self.number} thread{'s' * (self.number > 1)}"
        if self.forced:
            return f"{threads}, as {FORCE if FORCE in os.environ else 'OMP_NUM_THREADS'} says"
        if self.ranks > 1:
            return f"{threads} for each of {self.ranks} ranks on {self.available:g} cores"
        return f"{threads} on {self.available:g} cores; fewer while others keep them busy"

    def between_steps(self) -> str | None:
        """Look at the load when it is time to, and use another number of threads where two looks want it; says so."""
        if self.forced or self.most == 1 or self._seen is None or time.monotonic() - self._seen.at < self.window:
            return None
        now = self._look()
        if now is None:
            return None
        taken, self._seen = others(self._seen, now), now
        want = wanted(self.most, self.available, taken)
        again, self._last_wanted = want == self._last_wanted, want
        if want == self.number or not again:
            return None
        self.number = want
        torch.set_num_threads(want)
        return (f"{want} thread{'s' * (want > 1)} from here on: others keep {taken:.1f} of {self.available:g} cores "
                f"busy; {FORCE}={self.most} would hold {self.most}")
