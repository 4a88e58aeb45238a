"""Held-out bits per byte: the figure that does not depend on the tokenizer."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from tryplicity.components import IGNORE
from tryplicity.model import NEXT_TOKEN, Model
from tryplicity.training.step import autocast


@torch.no_grad()
def bits_per_byte(model: Model, heldout, *, rows: int | None, batch_rows: int, context_length: int, device: str,
                  precision: str, stopping: Callable[[], bool] = lambda: False) -> float:
    """Bits the model needs for each byte of held-out text. rows: the first so many sequences; None: all."""
    was_training = model.training
    model.eval()
    nats, scored = 0.0, 0
    try:
        for batch in heldout.rows(context_length, batch_rows, limit=rows):
            if stopping():
                break
            batch = batch.to(device)
            with autocast(batch.ids_BT.device.type, precision):
                losses = model(batch.ids_BT, targets={NEXT_TOKEN: batch.targets_BT}, doc_ids_BT=batch.doc_ids_BT)
            nats += losses.objectives[NEXT_TOKEN].total.item()
            scored += heldout.byte_count(batch.targets_BT[batch.targets_BT != IGNORE])
    finally:
        model.train(was_training)
    return nats / math.log(2) / max(scored, 1)
