"""Multi-scale retention (Sun et al., arXiv:2307.08621, without its rotation): linear attention whose memory fades.

A head's memory of all tokens before is one K x K matrix, S_t = g S_(t-1) + k_t v_t, read by q_t S_t, with a decay g of
each head's own. Training reads it as masked products of a whole chunk; decoding carries S.

Shapes: B batch, T time, D hidden, H heads, K head dim, S earlier tokens.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tryplicity import Count, Mixer, State


class Retention(Mixer):
    """Linear attention with a decay for each head, a norm of each head's output, and a gate."""

    name = "retention"
    trials = ({"heads": 2}, {"heads": 4})

    @dataclass(frozen=True)
    class Config:
        heads: Count = 8
        """heads; head number h forgets a share of 2^-(5+h) with each token"""

    @classmethod
    def check(cls, config, site):
        if site.hidden_size % config.heads:
            yield "heads", f"{config.heads} does not divide hidden_size {site.hidden_size}"

    def __init__(self, config, site):
        super().__init__()
        self.heads, self.head_dim = config.heads, site.hidden_size // config.heads
        self.inputs = site.linear(site.hidden_size, 4 * site.hidden_size)
        self.norm = site.norm(self.head_dim)
        self.out = site.linear(site.hidden_size, site.hidden_size, writes_residual=True)
        self.register_buffer("decay_H", torch.empty(self.heads))

    def reset_parameters(self):
        self.decay_H.copy_(1 - 2.0 ** (-5 - torch.arange(self.heads, device=self.decay_H.device)))

    def new_state(self, batch, *, device=None, dtype=None):
        memory_BHKK = torch.zeros(batch, self.heads, self.head_dim, self.head_dim, device=device)
        return State(memory_BHKK=memory_BHKK, doc_B=torch.full((batch,), -1, device=device))

    def forward(self, x_BTD: Tensor, *, state=None, doc_ids=None):
        kind = x_BTD.device.type
        q, k, v, gate_BTD = self.inputs(x_BTD).chunk(4, dim=-1)
        q_BHTK, k_BHTK, v_BHTK = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2).float() for y in (q, k, v))
        with nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False):  # a sum of many: in fp32
            y_BHTK = self.retained(q_BHTK, k_BHTK / self.head_dim**0.5, v_BHTK, state, doc_ids)
        y_BTD = self.norm(y_BHTK.transpose(1, 2).to(x_BTD.dtype)).flatten(-2)
        return self.out(F.silu(gate_BTD) * y_BTD)

    def retained(self, q_BHTK, k_BHTK, v_BHTK, state, doc_ids):
        """What each token reads of its document so far; `state`, if any, has what came before and is updated."""
        time = q_BHTK.shape[2]
        step_T = torch.arange(time, device=q_BHTK.device)
        age_TS = step_T[:, None] - step_T
        log_H = self.decay_H.float().log()
        share_HTS = torch.exp(log_H[:, None, None] * age_TS.clamp(min=0)).masked_fill(age_TS < 0, 0)
        share_BHTS, begun_BT = share_HTS[None], None
        if doc_ids is not None:  # documents of a row by number; 0 is the one that the state stands in
            last_B1 = doc_ids[:, :1] if state is None else state["doc_B"][:, None]
            begun_BT = (doc_ids != torch.cat([last_B1, doc_ids[:, :-1]], 1)).cumsum(1)
            share_BHTS = share_BHTS * (begun_BT[:, None, :, None] == begun_BT[:, None, None, :])
        y_BHTK = ((q_BHTK @ k_BHTK.transpose(2, 3)) * share_BHTS) @ v_BHTK
        if state is None:
            return y_BHTK
        faded_BHT = torch.exp(log_H[:, None] * (step_T + 1))[None]
        if begun_BT is not None:
            faded_BHT = faded_BHT * (begun_BT == 0)[:, None]
        y_BHTK = y_BHTK + faded_BHT[..., None] * (q_BHTK @ state["memory_BHKK"])
        added_BHKK = (k_BHTK * share_BHTS[:, :, -1, :, None]).transpose(2, 3) @ v_BHTK
        state["memory_BHKK"].copy_((faded_BHT[:, :, -1, None, None] * state["memory_BHKK"] + added_BHKK).detach())
        if doc_ids is not None:
            state["doc_B"].copy_(doc_ids[:, -1])
        return y_BHTK
