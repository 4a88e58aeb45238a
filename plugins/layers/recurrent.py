"""What mixers with a state of constant size share: documents as runs, a short causal convolution with its tail, and
where time steps begin.

Such a mixer's decoding state has conv [B, W - 1, C], the last inputs of the convolution, those of an earlier document
zeroed, and doc [B], the document of the last token.

Shapes: B batch, T time, C channels of the convolution, W its width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tryplicity import State


def runs_of(doc_ids: Tensor | None, state: State | None) -> Tensor | None:
    """[B, T]: the documents of a row counted from the one that the state stands in, which is 0 (without a state, the
    first); an id that comes back begins a new one. None where no ids are given."""
    if doc_ids is None:
        return None
    before_B1 = doc_ids[:, :1] if state is None else state["doc"][:, None]
    return (doc_ids != torch.cat([before_B1, doc_ids[:, :-1]], 1)).cumsum(1)


def begins(runs_BT: Tensor) -> Tensor:
    """[B, T]: whether a token is the first of its document, and not of that which the state stands in."""
    return runs_BT != F.pad(runs_BT, (1, 0))[:, :-1]


class Window(NamedTuple):
    """The inputs of a convolution with what it looks back on."""

    x_BTC: Tensor  # `lead` tokens that came before, and the new ones
    lead: int
    runs_BT: Tensor | None  # of all of these; the lead is of run 0
    same_BWT: Tensor | None  # [B, W - 1, T]: whether the token 1, 2, ... back belongs to the same document


def window(x_BTC: Tensor, width: int, state: State | None, runs_BT: Tensor | None) -> Window:
    lead = 0
    if state is not None:
        lead = width - 1
        x_BTC = torch.cat([state["conv"].to(x_BTC.dtype), x_BTC], 1)
    if runs_BT is None:
        return Window(x_BTC, lead, None, None)
    runs_BT = F.pad(runs_BT, (lead, 0))
    return Window(x_BTC, lead, runs_BT, conv_masks(runs_BT, width))


def conv_masks(runs_BT: Tensor, width: int) -> Tensor:
    """[B, width - 1, T]: whether the token 1, 2, ... back belongs to the same document."""
    same = [runs_BT == F.pad(runs_BT, (lag, 0), value=-1)[:, : runs_BT.shape[1]] for lag in range(1, width)]
    return torch.stack(same, 1)


def keep_tail(state: State, seen: Window, doc_ids: Tensor | None) -> None:
    """Write into the state what the convolution of the next tokens looks back on."""
    lead = seen.lead
    tail_BWC = seen.x_BTC.detach()[:, seen.x_BTC.shape[1] - lead:]
    if seen.runs_BT is not None:
        foreign_BW1 = (seen.runs_BT[:, -lead:] != seen.runs_BT[:, -1:])[..., None]
        tail_BWC = tail_BWC.masked_fill(foreign_BW1, 0)
        state["doc"].copy_(doc_ids[:, -1])
    state["conv"].copy_(tail_BWC)


def new_tail(batch: int, width: int, channels: int, *, device, dtype) -> State:
    return State(conv=torch.zeros(batch, width - 1, channels, device=device, dtype=dtype),
                 doc=torch.full((batch,), -1, device=device))


def causal_conv(x_BTC: Tensor, weight_WC: Tensor, bias_C: Tensor | None, lead: int = 0,
                same_BWT: Tensor | None = None) -> Tensor:
    """A causal convolution over time of each channel, in fp32 or wider. weight_WC: the last of the W taps meets the
    current token. lead: how many of the first tokens are only looked back on and give no output. same_BWT: from
    `conv_masks`."""
    wide = torch.promote_types(x_BTC.dtype, torch.float32)
    width, length = weight_WC.shape[0], x_BTC.shape[1] - lead
    w_WC, padded = weight_WC.to(wide), F.pad(x_BTC, (0, 0, width - 1 - lead, 0)).to(wide)
    y_BTC = padded[:, width - 1:] * w_WC[-1]
    if bias_C is not None:
        y_BTC = bias_C.to(wide) + y_BTC
    for lag in range(1, width):
        source = padded[:, width - 1 - lag:width - 1 - lag + length] * w_WC[-1 - lag]
        if same_BWT is not None:
            source = source * same_BWT[:, lag - 1, lead:, None]
        y_BTC = y_BTC + source
    return y_BTC


# --- where they begin ---

def draw_taps(weight_WC: Tensor, bias_C: Tensor | None) -> None:
    """As torch's own convolution of this width begins."""
    bound = len(weight_WC) ** -0.5
    nn.init.uniform_(weight_WC, -bound, bound)
    if bias_C is not None:
        nn.init.uniform_(bias_C, -bound, bound)


def draw_time_steps(bias: Tensor, least: float, most: float, floor: float) -> None:
    """Biases whose softplus is from `least` to `most`, evenly in its logarithm."""
    dt = bias.uniform_(math.log(least), math.log(most)).exp_()
    dt.clamp_(min=floor)
    dt.add_(torch.log(-torch.expm1(-dt)))  # the inverse of softplus
