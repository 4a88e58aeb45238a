"""Rounding that fades in: what multiplies lies between the plain and the ternary linear, by formula, and ends there."""

import pytest
import torch
from layer_tools import as_a_compiler_sees_them, assemble, assert_same, gradients, runs_everywhere
from torch._dynamo import lookup_backend
from torch.nn import functional as F

from tryplicity_plugins.layers.bitlinear import BitLinear
from tryplicity_plugins.layers.bitlinear_unnormed import UnnormedBitLinear

both = pytest.mark.parametrize("kind", [BitLinear, UnnormedBitLinear])
STEPS = 10
ENDS = torch.tensor([3, 3, 8], dtype=torch.int32)


def make(kind, fade_steps=STEPS, **options):
    return assemble(lambda: kind(kind.Config(fade_steps=fade_steps), 24, 16, init_std=0.3, **options))


def faded_to(linear, share):
    linear.fade.fill_(share)
    return linear


def between(plain, rounded, share):
    return plain + share * (rounded - plain).detach()


def by_formula(kind, x, weight_OD, share):
    """The product with the straight-through trick written out; the norm of a BitLinear fades in with its gradient."""
    scale = weight_OD.abs().mean().detach()
    weight_OD = between(weight_OD, (weight_OD / scale).round().clamp(-1, 1) * scale, share)
    given = x if kind is UnnormedBitLinear else x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    step = given.detach().abs().amax(-1, keepdim=True) / 127
    rounded = given + ((given / step).round() * step - given).detach()
    return F.linear((1 - share) * x + share * rounded, weight_OD)


@both
@pytest.mark.parametrize("share", [0.0, 0.25, 0.75, 1.0])
def test_values_and_gradients(kind, share):
    linear = faded_to(make(kind), share).double()
    x = torch.randn(4, 7, 24, dtype=torch.float64, requires_grad=True)
    wanted = [x, linear.weight]
    expected = by_formula(kind, x, linear.weight, share)
    due = gradients(expected, wanted)
    assert_same([linear(x)], [expected], 1e-10)
    assert_same(gradients(linear(x), wanted), due, 1e-10)
    with as_a_compiler_sees_them():
        assert_same([linear(x)], [expected], 1e-10)
        assert_same(gradients(linear(x), wanted), due, 1e-10)


@both
def test_a_stack_of_experts(kind):
    linear = faded_to(make(kind, experts=3), 0.4)
    x = torch.randn(8, 24)
    groups = zip(x.tensor_split(ENDS[:-1].long()), linear.weight, strict=True)
    expected = torch.cat([by_formula(kind, own, weight, 0.4) for own, weight in groups])
    assert_same([linear(x, ENDS)], [expected], 1e-5)
    linear.eval()
    with torch.no_grad():
        assert_same([F.linear(linear.effective_input(x[3:]), linear.expert_weight(2))], [expected[3:]], 1e-5)


@both
def test_at_its_ends_it_is_the_plain_and_the_ternary_linear_to_the_bit(kind):
    linear, ternary = make(kind), make(kind, fade_steps=0)
    assert ternary.fade is None and linear.fade == 0
    ternary.weight = linear.weight
    x = torch.randn(5, 24)
    assert torch.equal(linear(x), F.linear(x, linear.weight)) and not linear.ready_to_pack()
    faded_to(linear, 1)
    assert torch.equal(linear(x), ternary(x)) and linear.ready_to_pack() and ternary.ready_to_pack()
    linear.eval()
    with torch.no_grad():
        assert torch.equal(linear(x), ternary(x))
        assert all(torch.equal(a, b) for a, b in zip(linear.pack().values(), ternary.pack().values(), strict=True))


@both
def test_it_follows_the_steps_and_never_goes_back(kind):
    linear, seen = make(kind), []
    for step in (*range(STEPS + 2), 0):
        linear.before_step(step)
        seen.append(round(linear.fade.item(), 6))
    assert seen == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1, 1, 1]
    make(kind, fade_steps=0).before_step(3)


@both
def test_it_runs_everywhere(kind):
    runs_everywhere(lambda: kind(kind.Config(fade_steps=3), 24, 16), lambda linear, x: linear(x),
                    torch.randn(2, 3, 24))


@both
def test_one_code_of_the_compiler_does_for_all_of_the_warmup(kind):
    """What compiled code depends on does not change from step to step; its gradients are eager PyTorch's, which torch
    2.11 loses in silence where a Function ends in what it changed in place."""
    linear, x, compilations = make(kind), torch.randn(4, 24, requires_grad=True), []

    def counting(graph, inputs):
        compilations.append(graph)
        return lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    fast = torch.compile(linear, backend=counting, fullgraph=True)
    for step in range(STEPS + 3):
        linear.before_step(step)
        found, due = ((y, *torch.autograd.grad(y.square().sum(), [x, *linear.parameters()]))
                      for y in (fast(x), linear(x)))
        assert all(gradient.norm() > 0 for gradient in due)
        torch.testing.assert_close(found, due)
    assert len(compilations) == 1
