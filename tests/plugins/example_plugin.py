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
        return State(last_BD=torch.zeros(batch, self.share_D.shape[0], device=device, dtype=dtype),
                     doc_B=torch.full((batch,), -1, device=device))

    def forward(self, x_BTD, *, state=None, doc_ids=None):
        first_B1D = torch.zeros_like(x_BTD[:, :1]) if state is None else state["last_BD"][:, None].to(x_BTD.dtype)
        before_BTD = torch.cat([first_B1D, x_BTD[:, :-1]], dim=1)
        if doc_ids is not None:  # the last token of one document is nothing to the first of the next, in this chunk
            doc_B1 = doc_ids[:, :1] if state is None else state["doc_B"][:, None]  # or from the one before to this
            same_BT = doc_ids == torch.cat([doc_B1, doc_ids[:, :-1]], dim=1)
            before_BTD = before_BTD.masked_fill(~same_BT[..., None], 0)
        if state is not None:  # a copy: what x_BTD lies in may be used again, and is as long as the chunk
            state["last_BD"].copy_(x_BTD[:, -1].detach())
            if doc_ids is not None:
                state["doc_B"].copy_(doc_ids[:, -1])
        return self.out(x_BTD + self.share_D * before_BTD)


@hookimpl
def tryplicity_layers():
    return [Shift]
