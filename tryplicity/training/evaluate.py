"""Held-out bits per byte: the figure that does not depend on the tokenizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch

from tryplicity.model import NEXT_TOKEN, Model
from tryplicity.training.step import ALONE, autocast, on_device
from tryplicity.world import World


@torch.no_grad()
def bits_per_byte(model: Model, batches: Iterable[Any], *, precision: str, world: World = ALONE,
                  stopping: Callable[[], bool] = lambda: False,
                  progress: Callable[[int], None] = lambda batches: None) -> float | None:
    """Bits the model needs for each byte of the batches' text; None where there is no byte to predict, and when stopped
    before the first one.

    Of as many batches as there are ranks each takes one; where the last are fewer, all still make a forward pass.
    stopping: asked on all ranks alike, and gives all the same answer. progress: called with the number of batches that
    are scored so far.
    """
    device = model.embedding.weight.device
    was_training = model.training
    model.eval()
    nats = torch.zeros((), dtype=torch.float64, device=device)  # there, so that nobody waits for it
    size = done = 0
    try:
        for several in _by(world.size, batches):
            if stopping():
                break
            own = several[min(world.rank, len(several) - 1)]
            batch = on_device(own, device)
            with autocast(device.type, precision):
                losses = model(batch.ids_BT, targets={NEXT_TOKEN: batch.targets_BT}, doc_ids_BT=batch.doc_ids_BT)
            if world.rank < len(several):
                nats += losses.objectives[NEXT_TOKEN].total
            size += sum(batch.bytes for batch in several)
            done += len(several)
            progress(done)
    finally:
        model.train(was_training)
    return world.total([nats])[0].item() / math.log(2) / size if size else None


def _by(number: int, batches: Iterable[Any]) -> Iterator[list[Any]]:
    """The batches, so many at a time."""
    rest = iter(batches)
    while several := list(islice(rest, number)):
        yield several
