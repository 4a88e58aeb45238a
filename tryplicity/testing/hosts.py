"""The plainest layers, in which parts of a layer are tried: what is wrong in them is then the part's own.

Shapes: B batch, T time, D hidden, N tokens (B*T), E experts, K chosen experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tryplicity.components import FeedForward, Mixer, Report, output_and_report
from tryplicity.parts import Part, uses
from tryplicity.promises import check_routing

OWNER = "the conformance kit"


class PlainMixer(Mixer):
    """A linear map of each token alone."""

    name = "conformance_mixer"

    def __init__(self, config, site) -> None:
        super().__init__()
        self.out = site.linear(site.hidden_size, site.hidden_size)

    def forward(self, x_BTD: Tensor, *, state=None, doc_ids=None) -> Tensor:
        return self.out(x_BTD)


class PlainFeedForward(FeedForward):
    """norm, linear, tanh, linear: the spec's own norm and linear at work."""

    name = "conformance_feed_forward"

    def __init__(self, config, site) -> None:
        super().__init__()
        self.norm = site.norm(site.hidden_size)
        self.up = site.linear(site.hidden_size, 2 * site.hidden_size)
        self.down = site.linear(2 * site.hidden_size, site.hidden_size, writes_residual=True)

    def forward(self, x_BTD: Tensor, *, state=None, doc_ids=None) -> Tensor:
        return self.down(torch.tanh(self.up(self.norm(x_BTD))))


class Activated(FeedForward):
    """linear, the activation, linear."""

    name = "conformance_activated"

    @dataclass(frozen=True)
    class Config:
        activation: Part = uses("activation")

    def __init__(self, config, site) -> None:
        super().__init__()
        self.up = site.linear(site.hidden_size, 2 * site.hidden_size)
        self.activation = config.activation.build(2 * site.hidden_size)
        self.down = site.linear(2 * site.hidden_size, site.hidden_size)

    def forward(self, x_BTD: Tensor, *, state=None, doc_ids=None):
        y_BTF, said = output_and_report(self.activation(self.up(x_BTD)))
        report = Report()
        report.include("activation", said)
        return self.down(y_BTF), report


class Routed(FeedForward):
    """A vector for each expert, the chosen ones multiplied with the token and summed."""

    name = "conformance_routed"
    EXPERTS, TOP_K = 4, 2

    @dataclass(frozen=True)
    class Config:
        router: Part = uses("router")

    def __init__(self, config, site) -> None:
        super().__init__()
        self.router = config.router.build(site, self.EXPERTS, self.TOP_K)
        self.expert_ED = nn.Parameter(torch.empty(self.EXPERTS, site.hidden_size))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.expert_ED)

    def forward(self, x_BTD: Tensor, *, state=None, doc_ids=None):
        routing = self.router(x_BTD)
        check_routing(self.router, routing, x_BTD.shape[0] * x_BTD.shape[1], self.EXPERTS)
        table_ED = F.pad(self.expert_ED, (0, 0, 0, 1))  # the one behind the last stands for none
        factor_ND = (table_ED[routing.experts_NK] * routing.weights_NK[..., None]).sum(1)
        report = Report()
        report.include("router", routing.report)
        return x_BTD * factor_ND.view_as(x_BTD).to(x_BTD.dtype), report


class Joined(FeedForward):
    """A linear map, joined to the stream(s) by the residual."""

    name = "conformance_joined"

    @dataclass(frozen=True)
    class Config:
        residual: Part = uses("residual")

    def __init__(self, config, site) -> None:
        super().__init__()
        self.residual = config.residual.build(site)
        self.out = site.linear(site.hidden_size, site.hidden_size)

    def forward(self, x_BTD: Tensor, *, state=None, doc_ids=None):
        streams, said = self.residual(self.residual.expand(x_BTD), lambda own_BTD: (self.out(own_BTD), Report()))
        report = Report()
        report.include("residual", said)
        return self.residual.reduce(streams), report


HOSTS = (PlainMixer, PlainFeedForward, Activated, Routed, Joined)
