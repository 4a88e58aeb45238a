"""Chunked cross-entropy against torch's own over whole logits."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tryplicity import IGNORE, chunked_cross_entropy

N, D, V = 21, 12, 37


def given(dtype=torch.float64, ignored="some"):
    torch.manual_seed(0)
    h_ND = torch.randn(N, D).mul(2).to(dtype).requires_grad_()
    weight_VD = torch.randn(V, D).to(dtype).requires_grad_()
    targets_N = torch.randint(V, (N,))
    if ignored != "none":
        targets_N[:] = torch.where((torch.arange(N) % 3 == 0) | (ignored == "all"), IGNORE, targets_N)
    return h_ND, weight_VD, targets_N


def whole(h_ND, weight_VD, targets_N):
    return F.cross_entropy(h_ND @ weight_VD.T, targets_N, ignore_index=IGNORE, reduction="sum")


@pytest.mark.parametrize("chunk", [1, 4, 7, 21, 1000])
@pytest.mark.parametrize("ignored", ["none", "some", "all"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_values_and_gradients(dtype, tolerance, ignored, chunk):
    h_ND, weight_VD, targets_N = given(dtype, ignored)
    actual = chunked_cross_entropy(h_ND, weight_VD, targets_N, chunk=chunk)
    expected = whole(h_ND, weight_VD, targets_N)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=0)
    # a factor other than one: what accumulation and the weights of objectives multiply by
    for a, e in zip(torch.autograd.grad(actual * 0.3, [h_ND, weight_VD]),
                    torch.autograd.grad(expected * 0.3, [h_ND, weight_VD]), strict=True):
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance)
    with torch.no_grad():
        torch.testing.assert_close(chunked_cross_entropy(h_ND, weight_VD, targets_N, chunk=chunk), actual)


def test_gradient_by_finite_differences():
    h_ND, weight_VD, _ = given()
    sides = tuple(t[:4].detach().requires_grad_() for t in (h_ND, weight_VD))
    targets_N = torch.tensor([1, IGNORE, 3, 0])
    assert torch.autograd.gradcheck(lambda h, w: chunked_cross_entropy(h, w, targets_N, chunk=3), sides)


def test_only_one_side_needs_a_gradient():
    h_ND, weight_VD, targets_N = given()
    expected = torch.autograd.grad(whole(h_ND, weight_VD, targets_N), [h_ND, weight_VD])
    for i, sides in enumerate(([h_ND, weight_VD.detach()], [h_ND.detach(), weight_VD])):
        actual, = torch.autograd.grad(chunked_cross_entropy(*sides, targets_N, chunk=8), [sides[i]])
        torch.testing.assert_close(actual, expected[i])


def test_what_stands_at_ignored_positions_does_not_matter():
    h_ND, weight_VD, targets_N = given()
    spoiled_ND = h_ND.detach().clone()
    spoiled_ND[::3] = torch.nan
    spoiled_ND.requires_grad_()
    clean, spoiled = (chunked_cross_entropy(h, weight_VD, targets_N, chunk=8) for h in (h_ND, spoiled_ND))
    torch.testing.assert_close(spoiled, clean)
    for s, c in zip(torch.autograd.grad(spoiled, [spoiled_ND, weight_VD]),
                    torch.autograd.grad(clean, [h_ND, weight_VD]), strict=True):
        torch.testing.assert_close(s, c)


def test_logits_too_large_for_exp():
    h_ND, weight_VD, targets_N = given(torch.float32)
    actual = chunked_cross_entropy(h_ND * 1e3, weight_VD, targets_N, chunk=8)
    torch.testing.assert_close(actual, whole(h_ND * 1e3, weight_VD, targets_N))


@pytest.mark.parametrize("how", ["bf16 autocast", "bf16 model"])
def test_half_precision(how):
    """Logits are rounded to bf16 once; the softmax, the sum and the weight's gradient are not."""
    h_ND, weight_VD, targets_N = given(torch.float32)
    if how == "bf16 model":
        h_ND, weight_VD = (t.detach().bfloat16().requires_grad_() for t in (h_ND, weight_VD))
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "bf16 autocast"):
        actual = chunked_cross_entropy(h_ND, weight_VD, targets_N, chunk=8)
        logits_NV = h_ND @ weight_VD.T
    assert logits_NV.dtype == torch.bfloat16
    assert actual.dtype == torch.float32
    expected = F.cross_entropy(logits_NV.float(), targets_N, ignore_index=IGNORE, reduction="sum")
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)
    for a, e in zip(torch.autograd.grad(actual, [h_ND, weight_VD]),
                    torch.autograd.grad(expected, [h_ND, weight_VD]), strict=True):
        assert a.dtype == e.dtype
        torch.testing.assert_close(a, e, rtol=2e-2, atol=2e-2 * e.abs().max().item())


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements any operation's output had."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_logits_never_exist_whole():
    h_ND, weight_VD = torch.randn(256, 4, requires_grad=True), torch.randn(64, 4, requires_grad=True)
    targets_N = torch.randint(64, (256,))
    with LargestTensor() as largest:
        chunked_cross_entropy(h_ND, weight_VD, targets_N, chunk=32).backward()
    assert largest.elements == 32 * 64
    with LargestTensor() as largest:
        whole(h_ND, weight_VD, targets_N).backward()
    assert largest.elements == 256 * 64


def test_on_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16):
        h_ND, weight_VD = torch.randn(9, 4, requires_grad=True), torch.randn(8, 4, requires_grad=True)
        chunked_cross_entropy(h_ND, weight_VD, torch.zeros(9, dtype=torch.long), chunk=4).backward()
        assert h_ND.grad.shape == (9, 4) and weight_VD.grad.dtype == torch.float32
