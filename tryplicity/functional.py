"""Products that several layers share: rows grouped by expert, and cross-entropy that never holds all logits.

Shapes: S rows sorted by expert, E experts, I in, O out, N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F


def _grouped_loop(x_SI: Tensor, weight_EOI: Tensor, offsets_E: Tensor) -> Tensor:
    """One product per expert. Reads the offsets on the host: for builds without a grouped product."""
    ends = offsets_E.tolist()
    # unbind, not indexing: each weight[e] would make autograd build a full-size zero gradient
    weights, outputs, start = weight_EOI.unbind(), [], 0
    for weight_OI, end in zip(weights, ends, strict=True):
        outputs.append(F.linear(x_SI[start:end], weight_OI))
        start = end
    outputs.append(x_SI.new_zeros(x_SI.shape[0] - start, weight_EOI.shape[1]))
    return torch.cat(outputs)


@cache
def grouped_product_works(device_type: str, dtype: torch.dtype) -> bool:
    """Whether torch's grouped product runs, forward and backward, here; found by trying it."""
    grouped = getattr(F, "grouped_mm", None)
    if grouped is None:
        return False
    try:
        x = torch.randn(16, 16, device=device_type, dtype=dtype, requires_grad=True)
        w = torch.randn(2, 16, 16, device=device_type, dtype=dtype, requires_grad=True)
        ends = torch.tensor([8, 16], device=device_type, dtype=torch.int32)
        y = grouped(x, w.transpose(-2, -1), offs=ends)
        y.backward(torch.ones_like(y))
        expected = torch.cat([x[:8] @ w[0].T, x[8:] @ w[1].T])
        return torch.allclose(y, expected, rtol=2e-2, atol=2e-2)
    except (RuntimeError, NotImplementedError):
        return False


def grouped_linear(x_SI: Tensor, weight_EOI: Tensor, offsets_E: Tensor) -> Tensor:
    """x[rows of expert e] @ weight[e].T for every e; rows from offsets_E[-1] on come out undefined.

    offsets_E: int32, the end of each expert's rows. Under autocast both sides are cast to its dtype, since
    torch's grouped product is in no autocast list.
    """
    if torch.is_autocast_enabled(x_SI.device.type):
        dtype = torch.get_autocast_dtype(x_SI.device.type)
        x_SI, weight_EOI = x_SI.to(dtype), weight_EOI.to(dtype)
    alignment = 16 // x_SI.element_size()
    aligned = x_SI.shape[-1] % alignment == 0 and weight_EOI.shape[1] % alignment == 0
    if aligned and grouped_product_works(x_SI.device.type, x_SI.dtype):
        return F.grouped_mm(x_SI, weight_EOI.transpose(-2, -1), offs=offsets_E)
    return _grouped_loop(x_SI, weight_EOI, offsets_E)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Loss and both gradients chunk by chunk in the forward pass; backward only scales them."""

    @staticmethod
    def forward(ctx, h_ND, weight_VD, targets_N, ignore, chunk, with_gradients):
        compute_dtype = (torch.get_autocast_dtype(h_ND.device.type)
                         if torch.is_autocast_enabled(h_ND.device.type) else h_ND.dtype)
        w_VD = weight_VD.to(compute_dtype)
        total = torch.zeros((), device=h_ND.device, dtype=torch.float32)
        if with_gradients:
            grad_h_ND = torch.empty_like(h_ND)
            grad_w_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        with torch.autocast(h_ND.device.type, enabled=False):
            for start in range(0, h_ND.shape[0], chunk):
                rows = slice(start, start + chunk)
                h_CD, targets_C = h_ND[rows].to(compute_dtype), targets_N[rows]
                logits_CV = (h_CD @ w_VD.T).float()
                lse_C = logits_CV.logsumexp(-1)
                valid_C = targets_C != ignore
                index_C1 = targets_C.where(valid_C, torch.zeros_like(targets_C))[:, None]
                nll_C = lse_C - logits_CV.gather(1, index_C1)[:, 0]
                total += nll_C.where(valid_C, torch.zeros_like(nll_C)).sum()
                if with_gradients:
                    p_CV = logits_CV.sub_(lse_C[:, None]).exp_()
                    p_CV.scatter_add_(1, index_C1, torch.full_like(index_C1, -1, dtype=p_CV.dtype))
                    p_CV = p_CV.mul_(valid_C[:, None]).to(compute_dtype)
                    grad_h_ND[rows] = (p_CV @ w_VD).to(h_ND.dtype)
                    if compute_dtype == torch.float32:
                        grad_w_VD.addmm_(p_CV.T, h_CD)
                    else:
                        grad_w_VD += p_CV.T @ h_CD
        if with_gradients:
            ctx.save_for_backward(grad_h_ND, grad_w_VD.to(weight_VD.dtype))
        return total

    @staticmethod
    def backward(ctx, grad):
        grad_h_ND, grad_w_VD = ctx.saved_tensors
        return grad * grad_h_ND, grad * grad_w_VD, None, None, None, None


def chunked_cross_entropy(h_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, *, ignore: int = -100,
                          chunk: int = 1024) -> Tensor:
    """The summed cross-entropy (nats) of `h @ weight.T` against targets, at most `chunk` rows of logits alive.

    Softmax in fp32. Positions whose target is `ignore` count nothing. Differentiable in h and weight (once).
    """
    with_gradients = torch.is_grad_enabled() and (h_ND.requires_grad or weight_VD.requires_grad)
    return _ChunkedCrossEntropy.apply(h_ND, weight_VD, targets_N, ignore, chunk, with_gradients)
