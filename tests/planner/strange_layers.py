"""A stranger's plugin: mixers of operations that none of the project's own layers uses.

Shapes: B batch, T time, D hidden. Packed documents are not kept apart: these layers are there to be planned.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from tryplicity import Mixer, hookimpl


class _Strange(Mixer):
    def __init__(self, config, site):
        super().__init__()
        self.config, self.hidden = config, site.hidden_size
        self.make(site.hidden_size, site.context_length)

    def forward(self, x_BTD, *, state=None, doc_ids=None):
        return self.mix(x_BTD)


class _Parameters(_Strange):
    def reset_parameters(self):
        for parameter in self.parameters(recurse=False):
            nn.init.normal_(parameter, std=0.02)


class LongConvolution(_Parameters):
    """Each channel is convolved with a filter as long as the sequence, by FFT."""

    name = "long_convolution"

    def make(self, D, T):
        self.filter_DT = nn.Parameter(torch.empty(D, T))

    def mix(self, x_BTD):
        T = x_BTD.shape[1]
        x_BDF = torch.fft.rfft(x_BTD.transpose(1, 2), n=2 * T)
        return torch.fft.irfft(x_BDF * torch.fft.rfft(self.filter_DT, n=2 * T), n=2 * T)[..., :T].transpose(1, 2)


class LinearRecurrence(_Parameters):
    """The linear recurrent unit: a complex state that decays and turns, computed by doubling (arXiv:2303.06349)."""

    name = "lru"

    def make(self, D, T):
        self.decay_D, self.turn_D = nn.Parameter(torch.empty(D)), nn.Parameter(torch.empty(D))

    def mix(self, x_BTD):
        h_BTD, step = x_BTD.to(torch.complex64), 1
        rate_D = torch.polar(self.decay_D.sigmoid(), self.turn_D)
        while step < x_BTD.shape[1]:
            h_BTD = torch.cat([h_BTD[:, :step], h_BTD[:, step:] + rate_D ** step * h_BTD[:, :-step]], 1)
            step *= 2
        return torch.view_as_real(h_BTD).sum(-1)


class Recurrent(_Strange):
    """torch's own recurrent layers."""

    name = "recurrent"

    @dataclass(frozen=True)
    class Config:
        kind: Literal["GRU", "RNN", "LSTM"] = "GRU"
        """the layer of torch.nn"""
        batch_first: bool = True
        """the batch is the first dimension, not the second"""

    def make(self, D, T):
        self.layer = getattr(nn, self.config.kind)(D, D, batch_first=self.config.batch_first)

    def mix(self, x_BTD):
        if self.config.batch_first:
            return self.layer(x_BTD)[0]
        return self.layer(x_BTD.transpose(0, 1))[0].transpose(0, 1)


class Convolutions(_Strange):
    """A gated depthwise convolution and a batch norm, which writes into its own buffers."""

    name = "convolutions"

    def make(self, D, T):
        self.wide, self.deep = nn.Conv1d(D, 2 * D, 1), nn.Conv1d(D, D, 5, padding=4, groups=D)
        self.norm = nn.BatchNorm1d(D)

    def mix(self, x_BTD):
        x_BDT, gate_BDT = self.wide(x_BTD.transpose(1, 2)).chunk(2, 1)
        return (self.norm(self.deep(x_BDT)[..., :x_BTD.shape[1]]) * gate_BDT.sigmoid()).transpose(1, 2)


class WrittenOut(_Parameters):
    """Attention without a fused kernel, with dropout; shapes changed in place."""

    name = "written_out"

    def make(self, D, T):
        self.qkv_D = nn.Parameter(torch.empty(3, D))

    def mix(self, x_BTD):
        q_BTD, k_BTD, v_BTD = (x_BTD * scale_D for scale_D in self.qkv_D)
        scores_BTT = torch.baddbmm(x_BTD.new_zeros(1, 1, 1), q_BTD, k_BTD.mT).tril_()
        weights_BTT = F.dropout(scores_BTT.softmax(-1), 0.1, self.training)
        out_BDT = torch.einsum("bts,bsd->bdt", weights_BTT, v_BTD)
        return out_BDT.contiguous().transpose_(1, 2)


@hookimpl
def tryplicity_layers():
    return [LongConvolution, LinearRecurrence, Recurrent, Convolutions, WrittenOut]
