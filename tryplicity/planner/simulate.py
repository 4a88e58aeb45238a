"""The judge of every closed form: one real training step on fake tensors, in a process of its own. Loads no torch.

A process of its own, because what the step needs of torch (a process group without the others, another list of
autocast operators) cannot be taken back, and because a library that gives up must not take the command with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tryplicity.errors import PluginFault, Refused, UserError
from tryplicity.guard import SHOW
from tryplicity.planner.memory import GB, MemoryPlan, with_overhead

if TYPE_CHECKING:
    from tryplicity.hardware import Hardware


@dataclass(frozen=True)
class Question:
    """What is to be simulated, as the user named it."""

    spec: str
    hardware: str
    settings: tuple[str, ...]
    plugins: tuple[str, ...]
    strategy: str


@dataclass(frozen=True)
class Simulated:
    memory: MemoryPlan
    """Its parts were counted; the overhead is the planner's margin, the same as in the closed form."""
    seconds: float
    """Of processor time."""
    resident_bytes: int
    """The most memory that the simulating process had."""

    def compared_to(self, planned: MemoryPlan) -> float:
        """By which share the closed form is above (+) or below (-) what was counted, overhead aside."""
        return planned.counted / self.memory.counted - 1

    def as_dict(self, planned: MemoryPlan) -> dict[str, Any]:
        memory = self.memory
        return {"total_gb": memory.total / GB, "moment": memory.moment,
                "parts": {name: size / GB for name, size in memory.parts.items()},
                "closed_form_differs": self.compared_to(planned), "seconds": self.seconds,
                "resident_gb": self.resident_bytes / GB}


class Simulation:
    """A process at work on a question."""

    def __init__(self, question: Question, hardware: Hardware) -> None:
        self.hardware, self.question = hardware, question
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tryplicity.training.simulation"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, encoding="utf-8",
            # what lies in the folder where the user works is no part of this
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"})
        asked = json.dumps({**vars(question), "traceback": os.environ.get(SHOW) == "1"})
        with self._process.stdin as stdin, contextlib.suppress(BrokenPipeError):  # why it is gone, `answer` says
            stdin.write(asked)
        self._process.stdin = None

    def answer(self) -> Simulated:
        """Waits for it. Raises what the process could not do, in one line."""
        try:
            out, err = self._process.communicate()
        except BaseException:
            self.stop()
            raise
        code = self._process.returncode
        if code:
            raise _failure(self.question, code, err)
        said = json.loads(out)
        return Simulated(with_overhead(self.hardware, said["moment"], said["parts"]), said["seconds"],
                         said["resident"])

    def stop(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()


def _failure(question: Question, code: int, err: str) -> Exception:
    if os.environ.get(SHOW) == "1":
        print(err, file=sys.stderr)
    said = [line.removeprefix("error: ") for line in err.splitlines() if line.startswith("error: ")]
    if code < 0:
        name = signal.Signals(-code).name
        return PluginFault(f"the simulation of {question.strategy} was ended by {name}: torch gave up on a step "
                           f"without a device; the closed form still holds ({SHOW}=1 shows what it said)")
    last = said[-1] if said else f"the simulation ended with code {code} ({SHOW}=1 shows what it said)"
    return {1: Refused, 2: UserError}.get(code, PluginFault)(f"simulating {question.strategy}: {last}")
