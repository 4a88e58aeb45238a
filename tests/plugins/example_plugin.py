"""The smallest useful third-party layer, complete: `tryplicity build SPEC --plugin example_plugin.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from tryplicity import Mixer, State, hookimpl


class Shift(Mixer):
    """Each token sees a learned share of the one before it. Shapes: B batch, T time, D hidden."""

    name = "shift"

    @dataclass(frozen=True)
    class Config:
        share: Annotated[float, Field(ge=0, le=1)] = 0.5
        """how much of the token before is mixed in, at the beginning of training"""

    @classmethod
    def check(cls, config, site):
        if config.share == 1 and site.context_length == 1:
            yield "share", "nothing stands before the only token; use a share below 1"

    def __init__(self, config, site):
        super().__init__()
        self.config = config
        self.share_D = nn.Parameter(torch.empty(site.hidden_size))
        self.out = site.linear(site.hidden_size, site.hidden_size, writes_residual=True)

    def reset_parameters(self):
        nn.init.constant_(self.share_D, self.config.share)

    def new_state(self, batch, *, device=None, dtype=None):
        return State(last_BD=torch.zeros(batch, self.share_D.shape[0], device=device, dtype=dtype))

    def forward(self, x_BTD, *, state=None, doc_ids=None):
        first_B1D = state["last_BD"][:, None] if state is not None else torch.zeros_like(x_BTD[:, :1])
        before_BTD = torch.cat([first_B1D, x_BTD[:, :-1]], dim=1)
        if doc_ids is not None:  # the last token of one document is nothing to the first of the next
            same_BT = torch.cat([torch.ones_like(doc_ids[:, :1]), doc_ids[:, 1:] == doc_ids[:, :-1]], dim=1)
            before_BTD = before_BTD * same_BT[..., None]
        if state is not None:
            state["last_BD"] = x_BTD[:, -1]
        return self.out(x_BTD + self.share_D * before_BTD)


@hookimpl
def tryplicity_layers():
    return [Shift]
