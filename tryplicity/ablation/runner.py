"""Cells beside each other in processes of their own, until every one is finished. Loads no torch."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tryplicity.ablation.cell import BUSY
from tryplicity.ablation.cells import result

BUSY_PAUSE = 2.0  # seconds between two looks at a cell that another process has
GRACE = 60.0  # seconds a worker has to save and end


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def worker_environment(threads: int) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": str(threads)}


@dataclass
class Job:
    """One cell to be trained: its folder, made already, and what its worker says."""

    folder: Path
    name: str
    spent: float = 0.0  # share of the budget
    left: float | None = None  # seconds
    seconds: float = 0.0  # trained
    cause: str | None = None  # why it failed
    process: subprocess.Popen | None = field(default=None, repr=False)
    begun_at: int = 0  # in the log

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    def start(self, threads: int) -> None:
        with self.log.open("a") as log:
            self.begun_at = log.tell()
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tryplicity.ablation.cell", str(self.folder)], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=log, text=True, env=worker_environment(threads),
                start_new_session=True)  # a Ctrl-C on the terminal is ours to pass on
        threading.Thread(target=self._listen, args=(self.process,), daemon=True).start()

    def _listen(self, process: subprocess.Popen) -> None:
        for line in process.stdout:
            with contextlib.suppress(ValueError, KeyError):
                said = json.loads(line)
                self.spent, self.left, self.seconds = said["spent"], said["left"], said["seconds"]

    def stop(self) -> None:
        """Ask for an end, with all saved."""
        if self.process is not None and self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGTERM)


def last_words(log: Path, begun_at: int = 0) -> str:
    """The line of a worker's log, from a byte of it on, that says why it failed."""
    said = log.read_bytes()[begun_at:].decode(errors="replace")
    lines = [line for line in said.splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines or ["it said nothing"])[-1].strip()


class Display(Protocol):
    """Is shown how far the table is."""

    def update(self, finished: int, failed: int, running: list[Job], seconds_left: float | None) -> None: ...

    def finished(self, job: Job, outcome: dict[str, Any]) -> None: ...

    def failed(self, job: Job) -> None: ...


def run_cells(jobs: list[Job], at_once: int, display: Display, stopping: Callable[[], bool]) -> list[Job]:
    """Train every job's cell, `at_once` beside each other; the failed ones are returned.

    stopping: asked all the time; when true, the workers save and end, and this returns.
    """
    threads = max(1, cores() // at_once)
    waiting, running, failed = deque(jobs), [], []
    finished, taken = 0, []  # seconds of each finished cell
    not_before: dict[str, float] = {}  # a cell that another process has -> when to look again
    try:
        while (waiting or running) and not stopping():
            for _ in range(len(waiting)):
                if len(running) >= at_once:
                    break
                job = waiting.popleft()
                if not_before.get(job.name, 0) > time.monotonic():
                    waiting.append(job)
                    continue
                job.start(threads)
                running.append(job)
            for job in [job for job in running if job.process.poll() is not None]:
                running.remove(job)
                outcome = result(job.folder)
                if job.process.returncode == BUSY:
                    not_before[job.name] = time.monotonic() + BUSY_PAUSE
                    waiting.append(job)
                elif outcome is not None:
                    finished += 1
                    taken.append(outcome["seconds"])
                    display.finished(job, outcome)
                else:
                    job.cause = last_words(job.log, job.begun_at)
                    failed.append(job)
                    display.failed(job)
            display.update(finished, len(failed), running, _seconds_left(waiting, running, taken, at_once))
            time.sleep(0.1)
    finally:
        for job in running:
            job.stop()
        _wait_for(running)
    return failed


def _wait_for(running: list[Job]) -> None:
    end = time.monotonic() + GRACE
    for job in running:
        try:
            job.process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            job.process.kill()
            job.process.wait()


def _seconds_left(waiting: Any, running: list[Job], taken: list[float], at_once: int) -> float | None:
    """From what cells took and what the running ones say; None before anything is known."""
    known = [job for job in running if job.left is not None]
    whole = taken + [job.seconds + job.left for job in known]
    if not whole:
        return None
    mean = sum(whole) / len(whole)
    todo = sum(job.left if job.left is not None else mean for job in running) + mean * len(waiting)
    return max(todo / at_once, max((job.left for job in known), default=0.0))
