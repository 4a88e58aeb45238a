"""The plain residual connection."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tryplicity import Positive, Report, Residual, later


class Add(Residual):
    """x + multiplier * sublayer(x): one stream, [B, T, D]."""

    name = "add"

    @dataclass(frozen=True)
    class Config:
        multiplier: Positive = later(1.0)
        """Of what the sub-layer gives."""

    def __init__(self, config: Config, site) -> None:
        super().__init__()
        self.multiplier = config.multiplier

    def forward(self, streams: Tensor, sublayer) -> tuple[Tensor, Report]:
        y_BTD, report = sublayer(streams)
        return (streams + y_BTD if self.multiplier == 1.0 else streams + self.multiplier * y_BTD), report
