"""What a checkpoint costs a training: the pause in which tensors are copied, and what is written meanwhile.

    python -m tests.benchmarks.checkpoints --millions 50
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from tryplicity.components import Parallelism
from tryplicity.training import checkpoint
from tryplicity.training.checkpoint import Options, TrainingProgress
from tryplicity.training.saving import Saver
from tryplicity.world import World


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--millions", type=int, default=50, help="parameters")
    options.add_argument("--device", default="cpu")
    options.add_argument("--folder", type=Path, help="on the disk to measure")
    given = options.parse_args()
    model = nn.Sequential(*(nn.Linear(1000, 1000, bias=False, device=given.device) for _ in range(given.millions)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    size = 12 * sum(p.numel() for p in model.parameters()) / 1e9
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        saver = Saver(Path(folder), World(device=torch.device(given.device)), keep=1, every=1)
        for step in range(1, 4):
            started = time.perf_counter()
            saver.begin(Parallelism(), model, optimizer, Options.of("adamw", optimizer), TrainingProgress(step=step))
            pause, steps = time.perf_counter() - started, 0
            while not saver.job.ended:
                optimizer.step()
                steps += 1
            job = saver.finish()
            whole = time.perf_counter() - started
            assert job.state == "committed", job.error
            print(f"{size:.2f} GB: {pause:.2f} s of pause, {whole:.2f} s until it is complete, in which the optimizer "
                  f"made {steps} steps")
        started = time.perf_counter()
        assert checkpoint.damage(Path(folder) / "step-3") is None
        print(f"verified in {time.perf_counter() - started:.2f} s")
        started = time.perf_counter()
        optimizer.step()
        print(f"a step of the optimizer alone: {time.perf_counter() - started:.2f} s")


if __name__ == "__main__":
    main()
