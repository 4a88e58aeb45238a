"""Norms against their formulas in fp64."""

import pytest
import torch
from layer_tools import assemble, assert_same, gradients, part, threads, without_native

from tryplicity_plugins.layers.norms import LayerNorm, RMSNorm


def rms(x, norm):
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight


def centred(x, norm):
    x = x - x.mean(-1, keepdim=True)
    bias = 0 if norm.bias is None else norm.bias
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + bias


CASES = [(part(RMSNorm), rms), (part(RMSNorm, eps=0.1), rms), (part(LayerNorm), centred),
         (part(LayerNorm, bias=True, eps=0.1), centred)]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("norm_part, formula", CASES)
def test_values_and_gradients(norm_part, formula, dtype, tolerance):
    norm = assemble(lambda: norm_part.build(12), spread=0.3, dtype=dtype)
    x = torch.randn(3, 5, 12, dtype=dtype).mul(3).requires_grad_()
    wanted = [x, *norm.parameters()]
    actual, expected = norm(x), formula(x, norm)
    assert_same([actual], [expected], tolerance)
    assert_same(gradients(actual, wanted), gradients(expected, wanted), tolerance)
    with torch.no_grad():
        assert_same([norm(x)], [expected], tolerance)


@pytest.mark.parametrize("norm_part", [case[0] for case in CASES])
def test_zeros_stay_zeros_and_dtypes_stay(norm_part):
    norm = assemble(lambda: norm_part.build(8))
    assert torch.equal(norm(torch.zeros(2, 8)), torch.zeros(2, 8))
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            x = torch.randn(2, 8, dtype=torch.bfloat16)
            assert norm(x).dtype == torch.bfloat16
            torch.testing.assert_close(norm(x).float(), norm(x.float()), rtol=2e-2, atol=2e-2)


def test_a_strided_input():
    norm = assemble(lambda: part(RMSNorm).build(8), spread=0.3)
    x = torch.randn(2, 3, 4, 8)
    y, dense = x[:, :, 1].requires_grad_(), x[:, :, 1].clone().requires_grad_()
    assert_same(gradients(norm(y), [y, norm.weight]), gradients(norm(dense), [dense, norm.weight]), 1e-6)


def test_the_gradient_is_fp32_inside_autocast():
    norm = assemble(lambda: part(RMSNorm).build(64), spread=0.3)
    x = torch.randn(50, 64, requires_grad=True)
    expected = gradients(norm(x), [x, norm.weight])
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(gradients(norm(x), [x, norm.weight]), expected, 1e-6)


@pytest.mark.parametrize("size", [1, 7, 8, 33, 300])
def test_native_rms_norm(size):
    """The C++ of decoding beside the formula in fp64; a row's bits are the same in any company."""
    norm = assemble(lambda: part(RMSNorm).build(size), spread=0.3)
    x = torch.cat([torch.randn(1000, size), 1e4 * torch.randn(1, size), 1e-4 * torch.randn(1, size)])
    with torch.no_grad():
        y = norm(x)
        with without_native():
            plain = norm(x)
        assert_same(list(y.double()), list(rms(x.double(), norm)), 1e-6)
        assert_same(list(y), list(plain), 2e-6)
        assert size < 33 or not torch.equal(y, plain), "C++ did not run"
        assert torch.equal(torch.cat([norm(row) for row in x.split(1)]), y)
        assert torch.equal(norm(x.view(2, 501, size)).view(x.shape), y)
        for count in (1, 3):
            with threads(count):
                assert torch.equal(norm(x), y)
        assert norm(x[:0]).shape == (0, size)
