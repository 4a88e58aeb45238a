"""The base classes a plugin author subclasses, one per family.

A component is a class with a `family`, a `name`, a frozen dataclass `Config` and a constructor that takes the
config first. The smallest layer:

    class Shift(Mixer):
        '''Each token sees the one before it.'''
        name = "shift"

        @dataclass(frozen=True)
        class Config:
            gain: float = 1.0       #: how much of the previous token is kept

        def __init__(self, config, site):
            super().__init__()
            self.gain = config.gain

        def forward(self, x_BTD, *, state=None, doc_ids=None): ...

Shapes: B batch, T time, D hidden, E experts, K chosen experts, N tokens (B*T), S rows sorted by expert,
V vocabulary, F inner.
"""

from __future__ import annotations

from tryplicity.components.architecture import (
    CONVOLUTION,
    SAME,
    TRANSPOSED,
    Architecture,
    Form,
    Piece,
    turned,
)
from tryplicity.components.layers import FeedForward, Layer, Mixer, PerUse
from tryplicity.components.linear import Activation, Linear, Norm
from tryplicity.components.module import Repair, Site
from tryplicity.components.parallelism import Parallelism
from tryplicity.components.report import IGNORE, Mean, Report, output_and_report
from tryplicity.components.routing import Inhibition, Router, Routing
from tryplicity.components.signals import Head, Objective, Residual
from tryplicity.components.state import Rows, State, tensors
from tryplicity.components.text import Conversation, Document, Judge, Passage, Reading, Retriever, Source, Verdict
from tryplicity.components.training import Brain, Night, Optimizer, Schedule, Stage
from tryplicity.parts import Component, Part

FAMILIES: dict[str, type[Component]] = {
    cls.family: cls
    for cls in (Mixer, FeedForward, Linear, Norm, Activation, Router, Inhibition, Residual, Head, Objective, Brain,
                Parallelism, Optimizer, Schedule, Source, Judge, Retriever, Architecture)
}

__all__ = [
    "CONVOLUTION",
    "FAMILIES",
    "IGNORE",
    "SAME",
    "TRANSPOSED",
    "Activation",
    "Architecture",
    "Brain",
    "Component",
    "Conversation",
    "Document",
    "FeedForward",
    "Form",
    "Head",
    "Inhibition",
    "Judge",
    "Layer",
    "Linear",
    "Mean",
    "Mixer",
    "Night",
    "Norm",
    "Objective",
    "Optimizer",
    "Parallelism",
    "Part",
    "Passage",
    "PerUse",
    "Piece",
    "Reading",
    "Repair",
    "Report",
    "Residual",
    "Retriever",
    "Router",
    "Routing",
    "Rows",
    "Schedule",
    "Site",
    "Source",
    "Stage",
    "State",
    "Verdict",
    "output_and_report",
    "tensors",
    "turned",
]
