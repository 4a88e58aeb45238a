"""The BitLinear of BitNet 2B4T against transformers' own, values and gradients, packed and compiled."""

import pytest
import torch
from torch import nn
from transformers.integrations.bitnet import AutoBitLinear

from tryplicity_plugins.layers.bitlinear import BitLinear
from tryplicity_plugins.layers.bitlinear_unnormed import UnnormedBitLinear


@pytest.fixture(autouse=True)
def eager(request):
    """transformers compiles its rounding."""
    with torch.compiler.set_stance("default" if "compiled" in request.node.name else "force_eager"):
        yield


def pair(bias=False):
    torch.manual_seed(0)
    theirs = AutoBitLinear(37, 22, bias=bias, online_quant=True)
    ours = UnnormedBitLinear(None, 37, 22, bias=bias)
    with torch.no_grad():
        ours.weight.copy_(theirs.weight.normal_(std=0.3))
        if bias:
            ours.bias.copy_(theirs.bias.normal_())
    return ours, theirs


@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients_are_transformers_own(bias):
    ours, theirs = pair(bias)
    x = torch.randn(3, 5, 37) * torch.tensor([0.01, 1.0, 30.0])[:, None, None]
    found, due = x.clone().requires_grad_(), x.clone().requires_grad_()
    weight = torch.randn(22)
    (ours(found) * weight).sum().backward()
    (theirs(due) * weight).sum().backward()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.grad, due.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-5, atol=1e-4)
    normed = BitLinear(None, 37, 22)
    normed.weight = nn.Parameter(ours.weight.detach().clone())
    assert not torch.allclose(normed(x), theirs(x), rtol=0.1)


@pytest.mark.parametrize("experts", [None, 3])
def test_packed_it_is_the_same(experts):
    torch.manual_seed(0)
    linear = UnnormedBitLinear(None, 37, 22, experts=experts)
    linear.weight = nn.Parameter(torch.randn_like(linear.weight))
    packed = UnnormedBitLinear(None, 37, 22, experts=experts)
    packed.adopt(linear.pack())
    x = torch.randn(9, 37) * torch.logspace(-1, 1, 9)[:, None]
    offsets = None if experts is None else torch.tensor([2, 2, 9], dtype=torch.int32)
    with torch.no_grad():
        torch.testing.assert_close(packed(x, offsets), linear(x, offsets), rtol=1e-4, atol=1e-4)
    assert packed.packed_nbytes() > 0 and torch.equal(packed.unpack(), packed.unpack())
    if experts:
        torch.testing.assert_close(packed.expert_weight(1), linear.effective_weight(linear.weight)[1])


def test_matrices_in_one_have_each_a_scale():
    torch.manual_seed(0)
    whole = UnnormedBitLinear(None, 37, 22, parts=(10, 4, 8))
    whole.weight = nn.Parameter(torch.randn(22, 37) * torch.tensor([1.0] * 10 + [9.0] * 4 + [0.1] * 8)[:, None])
    x = torch.randn(5, 37)
    single = [AutoBitLinear(37, part, bias=False, online_quant=True) for part in whole.parts]
    with torch.no_grad():
        for linear, weight in zip(single, whole.weight.split(whole.parts), strict=True):
            linear.weight.copy_(weight)
        due = torch.cat([linear(x) for linear in single], -1)
        torch.testing.assert_close(whole(x), due, rtol=1e-5, atol=1e-5)
        assert torch.equal(whole.eval()(x), whole.train()(x))  # what decoding keeps
        packed = UnnormedBitLinear(None, 37, 22, parts=whole.parts)
        packed.adopt(whole.pack())
        torch.testing.assert_close(packed(x), due, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(packed.unpack(), whole.effective_weight(whole.weight))


def test_compiled_it_is_the_same():
    ours, _ = pair(True)
    x = torch.randn(4, 37)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    grads = []
    for module in (compiled, ours):
        given = x.clone().requires_grad_()
        y = module(given)
        y.sum().backward()
        grads.append((y.detach(), given.grad, ours.weight.grad.clone()))
        ours.weight.grad = None
    torch.testing.assert_close(*grads)
