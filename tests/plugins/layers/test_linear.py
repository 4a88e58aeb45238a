"""The plain linear: dense, stacked and single-expert products agree with products written out."""

import pytest
import torch
from layer_tools import assemble, assert_same, gradients, part

from tryplicity_plugins.layers.linear import PlainLinear

ENDS = [3, 3, 8]  # the second expert has no rows


def stacked(x, weight):
    return torch.cat([x[start:end] @ w.T for w, start, end in zip(weight, [0, *ENDS], ENDS, strict=False)])


@pytest.mark.parametrize("bias", [False, True])
def test_dense(bias):
    linear = assemble(lambda: part(PlainLinear).build(8, 12, bias=bias), spread=0.5)
    x = torch.randn(2, 3, 8, requires_grad=True)
    expected = x @ linear.weight.T + (linear.bias if bias else 0)
    assert_same([linear(x)], [expected], 1e-6)
    wanted = [x, *linear.parameters()]
    assert_same(gradients(linear(x), wanted), gradients(expected, wanted), 1e-5)


def test_stack_and_single_expert():
    linear = assemble(lambda: part(PlainLinear).build(8, 12, experts=3, active_experts=1), spread=0.5)
    assert linear.active_fraction == pytest.approx(1 / 3)
    x = torch.randn(8, 8, requires_grad=True)
    actual, expected = linear(x, torch.tensor(ENDS, dtype=torch.int32)), stacked(x, linear.weight)
    assert_same([actual], [expected], 1e-5)
    assert_same(gradients(actual, [x, linear.weight]), gradients(expected, [x, linear.weight]), 1e-5)
    assert_same([linear.effective_input(x[3:]) @ linear.expert_weight(2).T], [expected[3:]], 1e-6)


def test_initialisation_follows_init_std():
    linear = assemble(lambda: part(PlainLinear).build(64, 256, init_std=0.005))
    assert linear.weight.std().item() == pytest.approx(0.005, rel=0.05)
