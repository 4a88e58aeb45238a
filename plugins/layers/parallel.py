"""Mixers side by side, as in Falcon-H1 and Hymba.

Shapes: B batch, T time, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from tryplicity import Mixer, Part, Positive, Report, Rows, State, output_and_report, uses


@dataclass(frozen=True)
class Branch:
    """One of the mixers."""

    mixer: Part = uses("mixer")
    """which"""
    input_multiplier: Positive = 1.0
    """a constant factor of what goes in"""
    output_multiplier: Positive = 1.0
    """a constant factor of what comes out"""


class Parallel(Mixer):
    """The sum of several mixers of the same tokens, each between constant factors of its own (Falcon-H1,
    arXiv:2507.22448). Any mixers, these too; the state holds theirs."""

    name = "parallel"
    trials = ({"of": [{"mixer": {"type": "mamba2", "head_dim": 16, "state_size": 8}, "output_multiplier": 0.5},
                      {"mixer": {"type": "gqa", "heads": 4}, "input_multiplier": 2.0}, {"mixer": "short_conv"}]},)

    @dataclass(frozen=True)
    class Config:
        of: Annotated[list[Branch], Field(min_length=1, max_length=64)]
        """the mixers: [{mixer: gqa}, {mixer: mamba2, output_multiplier: 0.5}]"""

    @classmethod
    def check(cls, config: Config, site) -> Iterator[tuple[str, str]]:
        for branch in config.of:
            if branch.mixer.component.takes_embedding or branch.mixer.component.takes_use:
                yield "of", f"{branch.mixer.name} needs to be a block's whole mixer, not one of several"

    def __init__(self, config: Config, site) -> None:
        super().__init__()
        self.config = config
        self.mixers = nn.ModuleList(branch.mixer.build(site) for branch in config.of)
        # rows of different lengths go to each mixer as it can take them
        self.takes_rows = all(mixer.takes_rows for mixer in self.mixers)

    def path(self, device: torch.device, compiled: bool) -> str | None:
        found = [f"{branch.mixer.name}: {path}" for branch, mixer in zip(self.config.of, self.mixers, strict=True)
                 if (path := mixer.path(device, compiled))]
        return "; ".join(found) or None

    def new_state(self, batch: int, *, device=None, dtype=None) -> State:
        """of: the state of each mixer, or None."""
        return State(of=[mixer.new_state(batch, device=device, dtype=dtype) for mixer in self.mixers])

    def forward(self, x_BTD: Tensor, *, state: State | Rows | None = None, doc_ids: Tensor | None = None):
        total, report = None, Report()
        for i, (branch, mixer) in enumerate(zip(self.config.of, self.mixers, strict=True)):
            given_BTD = x_BTD if branch.input_multiplier == 1 else x_BTD * branch.input_multiplier
            y_BTD, said = output_and_report(mixer(given_BTD, state=_own(state, i), doc_ids=doc_ids))
            report.include(f"mixers.{i}", said)
            y_BTD = y_BTD if branch.output_multiplier == 1 else y_BTD * branch.output_multiplier
            total = y_BTD if total is None else total + y_BTD
        return total, report


def _own(state: State | Rows | None, i: int) -> State | Rows | None:
    """What the i-th mixer's own is of the state of all."""
    if isinstance(state, Rows):
        own = [one["of"][i] for one in state]
        return None if own[0] is None else Rows(own)
    return None if state is None else state["of"][i]
