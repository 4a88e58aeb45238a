"""Training speed of tiny beside busy processes: threads fixed at two, fixed at one, and as many as are free.

    python -m tests.benchmarks.threads [--busy 1] [--rounds 12]      steps in turn; tokens per second of each, median

Each side is a process of its own that stays alive. `--alone` asks the kernel for the machine while it runs (root,
autogroups), where others use it too.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROWS = 4
SIDES = {"two threads": "2", "one thread": "1", "as many as are free": "free"}


def side(threads: str) -> None:
    """A step for each line that comes; its tokens per second."""
    from tryplicity.training.process import limit_spinning, tune_malloc

    limit_spinning()
    tune_malloc()
    import torch

    from tryplicity import load_plugins
    from tryplicity.data.packing import Batch
    from tryplicity.model import assemble, initialise
    from tryplicity.spec import load_spec
    from tryplicity.training.step import decay_groups, training_step
    from tryplicity.training.threads import Threads

    registry = load_plugins().registry
    spec = load_spec("tiny", registry)
    model = initialise(assemble(spec), "cpu", 0).train()
    optimizer = spec.training.optimizer.build().build(*decay_groups(model))
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    ids_BT = torch.randint(6, spec.vocab_size, (ROWS, spec.context_length + 1))
    batch = Batch(ids_BT[:, :-1], ids_BT[:, 1:], torch.zeros_like(ids_BT[:, 1:], dtype=torch.int32), 0)
    strategy = registry.part("parallelism", "single").build()
    if threads != "free":
        torch.set_num_threads(int(threads))
    with Threads(fixed=threads != "free") as own:
        for step, _ in enumerate(sys.stdin):
            if said := own.between_steps():
                print(said, file=sys.stderr, flush=True)
            started = time.perf_counter()
            training_step(model, optimizer, strategy, batch, step=step, micro_batch=ROWS, precision="fp32",
                          max_norm=1.0, learning_rate_factor=0.1)
            print(ROWS * spec.context_length / (time.perf_counter() - started), flush=True)


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--busy", type=int, default=1)
    options.add_argument("--rounds", type=int, default=12)
    options.add_argument("--alone", action="store_true")
    options.add_argument("--side")
    given = options.parse_args()
    if given.side:
        return side(given.side)
    if given.alone:
        Path("/proc/self/autogroup").write_text("-20")
    running = {name: subprocess.Popen([sys.executable, "-m", "tests.benchmarks.threads", "--side", number],
                                      stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
               for name, number in SIDES.items()}
    hogs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(given.busy)]
    speeds: dict[str, list[float]] = {name: [] for name in running}
    try:
        for _ in range(given.rounds + 2):  # the first two: compiling, and room for tensors
            for name, process in running.items():
                print(file=process.stdin, flush=True)
                speeds[name].append(float(process.stdout.readline()))
    finally:
        for process in [*running.values(), *hogs]:
            process.kill()
    for name, all_of_them in speeds.items():
        kept = all_of_them[2:]
        print(f"{given.busy} busy, {name}: {statistics.median(kept):,.0f} tokens/s, "
              f"{min(kept):,.0f} to {max(kept):,.0f}")


if __name__ == "__main__":
    main()
