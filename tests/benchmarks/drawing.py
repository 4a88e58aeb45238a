"""Drawing the next tokens of many answers: all rows together where their logits are, beside NumPy row by row.

    python -m tests.benchmarks.drawing [--device cpu] [--vocabulary 32000] [--rounds 7]

Milliseconds a step, in turn, the medians; NumPy's include bringing the logits to the host, and both the tokens.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from tryplicity.inference.choosing import next_tokens
from tryplicity.inference.sampler import Sampler, Sampling

SETTINGS = {"temperature": {}, "min_p": {"min_p": 0.05}, "top_k": {"top_k": 40}, "top_p": {"top_p": 0.95},
            "all three": {"top_k": 100, "top_p": 0.9, "min_p": 0.02}, "penalties": {"repetition_penalty": 1.1}}
WORDS = range(500)  # of a prompt, that penalties look at


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--device", default="cpu")
    options.add_argument("--vocabulary", type=int, default=32000)
    options.add_argument("--rounds", type=int, default=7)
    asked = options.parse_args()
    print("options      rows  together  row by row  ratio")
    for name, settings in SETTINGS.items():
        for rows in (1, 8, 64):
            logits_RV = (3 * torch.randn(rows, asked.vocabulary)).to(asked.device)
            samplers = [Sampler(Sampling(temperature=0.8, seed=row, **settings), WORDS) for row in range(rows)]
            took: list[list[float]] = [[], []]
            for _ in range(asked.rounds):
                begun = time.perf_counter()
                next_tokens(logits_RV, samplers).tolist()
                middle = time.perf_counter()
                for row, sampler in enumerate(samplers):
                    sampler(logits_RV[row])
                for side, seconds in zip(took, (middle - begun, time.perf_counter() - middle), strict=True):
                    side.append(1e3 * seconds)
            together, alone = map(statistics.median, took)
            print(f"{name:12} {rows:4} {together:9.2f} {alone:11.2f} {alone / together:6.2f}")


if __name__ == "__main__":
    main()
