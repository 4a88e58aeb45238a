"""Layers: mixers and feed-forwards.

Shapes: B batch, T time, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from tryplicity.components.module import Module
from tryplicity.components.state import State


class Layer(Module):
    """A mixer or feed-forward: `Class(config, site)`, maps [B, T, D] to [B, T, D]."""

    def __init__(self) -> None:
        super().__init__()

    def forward(self, x_BTD: Tensor, *, state: State | None = None, doc_ids: Tensor | None = None):
        """x_BTD: any length. Returns the output, or (output, Report).

        state: what `new_state` gave; the tokens continue those the state has seen, and it is updated in place.
        doc_ids: [B, T] integers from 0; tokens with different ids never reach one another, in one chunk or two: the
        state must know the last token's id. None: one document a row, with a state the one it stands in.
        No host synchronisation (no .item(), no shape that depends on data) while gradients are on.
        """
        raise NotImplementedError

    def new_state(self, batch: int, *, device=None, dtype=None) -> State | None:
        """An empty decoding state; None for a layer that looks at each token alone."""
        return None

    #: True: `state` may also be Rows, one State of `new_state(1)` for each row of x_BTD, as many sequences that are
    #: decoded together have; False: the layer is then called row by row
    takes_rows: ClassVar[bool] = False
    #: True: forward takes `embedding` too, [B, T, D], what the embedding gave for the same tokens; None: x_BTD is it
    takes_embedding: ClassVar[bool] = False
    #: True: forward takes `use` too, at which of the `Site.uses` layers of a shared block it works, from 0; what it has
    #: for each of them stands in a PerUse
    takes_use: ClassVar[bool] = False

    def converted(self, given: Mapping[str, Tensor], generator: torch.Generator) -> Mapping[str, Tensor]:
        """Own parameters and buffers, by their names in this layer and whole, made of those of another layer that
        stood in its place: asked where a training begins from trained weights (`train --from`) and not all of its
        own are there in their shapes. What is not given stays as it is initialised; here that is all.

        given: the other's, by their names in it, in CPU memory. Called with tensors on the meta device too, for names
        and shapes, and on every rank alike: draw what is random with the generator. Raises UserError where the other
        layer cannot become this one, though it is of a kind that can.
        """
        return {}

    def extra_flops(self, tokens: int) -> int:
        """FLOPs of a custom kernel that torch's counter cannot see, forward only, for `tokens` tokens."""
        return 0


class PerUse(nn.ModuleList):
    """What a layer of a shared block has of its own at each of its uses, a module each."""


class Mixer(Layer):
    """Moves information between tokens."""

    family = "mixer"


class FeedForward(Layer):
    """Works on each token alone."""

    family = "feed_forward"
