"""Activations against their formulas."""

import math

import pytest
import torch
from layer_tools import part

from tryplicity_plugins.layers.activations import GELU, ReLU2, SiLU


def gelu(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def relu2(x):
    return torch.where(x > 0, x * x, torch.zeros_like(x))


def silu(x):
    return x / (1 + torch.exp(-x))


@pytest.mark.parametrize("cls, formula", [(SiLU, silu), (GELU, gelu), (ReLU2, relu2)])
def test_values_and_gradients(cls, formula):
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    for groups, group in ((None, None), (3, torch.tensor([0, 1, 2, 3]))):
        y = part(cls).build(6, groups=groups)(x, group)
        torch.testing.assert_close(y, formula(x))
        torch.testing.assert_close(torch.autograd.grad(y.sum(), x), torch.autograd.grad(formula(x).sum(), x))
