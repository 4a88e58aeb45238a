"""The feed-forward without a gate against its formula, and while decoding."""

import pytest
import torch
from layer_tools import assemble, assert_same, gradients, part, site

from tryplicity import UserError
from tryplicity_plugins.layers.activations import GELU, ReLU2, SiLU
from tryplicity_plugins.layers.bitlinear import BitLinear
from tryplicity_plugins.layers.mlp import MLP

FORMULAS = {ReLU2: lambda x: x.clamp(min=0) ** 2, SiLU: lambda x: x * x.sigmoid(),
            GELU: lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5))}


def build(activation=ReLU2, inner=24, bias=False, **options):
    return MLP(MLP.Config(inner_size=inner, activation=part(activation), bias=bias), site(**options))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", FORMULAS)
def test_values_and_gradients(activation, bias):
    mlp = assemble(lambda: build(activation, bias=bias), spread=0.3)
    x = torch.randn(2, 3, 32, requires_grad=True)
    first = x @ mlp.up.weight.T + (mlp.up.bias if bias else 0)
    expected = FORMULAS[activation](first) @ mlp.down.weight.T + (mlp.down.bias if bias else 0)
    actual, report = mlp(x)
    wanted = [x, *mlp.parameters()]
    assert_same([actual], [expected], 1e-5)
    assert_same(gradients(actual, wanted), gradients(expected, wanted), 1e-5)
    assert not report.losses and not report.stats and mlp.new_state(2) is None


@pytest.mark.parametrize("activation", FORMULAS)
@torch.no_grad()
def test_a_packed_one_gives_a_token_the_same_bits_in_any_company(activation):
    mlp = assemble(lambda: build(activation, inner=37, linear=BitLinear), spread=0.3).eval()
    x = torch.randn(1, 50, 32)
    expected = mlp(x)
    for linear in (mlp.up, mlp.down):
        linear.adopt(linear.pack())
    whole = mlp(x)
    error = (whole - expected).abs() / expected.abs().max()
    assert error.max() < 2e-2 and (error > 1e-5).float().mean() < 0.3  # a few numbers fall to the next of 127 steps
    assert torch.equal(torch.cat([mlp(row) for row in x.split(1, dim=1)], 1), whole)


def test_inner_size_by_default():
    assert MLP(MLP.Config(activation=part(ReLU2)), site(hidden=24)).down.in_features == 96


def test_what_it_does_not_take(registry):
    with pytest.raises(UserError, match="inner_size: expected a whole number from 1"):
        registry.part("feed_forward", {"type": "mlp", "inner_size": 0})
    with pytest.raises(UserError, match="no activation is called 'relu'"):
        registry.part("feed_forward", {"type": "mlp", "activation": "relu"})
