"""The slots of a token (its chosen experts) sorted by expert, and the tokens' way into such rows and out of them.

Shapes: N tokens, D hidden, E experts, K slots of a token, S rows sorted by expert.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

#: Every group begins and ends at a multiple of this many rows. MKL rounds a product of 1, and of 2 or 3 rows,
#: unlike one of 4 or more (with several threads: the rows after the last multiple of 4), so without it a
#: token's result would depend on how many others share its expert. And CUDA wants groups of a multiple of 16
#: bytes.
GROUP_ROWS = 8


class Layout(NamedTuple):
    """Where the tokens' slots lie when sorted by expert. Shapes depend on N, K and E alone."""

    slot_NK: Tensor  # the row of each slot; an unused slot names the row of the token's first
    used_NK: Tensor
    token_S: Tensor  # the token of each row; a row without one has token 0
    expert_S: Tensor  # the expert of each row; a row without one has E
    offsets_E: Tensor  # int32, the end of each expert's rows


def lay_out(experts_NK: Tensor, experts: int) -> Layout:
    """Sort slots by expert into groups of a multiple of GROUP_ROWS rows. A token's unused slots come last,
    and it uses one at least."""
    tokens, slots = experts_NK.shape
    device = experts_NK.device
    sorted_S, order_S = experts_NK.flatten().sort(stable=True)
    ends_E = torch.searchsorted(sorted_S, torch.arange(experts, device=device), right=True)
    sizes_E = ends_E.diff(prepend=ends_E.new_zeros(1))
    padded_E = (sizes_E + GROUP_ROWS - 1) // GROUP_ROWS * GROUP_ROWS
    offsets_E = padded_E.cumsum(0)
    shift_E = (offsets_E - padded_E) - (ends_E - sizes_E)
    row_S = torch.arange(tokens * slots, device=device) + shift_E[sorted_S.clamp(max=experts - 1)]
    row_NK = torch.empty_like(row_S).scatter_(0, order_S, row_S).view(tokens, slots)
    used_NK = experts_NK < experts
    slot_NK = row_NK.where(used_NK, row_NK[:, :1])

    # GROUP_ROWS for each thread, too: where the shares of two threads meet inside a row, its last elements
    # take the scalar code of sigmoid and the like, which rounds unlike the vector code
    eager_cpu = device.type == "cpu" and not torch.compiler.is_compiling()
    step = GROUP_ROWS * (torch.get_num_threads() if eager_cpu else 1)
    rows = -(-(tokens * slots + experts * (GROUP_ROWS - 1)) // step) * step
    token_NK = torch.arange(tokens, device=device)[:, None].expand(tokens, slots)
    token_S = slot_NK.new_zeros(rows).scatter_(0, slot_NK.flatten(), token_NK.flatten())
    expert_NK = experts_NK.where(used_NK, experts_NK[:, :1])
    expert_S = slot_NK.new_full((rows,), experts).scatter_(0, slot_NK.flatten(), expert_NK.flatten())
    return Layout(slot_NK, used_NK, token_S, expert_S, offsets_E.to(torch.int32))


class _Spread(torch.autograd.Function):
    """Tokens to their rows. Both ways a gather: no sum whose order could change."""

    @staticmethod
    def forward(ctx, x_ND, slot_NK, used_NK, token_S):
        ctx.save_for_backward(slot_NK, used_NK)
        return x_ND.index_select(0, token_S)

    @staticmethod
    def backward(ctx, grad_SD):
        slot_NK, used_NK = ctx.saved_tensors
        if torch.compiler.is_compiling():
            grad_NKD = grad_SD.index_select(0, slot_NK.flatten()).view(*slot_NK.shape, -1).float()
            return (grad_NKD * used_NK[..., None]).sum(1).to(grad_SD.dtype), None, None, None
        grad_ND = torch.zeros(len(slot_NK), grad_SD.shape[1], device=grad_SD.device)
        for slot_N, used_N in zip(slot_NK.T, used_NK.float().T, strict=True):
            grad_ND.addcmul_(grad_SD.index_select(0, slot_N), used_N[:, None])
        return grad_ND.to(grad_SD.dtype), None, None, None


def spread(x_ND: Tensor, layout: Layout) -> Tensor:
    """Tokens to their rows, in the dtype of the product to come."""
    kind = x_ND.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        x_ND = x_ND.to(torch.get_autocast_dtype(kind))
    return _Spread.apply(x_ND, layout.slot_NK, layout.used_NK, layout.token_S)


class _Collect(torch.autograd.Function):
    """Rows back to their tokens, weighted and summed in fp32."""

    @staticmethod
    def forward(ctx, y_SD, weights_NK, slot_NK, used_NK, token_S):
        ctx.save_for_backward(y_SD, weights_NK, slot_NK, used_NK, token_S)
        if torch.compiler.is_compiling():
            y_NKD = y_SD.index_select(0, slot_NK.flatten()).view(*slot_NK.shape, -1)
            return _cast((y_NKD.float() * weights_NK.float()[..., None]).sum(1), y_SD.dtype)
        out_ND = torch.zeros(len(weights_NK), y_SD.shape[1], device=y_SD.device)
        for slot_N, weight_N in zip(slot_NK.T, weights_NK.float().T, strict=True):
            out_ND.addcmul_(y_SD.index_select(0, slot_N), weight_N[:, None])
        return out_ND.to(y_SD.dtype)

    @staticmethod
    def backward(ctx, grad_ND):
        y_SD, weights_NK, slot_NK, used_NK, token_S = ctx.saved_tensors
        weight_S = torch.zeros(len(y_SD), device=y_SD.device, dtype=y_SD.dtype)
        weight_S.scatter_add_(0, slot_NK.flatten(), weights_NK.flatten().to(y_SD.dtype))
        if torch.compiler.is_compiling():
            y_NKD = y_SD.index_select(0, slot_NK.flatten()).view(*slot_NK.shape, -1)
            grad_NK = ((grad_ND[:, None] * y_NKD).sum(-1) * used_NK).to(weights_NK.dtype)
            return grad_ND.index_select(0, token_S) * weight_S[:, None], grad_NK, None, None, None
        grad_SD = grad_ND.index_select(0, token_S).mul_(weight_S[:, None])
        grad_w = [(grad_ND * y_SD.index_select(0, slot_N)).sum(-1) for slot_N in slot_NK.T]
        grad_NK = torch.stack(grad_w, -1).where(used_NK, 0)
        return grad_SD, grad_NK.to(weights_NK.dtype), None, None, None


def collect(y_SD: Tensor, weights_NK: Tensor, layout: Layout) -> Tensor:
    """Rows back to their tokens, weighted and summed: [N, D]."""
    return _Collect.apply(y_SD, weights_NK, layout.slot_NK, layout.used_NK, layout.token_S)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """In torch 2.11 a compiled Function loses its gradient if its forward ends in a cast that changes nothing."""
    return x if x.dtype == dtype else x.to(dtype)
