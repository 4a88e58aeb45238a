"""BitLinear against BitNet's formulas written plainly with the straight-through trick."""

import copy
import pickle

import pytest
import torch
from layer_tools import assemble, assert_same, gradients, part

from tryplicity_plugins.layers import bitlinear
from tryplicity_plugins.layers.bitlinear import BitLinear

ENDS = torch.tensor([3, 3, 8], dtype=torch.int32)


def through(x, rounded):
    """The value of `rounded` (nearly: a sum rounds too), the gradient of x."""
    return x + (rounded - x).detach()


def weight_by_formula(weight):
    scale = weight.abs().mean().clamp(min=1e-5).detach()
    return through(weight, (weight / scale).round().clamp(-1, 1) * scale)


def input_by_formula(x):
    x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    scale = 127 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
    return through(x, (x * scale).round().clamp(-128, 127) / scale)


def dense(**options):
    return assemble(lambda: part(BitLinear).build(24, 16, init_std=0.3, **options))


def stack():
    linear = dense(experts=3)
    with torch.no_grad():
        linear.weight.mul_(torch.tensor([1.0, 5.0, 0.2])[:, None, None])
    return linear


def exactly_ternary(weight):
    """Every entry is one of -scale, 0 and scale; which scale."""
    scale = weight.max()
    assert torch.equal(weight.unique(), torch.stack([-scale, 0 * scale, scale]))
    return scale


def test_weights_are_ternary_with_one_scale_a_matrix():
    for linear in (dense(), stack()):
        effective = linear.effective_weight(linear.weight)
        for w, e in zip(linear.weight.view(-1, 16, 24), effective.view(-1, 16, 24), strict=True):
            torch.testing.assert_close(exactly_ternary(e), w.abs().mean())
            torch.testing.assert_close(e, weight_by_formula(w))


def test_inputs_are_on_the_int8_grid_of_each_token():
    x = torch.randn(4, 7, 24) * torch.logspace(-3, 3, 7)[:, None]
    y = dense().effective_input(x)
    normal = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    digits = y * 127 / normal.abs().amax(-1, keepdim=True)
    torch.testing.assert_close(digits, digits.round(), rtol=0, atol=1e-4)
    assert torch.equal(digits.round().abs().amax(-1), torch.full((4, 7), 127.0))
    torch.testing.assert_close(y, normal, rtol=0, atol=normal.abs().max().item() / 254 * 1.001)
    assert torch.equal(dense().effective_input(torch.zeros(2, 24)), torch.zeros(2, 24))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_dense_values_and_gradients(dtype, tolerance):
    linear = dense(bias=True).to(dtype)
    x = torch.randn(2, 5, 24, dtype=dtype, requires_grad=True)
    actual = linear(x)
    expected = input_by_formula(x) @ weight_by_formula(linear.weight).T + linear.bias
    wanted = [x, *linear.parameters()]
    assert_same([actual], [expected], tolerance)
    assert_same(gradients(actual, wanted), gradients(expected, wanted), tolerance)


def test_stacked_values_and_gradients():
    linear = stack()
    x = torch.randn(8, 24, requires_grad=True)
    actual = linear(x, ENDS)
    y, w = input_by_formula(x), [weight_by_formula(w) for w in linear.weight.unbind()]
    expected = torch.cat([y[:3] @ w[0].T, y[3:] @ w[2].T])
    assert_same([actual], [expected], 1e-5)
    assert_same(gradients(actual, [x, linear.weight]), gradients(expected, [x, linear.weight]), 1e-5)
    for mode in (True, False):
        linear.train(mode)
        with torch.no_grad():
            assert_same([linear.effective_input(x[3:]) @ linear.expert_weight(2).T], [expected[3:]], 1e-5)
            assert_same([linear(x, ENDS)], [expected], 1e-5)
    assert_same([linear.effective_input(x[3:]) @ linear.expert_weight(2).T], [expected[3:]], 1e-5)


@pytest.mark.parametrize("how", ["autocast", "bf16"])
def test_bf16_meets_in_one_dtype(how):
    linear = dense().to(torch.bfloat16 if how == "bf16" else torch.float32)
    x = torch.randn(5, 24, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        assert linear.effective_input(x).dtype == torch.bfloat16
        assert linear.effective_weight(linear.weight).dtype == linear.weight.dtype
        y = linear(x)
    assert y.dtype == torch.bfloat16
    exactly_ternary(linear.effective_weight(linear.weight))
    expected = input_by_formula(x.float()) @ weight_by_formula(linear.weight.float()).T
    torch.testing.assert_close(y.float(), expected, rtol=2e-2, atol=2e-2 * expected.abs().max().item())


@pytest.fixture
def computations(monkeypatch):
    """How often ternary weights were computed."""
    calls = []
    compute = bitlinear.ternary_weight
    monkeypatch.setattr(bitlinear, "ternary_weight", lambda w: calls.append(1) or compute(w))
    return calls


def fresh(linear, x):
    """What a new module with these weights answers."""
    other = part(BitLinear).build(24, 16)
    other.weight.data = linear.weight.detach().clone()
    return other(x)


@torch.no_grad()
def test_decoding_computes_the_ternary_weights_once(computations):
    linear, x = dense().eval(), torch.randn(1, 1, 24)
    first = linear(x)
    assert torch.equal(linear(x), first) and torch.equal(linear(x), first)
    assert len(computations) == 1
    linear(torch.randn(100, 24))  # many tokens: nothing worth keeping a copy for
    assert len(computations) == 2
    linear.train()
    assert linear._kept is None
    linear(x)
    assert linear._kept is None


@pytest.mark.parametrize("change", ["optimizer", "load", "assign", "replace", "in place", "dtype"])
def test_changed_weights_are_noticed(change):
    linear, x = dense().eval(), torch.randn(1, 24)
    with torch.no_grad():
        before = linear(x)
    other = {"weight": torch.randn(16, 24)}
    if change == "optimizer":
        linear(x).square().sum().backward()
        torch.optim.AdamW(linear.parameters(), lr=1.0).step()
    elif change in ("load", "assign"):
        linear.load_state_dict(other, assign=change == "assign")
    elif change == "replace":
        version = linear.weight._version
        linear.weight = torch.nn.Parameter(other["weight"])
        with torch.no_grad():
            while linear.weight._version < version:  # so that only its being another one tells
                linear.weight.add_(0)
        assert linear.weight._version == version
    elif change == "in place":
        with torch.no_grad():
            linear.weight.mul_(-1)
    else:
        linear.double()
        x = x.double()
    with torch.no_grad():
        assert torch.equal(linear(x), fresh(linear, x))
        assert change == "dtype" or not torch.equal(linear(x), before)


@torch.no_grad()
def test_copies_keep_nothing():
    linear, x = dense().eval(), torch.randn(1, 24)
    expected = linear(x)
    for other in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))):
        assert other._kept is None and linear._kept is not None
        assert torch.equal(other(x), expected)


def test_inference_mode():
    linear, x = dense().eval(), torch.randn(1, 24)
    with torch.inference_mode():
        first, again = linear(x), linear(x)
        made_here = dense().eval()
        assert torch.equal(made_here(x), fresh(made_here, x))
    assert torch.equal(first, again) and torch.equal(first, linear(x))
    linear(x).sum().backward()
    assert linear.weight.grad.abs().sum() > 0


def test_packed_is_unpacked(registry):
    """Dense, stacked and single experts: the same products, whatever the number of rows, with and without a bias."""
    from tryplicity_plugins.layers.bitlinear import BitLinear

    generator = torch.Generator().manual_seed(0)
    for experts, bias in ((None, True), (3, False)):
        linear = BitLinear(None, 37, 22, experts=experts, bias=bias)
        with torch.no_grad():
            for parameter in linear.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        packed = BitLinear(None, 37, 22, experts=experts, bias=bias)
        packed.load_state_dict(linear.state_dict())
        packed.adopt(packed.pack())
        x = torch.randn(12, 37, generator=generator)
        offsets_E = None if experts is None else torch.tensor([4, 4, 9], dtype=torch.int32)
        used = 12 if experts is None else 9  # later rows belong to no expert
        with torch.no_grad():
            torch.testing.assert_close(packed.eval()(x, offsets_E)[:used], linear.eval()(x, offsets_E)[:used],
                                       rtol=1e-4, atol=1e-4)
            if experts:
                torch.testing.assert_close(packed.expert_weight(2), linear.expert_weight(2))
