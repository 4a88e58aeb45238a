"""A mixer made of two others side by side, as a stranger writes it: its decoding state holds theirs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tryplicity import Mixer, Part, State, hookimpl, uses


class Parallel(Mixer):
    """The sum of two mixers of the same tokens."""

    name = "two_mixers"

    @dataclass(frozen=True)
    class Config:
        left: Part = uses("mixer", default="mamba2")
        """The one."""
        right: Part = uses("mixer", default="gqa")
        """The other."""
        held: Literal["state", "list", "tuple", "dict"] = "state"
        """How the state holds the states of the two."""

    def __init__(self, config, site):
        super().__init__()
        self.held = config.held
        self.left, self.right = config.left.build(site), config.right.build(site)

    def new_state(self, batch, *, device=None, dtype=None):
        left, right = (own.new_state(batch, device=device, dtype=dtype) for own in (self.left, self.right))
        if self.held == "state":
            return State(left=left, right=right)
        return State(both={"list": [left, right], "tuple": (left, right), "dict": {"l": left, "r": right}}[self.held])

    def forward(self, x_BTD, *, state=None, doc_ids=None):
        left = right = None
        if state is not None:
            both = state if self.held == "state" else state["both"]
            left, right = both.values() if isinstance(both, dict) else both
        return self.left(x_BTD, state=left, doc_ids=doc_ids) + self.right(x_BTD, state=right, doc_ids=doc_ids)


@hookimpl
def tryplicity_layers():
    return [Parallel]
