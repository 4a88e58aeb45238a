"""Routers: which experts a token goes to.

Shapes: B batch, T time, D hidden, N tokens (B*T), E experts, K chosen experts, M size of a sketch.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from tryplicity.components.module import Module
from tryplicity.components.report import Report


class Routing(NamedTuple):
    """A router's choice for N tokens."""

    experts_NK: Tensor  # int64; the number of experts itself stands for "none"
    weights_NK: Tensor  # the dtype of the tokens; zero where there is none
    report: Report


class Inhibition(Module):
    """`Class(config, experts)`: how the choice of one expert for a token lowers the standing of the others.

    Any router can have one: an option `inhibition: Part = uses("inhibition", optional=True)`, built as
    `self.inhibition`, which then chooses from the router's scores.
    """

    family = "inhibition"

    def wants_sketch(self, step: int) -> bool:
        """As a router's own."""
        return False

    def take_sketch(self, sketch_EM: Tensor) -> None:
        """As a router's own."""

    def choose(self, scores_NE: Tensor, standing_NE: Tensor, most: int,
               k_N: Tensor | None = None) -> tuple[Tensor, Report]:
        """The experts of each token, [N, most], in the order in which they were chosen, and a report that the router
        includes as `inhibition`.

        scores_NE: detached, fp32; the weights of the chosen come from them. standing_NE: what is chosen by, scores
        and whatever else (balance) the router adds. k_N: how many of a token's experts will be used; None: all.
        """
        raise NotImplementedError

    def revive(self, dead: list[int]) -> None:
        """These experts were drawn anew: what was known of them is no longer so."""


class Router(Module):
    """`Class(config, site, experts, top_k)`: chooses experts for each token.

    `max_k` is the widest choice (the K of Routing), `mean_k` what a budget is planned with.
    """

    family = "router"
    max_k: int
    mean_k: float
    #: what its choices do to one another; a router without it, or with None, has nothing of the kind
    inhibition: Inhibition | None

    def forward(self, x_BTD: Tensor) -> Routing:
        """x_BTD: the tokens, N = B*T."""
        raise NotImplementedError

    def wants_sketch(self, step: int) -> bool:
        """Whether `take_sketch` is to be called before this step."""
        return False

    def take_sketch(self, sketch_EM: Tensor) -> None:
        """sketch_EM: a random projection of each expert's weights, whose inner products estimate those of the
        weights, as they stand before a step. What is to be kept of it goes into a buffer."""

    def choose(self, x_D: Tensor) -> list[tuple[int, float]]:
        """What `forward` chooses for one token, as experts and their weights on the host; for decoding."""
        routing = self(x_D[None, None])
        return list(zip(routing.experts_NK[0].tolist(), routing.weights_NK[0].tolist(), strict=True))
