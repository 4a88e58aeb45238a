"""metrics.jsonl as TensorBoard event files, in RUN/tensorboard.

    pip install "tryplicity[tensorboard]"
    tryplicity train tiny --hw cpu --run runs/first --minutes 2
    tensorboard --logdir runs                                   # compares all runs below

It is on where the package tensorboard is installed, and off with TRYPLICITY_TENSORBOARD=0 in the environment; without
the package nothing is imported or written. metrics.jsonl is written always and holds all that is here.

Losses and other numbers of the whole model are scalars `run/NAME`, written at every step. A layer's statistic is the
scalar `NAME/PLACE` (`zero_rate/layers.0.feed_forward.activation`), so that TensorBoard shows all layers of one
statistic together; these are written at every 10th step. A list of up to 16 numbers (the load of each expert) is one
scalar for each, `load/layers.0.feed_forward.router/3`; a longer one is a histogram. Names such as the stage become
text when they change. The score of the whole held-out part stands at the last step. The numbers of an inner
object, such as a sleep's, are scalars `NAME/INNER`.

A resumed run tells TensorBoard to forget what the run before the interruption wrote from that step on.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

EVERY = 10  # steps between two lines of layers' statistics
SCALARS = 16  # the longest list that is shown as single numbers


def wanted() -> bool:
    """Whether tensorboard is installed and not switched off; imports nothing."""
    return os.environ.get("TRYPLICITY_TENSORBOARD") != "0" and importlib.util.find_spec("tensorboard") is not None


class EventFiles:
    """Writes the metrics of one run. The writer is imported and opened at the first step."""

    name = "tensorboard"

    def __init__(self, folder: Path) -> None:
        self.folder, self._writer, self._said = folder, None, {}

    def write(self, step: int, metrics: Mapping[str, Any], keep: bool = False) -> None:
        """One step's metrics: one event, whatever their number. keep: what was written of this step before stays."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.folder), purge_step=step + keep, flush_secs=30)
        from tensorboard.compat.proto.summary_pb2 import Summary

        statistics = step % EVERY == 1  # from the first on: what is measured every 20 steps is measured in these
        values = []
        for key, value in metrics.items():
            place, _, name = key.rpartition(".")
            if key in ("step", "tokens") or (place and not statistics):
                continue
            self._add(values, step, f"{name}/{place}" if place else f"run/{name}", value)
        if values:
            self._writer.file_writer.add_summary(Summary(value=values), step)

    def _add(self, values: list, step: int, tag: str, value: Any) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        if isinstance(value, str):
            if self._said.get(tag) != value:
                self._writer.add_text(tag, value, step)
                self._said[tag] = value
        elif isinstance(value, int | float):
            values.append(Summary.Value(tag=tag, simple_value=value))
        elif isinstance(value, Mapping):
            for name, inner in value.items():
                self._add(values, step, f"{tag.removeprefix('run/')}/{name}", inner)
        elif isinstance(value, list) and len(value) <= SCALARS:
            for index, inner in enumerate(value):
                self._add(values, step, f"{tag}/{index}", inner)
        elif isinstance(value, list):
            import numpy as np

            self._writer.add_histogram(tag, np.array(value, dtype=float), step)

    def flush(self) -> None:
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
