"""What a module costs: step time and peak memory, with it and without it in turn.

    python -m tryplicity.ablation.cost FOLDER STEPS      the process that holds one side

Two processes train, one at a time, a burst of steps whenever they are told to; each pair of bursts gives a ratio,
so that a drift of the machine's speed meets both sides. Now and then two new ones take over, since the peak memory of
one process is a single sample. They run the training loop itself: what modules do on the
host counts, and the stages of a curriculum pass by in proportion. Loads no torch before it measures.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tryplicity.ablation.cells import NEVER, Cell, Setting, cell
from tryplicity.ablation.modules import Comparison
from tryplicity.ablation.runner import cores, last_words, worker_environment
from tryplicity.errors import Refused
from tryplicity.files import write_text

PAIRS, BURST, WARM_UP = 12, 3, 3  # pairs of bursts; steps in one; steps before the first
ROUNDS = 3  # new processes of both sides, that share the pairs: the peak memory of one process is one sample


# --- the process that holds one side ---

def main() -> int:
    """Trains FOLDER's cell and waits: for each line on stdin it does a burst and prints what that took."""
    from tryplicity.ablation.cell import load
    from tryplicity.errors import UserError

    folder, steps = Path(sys.argv[1]), int(sys.argv[2])
    try:
        loaded = load(folder)
        from tryplicity.run import Run
        from tryplicity.training.loop import Budget, train
        from tryplicity.training.watchers import Watcher

        class Gate(Watcher):
            left, started, tokens = WARM_UP, time.perf_counter(), 0

            def step(self, progress: Any, metrics: dict[str, Any], spent: float, seconds_left: float) -> None:
                self.left -= 1
                if self.left:
                    return
                seconds, tokens = time.perf_counter() - self.started, progress.tokens - self.tokens
                print(json.dumps({"seconds_per_token": seconds / tokens, "memory": peak() - before}), flush=True)
                if not sys.stdin.readline():
                    os._exit(0)  # all is measured; nothing of this is to be kept
                self.left, self.started, self.tokens = BURST, time.perf_counter(), progress.tokens

        before = reset_peak()
        train(loaded.build, loaded.prepared, Run(folder), Budget(steps=steps), loaded.plugins, watcher=Gate())
    except (UserError, Refused) as error:
        print(f"error: {error}", file=sys.stderr)
    return 1


def reset_peak() -> int:
    """Forget the peak so far; the bytes that are in use now."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak becomes what is resident now
    return peak()


def peak() -> int:
    """The most bytes in use since the last reset: of the GPU, or resident where there is none."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:  # not ru_maxrss: that begins with the peak of the process this one was forked from
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError, ValueError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# --- who tells them ---

class Side:
    """One of the two processes."""

    def __init__(self, folder: Path, steps: int) -> None:
        self.log = folder / "log.txt"
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tryplicity.ablation.cost", str(folder), str(steps)], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=log, text=True, env=worker_environment(cores()),
                start_new_session=True)
        self.memory = 0

    def answer(self) -> float:
        """Waits for a burst; seconds per token. Raises Refused with the cause when the process ended."""
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            raise Refused(last_words(self.log))
        said = json.loads(line)
        self.memory = said["memory"]
        return said["seconds_per_token"]

    def burst(self) -> float:
        with contextlib.suppress(BrokenPipeError):  # the answer says why
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def key(row: Comparison, setting: Setting) -> str:
    """The same for the same two specs on the same profile."""
    keys = [one.key for one in _sides(row, setting)] + [setting.hardware.accelerator, PAIRS, BURST, ROUNDS]
    return hashlib.sha256(json.dumps(keys).encode()).hexdigest()


def _sides(row: Comparison, setting: Setting) -> list[Cell]:
    sides = []
    for variant in (row.with_it, row.without_it):
        one = cell(variant, 0, dataclasses.replace(setting, tokens=0, rows=0))
        one.spec["training"]["checkpoint_every"] = NEVER
        sides.append(one)
    return sides


def known(out: Path) -> dict[str, dict[str, Any]]:
    """What was measured before, by key."""
    try:
        return json.loads((out / "cost.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def measure(row: Comparison, setting: Setting, out: Path, plans: dict[str, Any], tokenizer: str,
            progress: Callable[[float], None], stopping: Callable[[], bool]) -> dict[str, Any] | None:
    """Measure one row and keep it in OUT/cost.json; None when stopped. Raises Refused when a side fails."""
    bursts = PAIRS // ROUNDS
    ratios: list[float] = []
    memory: tuple[list[int], list[int]] = ([], [])
    progress(0.0)
    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory(dir=out, prefix=".cost-") as folder, contextlib.ExitStack() as stack:
            sides = []
            for one in _sides(row, setting):
                sides.append(Side(one.create(Path(folder), plans[one.label], tokenizer), WARM_UP + bursts * BURST + 1))
                stack.callback(sides[-1].close)
            for side in sides:
                side.answer()  # warm
            for _ in range(bursts):
                if stopping():
                    return None
                order = (0, 1) if len(ratios) % 2 == 0 else (1, 0)  # who is first has no edge
                taken = {i: sides[i].burst() for i in order}
                ratios.append(taken[0] / taken[1])
                progress(len(ratios) / (ROUNDS * bursts))
            for samples, side in zip(memory, sides, strict=True):
                samples.append(side.memory)
    low, middle, high = statistics.quantiles(ratios, n=4)
    found = {"module": row.module, "step_time_ratio": middle, "quartiles": [low, high],
             "memory_with": memory[0], "memory_without": memory[1]}
    write_text(out / "cost.json", json.dumps({**known(out), key(row, setting): found}, indent=1))
    return found


if __name__ == "__main__":
    sys.exit(main())
