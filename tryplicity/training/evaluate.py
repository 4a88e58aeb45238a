"""Held-out bits per byte: the figure that does not depend on the tokenizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from tryplicity.model import NEXT_TOKEN, Model
from tryplicity.training.step import autocast, on_device


@torch.no_grad()
def bits_per_byte(model: Model, batches: Iterable[Any], *, precision: str,
                  stopping: Callable[[], bool] = lambda: False,
                  progress: Callable[[int], None] = lambda batches: None) -> float | None:
    """Bits the model needs for each byte of the batches' text; None where there is no byte to predict, and when stopped
    before the first one.

    progress: called with the number of batches scored so far.
    """
    device = model.embedding.weight.device
    was_training = model.training
    model.eval()
    nats, size = 0.0, 0
    try:
        for done, batch in enumerate(batches, start=1):
            if stopping():
                break
            batch = on_device(batch, device)
            with autocast(device.type, precision):
                losses = model(batch.ids_BT, targets={NEXT_TOKEN: batch.targets_BT}, doc_ids_BT=batch.doc_ids_BT)
            nats += losses.objectives[NEXT_TOKEN].total.item()
            size += batch.bytes
            progress(done)
    finally:
        model.train(was_training)
    return nats / math.log(2) / size if size else None
