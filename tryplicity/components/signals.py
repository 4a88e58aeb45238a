"""How a sub-layer joins the stream, and what is learned from: residuals, heads, objectives.

Shapes: B batch, T time, D hidden, K tokens ahead, V vocabulary.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tryplicity.components.module import Module, Site
from tryplicity.components.report import Mean, Report


class Residual(Module):
    """`Class(config, site)`: how a sub-layer's output joins the stream(s). One instance per sub-layer."""

    family = "residual"

    def expand(self, x_BTD: Tensor) -> Tensor:
        """From the embedding to the stream(s) the first layer reads."""
        return x_BTD

    def reduce(self, streams: Tensor) -> Tensor:
        """From the last layer's stream(s) to [B, T, D]."""
        return streams

    def forward(self, streams: Tensor, sublayer) -> tuple[Tensor, Report]:
        """`sublayer(x_BTD) -> (y_BTD, Report)`. Returns the new stream(s) and the sub-layer's report."""
        raise NotImplementedError


class Head(Module):
    """`Class(config, site)`: an objective on the last hidden state beside the next token's."""

    family = "head"
    #: factor of this head's mean loss in the total
    weight: float = 1.0

    def targets(self, ids_BT: Tensor, targets_BT: Tensor, doc_ids_BT: Tensor | None) -> Tensor:
        """What this head must predict, IGNORE where nothing; from data alone, so that the number of valid
        targets in the whole batch is known before the first backward pass. Any shape [B, T, ...]."""
        raise NotImplementedError

    def forward(self, h_BTD: Tensor, targets: Tensor, unembedding_VD: Tensor) -> Mean:
        """The summed loss over valid targets and their number. h_BTD: the hidden state after the last norm."""
        raise NotImplementedError

    def draft(self, h_BTD: Tensor) -> Tensor | None:
        """The hidden states that the unembedding turns into tokens 2, 3, ... ahead, [B, T, K, D], with which decoding
        may guess ahead; None for a head that has none."""
        return None


class Objective(Module):
    """`Class(config, site)`: a training signal beside the heads'. Overrides one of the two methods below.

    With `block_loss` each block holds an instance, `site.layer` being its index; with `token_weights` the model
    holds one.
    """

    family = "objective"
    #: set before a step by the stage of a curriculum, on the host; multiplies what the objective adds
    factor: float = 1.0
    #: share of each row's tokens whose loss is propagated: those with the largest weights
    keep: float = 1.0

    def __init__(self, config: Any, site: Site) -> None:
        super().__init__()
        self.config = config

    def block_loss(self, x_BTD: Tensor, y_BTD: Tensor, doc_ids_BT: Tensor | None) -> Report:
        """A loss from a block's input and output alone, in training only. Each loss of the report is weighted,
        multiplied by `factor`, and a mean over rows of something computed for each row."""
        raise NotImplementedError

    def token_weights(self, nll_BT: Tensor, valid_BT: Tensor):
        """Weights [B, T] for the next-token loss of each token; their mean over the valid tokens of each row is
        one, and invalid tokens have zero. nll_BT: nats of the right token as the model stands, detached, fp32;
        zero where not valid. Returns the weights, or (weights, Report)."""
        raise NotImplementedError

    @classmethod
    def weighs_tokens(cls) -> bool:
        return cls.token_weights is not Objective.token_weights

    @classmethod
    def reads_blocks(cls) -> bool:
        return cls.block_loss is not Objective.block_loss
