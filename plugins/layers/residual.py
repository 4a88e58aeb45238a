"""The plain residual connection."""

from __future__ import annotations

from torch import Tensor

from tryplicity import Report, Residual


class Add(Residual):
    """x + sublayer(x): one stream, [B, T, D]."""

    name = "add"

    def __init__(self, config, site) -> None:
        super().__init__()

    def forward(self, streams: Tensor, sublayer) -> tuple[Tensor, Report]:
        y_BTD, report = sublayer(streams)
        return streams + y_BTD, report
