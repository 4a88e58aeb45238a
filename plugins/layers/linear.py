"""The plain linear layer, and the shape every other one has."""

from __future__ import annotations

from tryplicity import Linear


class PlainLinear(Linear):
    """x @ W.T in the weights' own precision, dense or a stack of experts; what `Linear` itself computes."""

    name = "linear"
