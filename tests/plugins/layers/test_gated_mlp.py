"""The gated MLP against its formula."""

import pytest
import torch
from layer_tools import assemble, assert_same, gradients, part, site
from torch import nn

from tryplicity import Activation, Mean, Report
from tryplicity_plugins.layers.activations import ReLU2, SiLU
from tryplicity_plugins.layers.gated_mlp import GatedMLP


class Telling(Activation):
    """An activation with a parameter, a loss and a statistic."""

    name = "telling_for_test"

    def __init__(self, config, features, groups=None):
        super().__init__()
        self.bend = nn.Parameter(torch.empty(features))

    def reset_parameters(self):
        nn.init.ones_(self.bend)

    def forward(self, x, group=None):
        return x * self.bend, Report({"size": x.mean()}, {"rate": Mean(x.detach().sum(), x.numel())})


def build(activation=SiLU, inner=24, **options):
    return GatedMLP(GatedMLP.Config(inner_size=inner, activation=part(activation)), site(**options))


@pytest.mark.parametrize("activation", [SiLU, ReLU2])
def test_values_and_gradients(activation):
    mlp = assemble(lambda: build(activation), spread=0.3)
    x = torch.randn(2, 3, 32, requires_grad=True)
    gate, up = mlp.gate_up.weight.chunk(2)
    inner = x @ gate.T
    inner = inner * inner.sigmoid() if activation is SiLU else inner.clamp(min=0) ** 2
    expected, (actual, report) = (inner * (x @ up.T)) @ mlp.down.weight.T, mlp(x)
    wanted = [x, *mlp.parameters()]
    assert_same([actual], [expected], 1e-5)
    assert_same(gradients(actual, wanted), gradients(expected, wanted), 1e-5)
    assert not report.losses and not report.stats
    assert mlp.new_state(2) is None


def test_what_the_activation_reports_is_passed_on():
    mlp = assemble(lambda: build(Telling))
    x = torch.randn(2, 3, 32)
    _, report = mlp(x)
    gate = mlp.gate_up(x)[..., :24]
    torch.testing.assert_close(report.losses["activation.size"], gate.mean())
    torch.testing.assert_close(report.stats["activation.rate"].value, gate.mean())


def test_inner_size_by_default():
    assert GatedMLP(GatedMLP.Config(activation=part(SiLU)), site(hidden=256)).down.in_features == 704
    assert GatedMLP(GatedMLP.Config(activation=part(SiLU)), site(hidden=24)).down.in_features == 64
