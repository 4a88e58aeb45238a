"""What the host pays for a token of many answers that are written together, beside the model: a step costs nothing.

    python -m tests.benchmarks.host [--rows 64] [--tokens 300] [--rounds 5] [--temperature 0.8] [--logprobs N]

The scheduler, its rows, text streams and listeners are as they are; drawing is on the CPU, from logits of 300 tokens.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from tests.exchange.models import tokenizer
from tryplicity import load_plugins
from tryplicity.inference.engine import Engine, Request
from tryplicity.inference.fixed import FixedSteps
from tryplicity.inference.sampler import Sampling
from tryplicity.model import Model, assemble, initialise
from tryplicity.spec import load_spec, parse_yaml

MODEL = ("name: free\nvocab_size: 300\nhidden_size: 16\ncontext_length: 4096\nlayers: "
         "[{mixer: {type: short_conv}, feed_forward: {type: mlp, inner_size: 16}}]\n")


class Free(FixedSteps):
    """Recorded steps that read nothing and choose the next number."""

    def __init__(self, model: Model, rows: int) -> None:
        super().__init__(model, rows, "captured")
        self.logits_RV, self.moments = torch.randn(rows, model.spec.vocab_size), []

    def _tried(self, rows: int) -> Callable[[], None]:
        for row, own in enumerate(self.seated):
            self._put(row, own)

        def step() -> None:
            self.likeliest_R.add_(1).remainder_(250)
            self.ids_R.copy_(self.likeliest_R)
            if rows == self.most:
                self.moments.append(time.perf_counter())

        self.steps[rows] = step
        return step


def microseconds(engine: Engine, rows: int, tokens: int, temperature: float, logprobs: int | None) -> float:
    """For each token, while all rows are written."""
    steps = engine.scheduler.fixed = Free(engine.model, rows)
    engine.scheduler.draws_together = True
    heard: list[list] = [[] for _ in range(rows)]
    sampling = Sampling(temperature=temperature, seed=1)
    request = Request((1, 2, 3), sampling, tokens, logprobs=logprobs, end_tokens=frozenset())
    with engine.scheduler._changed:  # until all have come
        under_way = [engine.submit(request, own.append) for own in heard]
    for generation in under_way:
        generation.wait()
    assert all(sum(len(piece.tokens) for piece in own) == tokens for own in heard)
    return 1e6 * (steps.moments[-1] - steps.moments[0]) / (rows * (len(steps.moments) - 1))


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--rows", type=int, default=64)
    options.add_argument("--tokens", type=int, default=300)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--temperature", type=float, default=0.0)
    options.add_argument("--logprobs", type=int)
    asked = options.parse_args()
    torch.set_num_threads(1)
    registry = load_plugins().registry
    model = initialise(assemble(load_spec(parse_yaml(MODEL, "free.yaml"), registry)), "cpu", 0).eval()
    engine = Engine(model, tokenizer(), slots=asked.rows)
    found = [microseconds(engine, asked.rows, asked.tokens, asked.temperature, asked.logprobs)
             for _ in range(asked.rounds)]
    engine.close()
    middle = statistics.median(found)
    print(f"{asked.rows} rows: {middle:.1f} us a token, {1e6 / middle:,.0f} a second "
          f"({', '.join(f'{one:.1f}' for one in found)})")


if __name__ == "__main__":
    main()
