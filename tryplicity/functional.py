"""Products that several layers share: rows grouped by expert, and cross-entropy that never holds all logits.

Shapes: S rows sorted by expert, E experts, I in, O out, N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def _group_loop(x_SI: Tensor, weight_EIO: Tensor, ends: list[int], out_SO: Tensor) -> None:
    start = 0
    for weight_IO, end in zip(weight_EIO.unbind(), ends, strict=True):
        torch.mm(x_SI[start:end], weight_IO, out=out_SO[start:end])
        start = end


@cache
def grouped_product_works(device_type: str, dtype: torch.dtype) -> bool:
    """Whether torch's grouped product runs here, in the three forms training needs; found by trying it."""
    if not hasattr(F, "grouped_mm"):
        return False
    try:
        x = torch.randn(16, 16, device=device_type).to(dtype)
        w = torch.randn(2, 16, 16, device=device_type).to(dtype)
        ends = torch.tensor([8, 16], device=device_type, dtype=torch.int32)
        wanted = [torch.cat([x[:8] @ w[0].T, x[8:] @ w[1].T]), torch.cat([x[:8] @ w[0], x[8:] @ w[1]]),
                  torch.stack([x[:8].T @ x[:8], x[8:].T @ x[8:]])]
        got = [F.grouped_mm(x, w.mT, offs=ends), F.grouped_mm(x, w, offs=ends),
               F.grouped_mm(x.T, x, offs=ends)]
        return all(torch.allclose(a, b, rtol=2e-2, atol=2e-2) for a, b in zip(got, wanted, strict=True))
    except (RuntimeError, NotImplementedError):
        return False


def _can_group(*tensors: Tensor) -> bool:
    """torch's grouped product wants every row to begin at a multiple of 16 bytes."""
    per_16_bytes = 16 // tensors[0].element_size()
    aligned = all(size % per_16_bytes == 0 for tensor in tensors for size in tensor.shape[1:])
    return aligned and grouped_product_works(tensors[0].device.type, tensors[0].dtype)


# Operators of their own, so that shapes can be worked out without data for every dtype (torch's own grouped
# product refuses fp32 there) and torch's FLOP counter knows them.
@torch.library.custom_op("tryplicity::grouped_rows", mutates_args=())
def _grouped_rows(x_SI: Tensor, weight_EIO: Tensor, offsets_E: Tensor) -> Tensor:
    """x[rows of e] @ weight[e]; zero from offsets_E[-1] on."""
    on_cpu = x_SI.device.type == "cpu"
    if _can_group(x_SI, weight_EIO):
        out_SO = F.grouped_mm(x_SI, weight_EIO, offs=offsets_E)
    else:
        out_SO = x_SI.new_empty(x_SI.shape[0], weight_EIO.shape[2])
        _group_loop(x_SI, weight_EIO, offsets_E.tolist(), out_SO)
    # the product leaves the rows after the last group uninitialised
    if on_cpu:
        out_SO[int(offsets_E[-1]):].zero_()
    else:
        rows_S = torch.arange(x_SI.shape[0], device=x_SI.device, dtype=torch.int32)
        out_SO.masked_fill_((rows_S >= offsets_E[-1])[:, None], 0)
    return out_SO


@torch.library.custom_op("tryplicity::grouped_outer", mutates_args=())
def _grouped_outer(y_SO: Tensor, x_SI: Tensor, offsets_E: Tensor) -> Tensor:
    """y[rows of e].T @ x[rows of e], zero for an empty group: the gradient of a stack of weights."""
    if _can_group(y_SO, x_SI):
        return F.grouped_mm(y_SO.T, x_SI, offs=offsets_E)
    out_EOI, start = x_SI.new_empty(offsets_E.shape[0], y_SO.shape[1], x_SI.shape[1]), 0
    for out_OI, end in zip(out_EOI.unbind(), offsets_E.tolist(), strict=True):
        torch.mm(y_SO[start:end].T, x_SI[start:end], out=out_OI)
        start = end
    return out_EOI


@_grouped_rows.register_fake
def _(x_SI, weight_EIO, offsets_E):
    return x_SI.new_empty(x_SI.shape[0], weight_EIO.shape[2])


@_grouped_outer.register_fake
def _(y_SO, x_SI, offsets_E):
    return x_SI.new_empty(offsets_E.shape[0], y_SO.shape[1], x_SI.shape[1])


@cache
def count_grouped_flops() -> None:
    """Tell torch's counter what the grouped products cost. Not when this module is loaded: the counter loads Triton,
    where that is installed, which neither decoding nor `--help` need."""
    from torch.utils.flop_counter import register_flop_formula

    register_flop_formula(torch.ops.tryplicity.grouped_rows)(_grouped_rows_flops)
    register_flop_formula(torch.ops.tryplicity.grouped_outer)(_grouped_outer_flops)


def _grouped_rows_flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * x_shape[0] * weight_shape[1] * weight_shape[2]


def _grouped_outer_flops(y_shape, x_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * y_shape[0] * y_shape[1] * x_shape[1]


def _save_for_backward(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _grouped_backward(ctx, grad_SO):
    x_SI, weight_EIO, offsets_E = ctx.saved_tensors
    grad_SO, grad_x, grad_w = grad_SO.contiguous(), None, None
    if ctx.needs_input_grad[0]:
        grad_x = _grouped_rows(grad_SO, weight_EIO.mT, offsets_E)
    if ctx.needs_input_grad[1]:  # as [E, O, I], the layout the weight itself has
        grad_w = _grouped_outer(grad_SO, x_SI, offsets_E).mT
    return grad_x, grad_w, None


_grouped_rows.register_autograd(_grouped_backward, setup_context=_save_for_backward)


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """Of all elements of all tensors, fp64: the same, to fp32's last digit, however their rows (dim 0) are parted and
    in whatever order parts are added up. Each row of a matrix is summed in its own dtype, which needs no wider copy."""
    rows = [torch.linalg.vector_norm(tensor, dim=-1) if tensor.ndim > 1 else tensor for tensor in tensors]
    return torch.stack([torch.linalg.vector_norm(row, dtype=torch.float64) for row in rows]).square().sum()


def grouped_linear(x_SI: Tensor, weight_EOI: Tensor, offsets_E: Tensor) -> Tensor:
    """x[rows of expert e] @ weight[e].T for every e; rows from offsets_E[-1] on come out zero, and get and
    give no gradient, whatever they hold.

    offsets_E: int32, the end of each expert's rows. On CUDA every group must hold a multiple of 8 rows. Under
    autocast both sides are cast to its dtype, since torch's grouped product is in no autocast list.
    """
    device_type = x_SI.device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        x_SI, weight_EOI = x_SI.to(dtype), weight_EOI.to(dtype)
    return _grouped_rows(x_SI.contiguous(), weight_EOI.mT, offsets_E)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Loss and both gradients chunk by chunk in the forward pass; backward only scales them."""

    @staticmethod
    def forward(ctx, h_ND, weight_VD, targets_N, factors_N, ignore, chunk, softcap, with_gradients):
        device = h_ND.device.type
        autocast = device != "meta" and torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else h_ND.dtype
        wide = torch.promote_types(dtype, torch.float32)
        w_VD = weight_VD.to(dtype)
        valid_N1 = (targets_N != ignore)[:, None]
        index_N1 = targets_N[:, None].where(valid_N1, torch.zeros_like(targets_N[:, None]))
        nll_N = torch.empty(h_ND.shape[0], device=h_ND.device, dtype=wide)
        if with_gradients:
            grad_h_ND = torch.empty_like(h_ND)
            grad_w_VD = torch.zeros_like(weight_VD, dtype=wide)
        with torch.autocast(device, enabled=False) if autocast else nullcontext():
            for start in range(0, h_ND.shape[0], chunk):
                rows = slice(start, start + chunk)
                valid_C1, index_C1 = valid_N1[rows], index_N1[rows]
                # with its ignored rows at zero here, no [C, V] tensor needs a mask
                h_CD = h_ND[rows].to(dtype).masked_fill(~valid_C1, 0)
                logits_CV = h_CD @ w_VD.T
                if softcap is not None:
                    logits_CV = tanh_CV = (logits_CV.to(wide) / softcap).tanh_()
                    logits_CV = tanh_CV * softcap
                logp_CV = F.log_softmax(logits_CV, dim=-1, dtype=wide)
                nll_N[rows] = -logp_CV.gather(1, index_C1).masked_fill_(~valid_C1, 0)[:, 0]
                if with_gradients:
                    p_CV = logp_CV.exp_()
                    p_CV.scatter_add_(1, index_C1, torch.full_like(index_C1, -1, dtype=wide))
                    if softcap is not None:
                        p_CV.mul_(tanh_CV.square_().neg_().add_(1))
                    if factors_N is not None:
                        p_CV.mul_(factors_N[rows, None])
                    p_CV = p_CV.to(dtype)
                    grad_h_ND[rows] = (p_CV @ w_VD).masked_fill_(~valid_C1, 0)
                    if dtype == wide:
                        grad_w_VD.addmm_(p_CV.T, h_CD)
                    else:
                        grad_w_VD += p_CV.T @ h_CD
        if with_gradients:
            ctx.save_for_backward(grad_h_ND, grad_w_VD.to(weight_VD.dtype))
        ctx.mark_non_differentiable(nll_N)
        return (nll_N if factors_N is None else nll_N * factors_N).sum(), nll_N

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        grad_h_ND, grad_w_VD = ctx.saved_tensors
        grads = (grad.to(saved.dtype) * saved for saved in (grad_h_ND, grad_w_VD))
        return *grads, None, None, None, None, None, None


def cross_entropy_and_nll(h_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, factors_N: Tensor | None = None, *,
                          ignore: int = -100, chunk: int = 1024,
                          softcap: float | None = None) -> tuple[Tensor, Tensor]:
    """The summed cross-entropy (nats) of `h @ weight.T` against targets, and that of each position, [N].

    `chunk` rows of logits at a time; softmax and sum in fp32 at least. A position whose target is `ignore` counts
    nothing, whatever h is there. factors_N: a factor of each position in the sum and its gradient, itself
    constant. softcap: softcap * tanh(logits / softcap) in place of the logits. The sum is differentiable in h and
    weight, once; the positions' own values are detached and without factors. Same values and gradients as
    F.cross_entropy.
    """
    with_gradients = torch.is_grad_enabled() and (h_ND.requires_grad or weight_VD.requires_grad)
    return _ChunkedCrossEntropy.apply(h_ND, weight_VD, targets_N, factors_N, ignore, chunk, softcap, with_gradients)


def chunked_cross_entropy(h_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, *, ignore: int = -100,
                          chunk: int = 1024) -> Tensor:
    """The sum of `cross_entropy_and_nll`, without factors."""
    return cross_entropy_and_nll(h_ND, weight_VD, targets_N, ignore=ignore, chunk=chunk)[0]
