"""What acts on a run from the host: brain modules, optimizers, schedules."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from tryplicity.parts import Component

if TYPE_CHECKING:
    import numpy as np

    from tryplicity.components.parallelism import Parallelism


@dataclass(frozen=True)
class Stage:
    """What a part of pretraining does differently."""

    name: str
    context_length: int
    learning_rate_factor: float = 1.0
    tokens_per_step: int | None = None  # None: as many as the hardware profile gives
    mixture: Mapping[str, float] | None = None  # share of the tokens by domain; None: as the corpus is
    max_grade: float | None = None  # reading level up to this school grade; None: any
    factors: Mapping[str, float] = dataclasses.field(default_factory=dict)  # of objectives, by name


@dataclass
class Night:
    """What a sleeping brain module can reach."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    #: how the model lies over the ranks, all of which sleep alike: a parameter is changed inside `strategy.whole(part,
    #: write=True)`, and what the optimizer holds of it by `strategy.forget`
    strategy: Parallelism
    step: int
    seed: int
    checkpoints: list[Path]  # the regular ones on disk, oldest first; `saved_weights` reads them
    score: Callable[[], float]  # held-out bits per byte of the model as it is now
    #: (numbers of training documents, steps, learning-rate factor) -> mean loss; trains on rows packed of them
    replay: Callable[[np.ndarray, int, float], float]
    interrupted: Callable[[], bool]  # then return at once: the whole sleep is undone


class Brain(Component):
    """`Class(config)`: a module of the `brain:` list that acts on the run, from the host. All methods optional."""

    family = "brain"

    def __init__(self, config: Any) -> None:
        self.config = config

    def stage(self, spent: float, context_length: int) -> Stage | None:
        """The stage of pretraining when this share of its budget is spent. context_length: the spec's."""
        return None

    def observe(self, documents: np.ndarray, losses: np.ndarray, seed: int) -> None:
        """After each step of pretraining: the training documents seen in it and each one's mean nats a token."""

    def wants_sleep(self, step: int) -> bool:
        """Asked after each step of pretraining with the number of steps done."""
        return False

    def sleep(self, night: Night) -> dict[str, Any]:
        """What is done between steps; returns what to log. Called when `wants_sleep`, and at a sleep phase."""
        return {}

    def state(self) -> dict[str, Any]:
        """What a checkpoint must keep of this object, as JSON."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""


class Optimizer(Component):
    """`Class(config)`: makes a torch optimizer."""

    family = "optimizer"
    #: bytes of optimizer state per parameter, and of temporaries in its step (for the memory plan)
    state_bytes: ClassVar[int] = 8
    step_bytes: ClassVar[int] = 0

    def build(self, decayed: list[nn.Parameter], undecayed: list[nn.Parameter]) -> torch.optim.Optimizer:
        """The learning rate of each group is its base; the schedule multiplies it."""
        raise NotImplementedError


class Schedule(Component):
    """`Class(config)`: the learning rate's factor over a run."""

    family = "schedule"

    def factor(self, progress: float, step: int) -> float:
        """progress: the share of the budget spent, 0 to 1. step: optimizer steps done."""
        raise NotImplementedError
