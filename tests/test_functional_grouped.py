"""The grouped product against one plain product per group: values, gradients, shapes without data, FLOPs."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from tryplicity import functional
from tryplicity.functional import grouped_linear


def plain(x_SI, weight_EOI, ends):
    out_SO, start = x_SI.new_zeros(len(x_SI), weight_EOI.shape[1]), 0
    rows = torch.arange(len(x_SI))
    for weight_OI, end in zip(weight_EOI, ends, strict=True):
        inside_S1 = ((rows >= start) & (rows < end))[:, None]
        out_SO = out_SO + (x_SI.where(inside_S1, torch.zeros_like(x_SI)) @ weight_OI.T)
        start = end
    return out_SO


# aligned sizes take torch's grouped product, the others the loop; groups empty at the start, middle and end
@pytest.mark.parametrize("ends", [[8, 24, 32], [0, 0, 40], [5, 5, 31], [40, 40, 40], [0, 0, 0], [3, 17, 17]])
@pytest.mark.parametrize("sizes", [(32, 48), (30, 50)])
def test_equals_one_product_per_group(ends, sizes):
    torch.manual_seed(0)
    x = torch.randn(40, sizes[0], requires_grad=True)
    weight = torch.randn(3, sizes[1], sizes[0], requires_grad=True)
    weigh = torch.randn(40, sizes[1])
    got = grouped_linear(x, weight, torch.tensor(ends, dtype=torch.int32))
    wanted = plain(x, weight, ends)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    for a, b in zip(torch.autograd.grad((got * weigh).sum(), (x, weight)),
                    torch.autograd.grad((wanted * weigh).sum(), (x, weight)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_the_loop_is_used_where_there_is_no_grouped_product(monkeypatch):
    torch.manual_seed(0)
    x, weight = torch.randn(32, 16, requires_grad=True), torch.randn(3, 16, 16, requires_grad=True)
    ends = torch.tensor([8, 8, 24], dtype=torch.int32)
    first = grouped_linear(x, weight, ends)
    first_grads = torch.autograd.grad(first.square().sum(), (x, weight))

    def absent(*args, **kwargs):
        raise AssertionError("the grouped product was called")

    monkeypatch.setattr(functional, "grouped_product_works", lambda *args: False)
    monkeypatch.setattr(functional.F, "grouped_mm", absent)
    second = grouped_linear(x, weight, ends)
    second_grads = torch.autograd.grad(second.square().sum(), (x, weight))
    for a, b in zip((first, *first_grads), (second, *second_grads), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", [(32, 48), (30, 50)])
def test_rows_after_the_last_group_are_zero_whatever_they_hold(sizes):
    x = torch.randn(40, sizes[0])
    x[24:] = torch.nan
    x.requires_grad_()
    weight = torch.randn(2, sizes[1], sizes[0], requires_grad=True)
    out = grouped_linear(x, weight, torch.tensor([8, 24], dtype=torch.int32))
    assert torch.equal(out[24:], torch.zeros(16, sizes[1]))
    gradient = torch.randn(40, sizes[1])
    gradient[24:] = torch.nan
    grad_x, grad_w = torch.autograd.grad(out, (x, weight), gradient)
    assert torch.equal(grad_x[24:], torch.zeros(16, sizes[0]))
    assert grad_x.isfinite().all() and grad_w.isfinite().all()


def test_without_data_in_fp32_and_counted_in_flops():
    functional.count_grouped_flops()
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        x, weight = torch.randn(40, 32, requires_grad=True), torch.randn(4, 48, 32, requires_grad=True)
        grouped_linear(x, weight, torch.zeros(4, dtype=torch.int32)).sum().backward()
    assert x.grad.shape == (40, 32) and weight.grad.shape == (4, 48, 32)
    assert counter.get_total_flops() == 3 * 2 * 40 * 32 * 48
    on_meta = grouped_linear(torch.empty(40, 32, device="meta"), torch.empty(4, 48, 32, device="meta"),
                             torch.empty(4, dtype=torch.int32, device="meta"))
    assert on_meta.shape == (40, 48)


def test_autocast_casts_both_sides():
    x, weight = torch.randn(16, 16), torch.randn(2, 16, 16, requires_grad=True)
    ends = torch.tensor([8, 16], dtype=torch.int32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = grouped_linear(x, weight, ends)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert weight.grad.dtype == torch.float32
    torch.testing.assert_close(out.float(), plain(x, weight.detach(), [8, 16]), rtol=3e-2, atol=6e-2)


@pytest.mark.parametrize("sizes", [(32, 48), (30, 50)])
def test_operators_keep_torchs_rules(sizes):
    x, weight = torch.randn(40, sizes[0], requires_grad=True), torch.randn(3, sizes[1], sizes[0], requires_grad=True)
    ends = torch.tensor([8, 24, 32], dtype=torch.int32)
    torch.library.opcheck(functional._grouped_rows, (x, weight.mT, ends))
    torch.library.opcheck(functional._grouped_outer, (torch.randn(40, sizes[1]), x.detach(), ends))
