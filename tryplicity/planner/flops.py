"""FLOPs of one operation by its shapes: torch's formulas, and those that it lacks or has wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from tryplicity.functional import count_grouped_flops

aten = torch.ops.aten


def _grouped_flops(a: Tensor, b: Tensor, *_, out_val: Tensor, **__) -> int:
    """[S,I]x[E,I,O], the gradient of its weights [I,S]x[S,O], and stacks: every row meets one matrix."""
    if a.dim() == 2 and b.dim() == 2:
        return 2 * a.shape[0] * a.shape[1] * b.shape[1]
    if a.dim() == 2:
        return 2 * a.shape[0] * a.shape[1] * b.shape[2]
    return 2 * a.shape[1] * a.shape[2] * b.shape[-1] * (a.shape[0] if b.dim() == 3 else 1)


def _convolution_flops(x: Tensor, weight: Tensor, *_, out_val: Tensor, **__) -> int:
    return 2 * out_val.numel() * weight.shape[1:].numel()


def _convolution_backward_flops(grad: Tensor, x: Tensor, weight: Tensor, *args, out_val: Any, **__) -> int:
    """torch's own formula ignores groups in the weight's gradient."""
    output_mask = args[-1]
    return 2 * grad.numel() * weight.shape[1:].numel() * (bool(output_mask[0]) + bool(output_mask[1]))


def _attention_flops(q, k, v, dropout: float = 0.0, causal: bool = False, *_, out_val, **__) -> int:
    """Scores and values for every query head, however few heads keys and values have (torch 2.11's own formula wants
    as many). A causal kernel skips the masked half."""
    (B, H, T, K), S, V = q.shape, k.shape[2], v.shape[3]
    return 2 * B * H * T * S * (K + V) // (2 if causal else 1)


def _attention_backward_flops(grad, q, k, v, out, lse, dropout: float = 0.0, causal: bool = False, *_,
                              out_val, **__) -> int:
    """The scores again, the gradients of queries and keys (K wide), those of values and weights (V wide)."""
    (B, H, T, K), S, V = q.shape, k.shape[2], v.shape[3]
    return 2 * B * H * T * S * (3 * K + 2 * V) // (2 if causal else 1)


def _lstm_flops(x, *weights_and_states, out_val, **__) -> int:
    """x [T,B,I], weights [F,I] and [F,H]."""
    return 2 * x.shape[0] * x.shape[1] * (weights_and_states[0].numel() + weights_and_states[1].numel())


def _lstm_backward_flops(x, *weights_and_states, out_val, **__) -> int:
    return 2 * _lstm_flops(x, *weights_and_states, out_val=out_val)


count_grouped_flops()
#: products of rows sorted by expert, some of which hold no token
GROUPED = (aten._grouped_mm, torch.ops.tryplicity.grouped_rows, torch.ops.tryplicity.grouped_outer)
_PACKETS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    aten.addmm_: flop_registry[aten.addmm],
    aten.baddbmm_: flop_registry[aten.baddbmm],
    aten._grouped_mm: _grouped_flops,
    aten.convolution: _convolution_flops,
    aten.convolution_backward: _convolution_backward_flops,
    aten.mkldnn_rnn_layer: _lstm_flops,
    aten.mkldnn_rnn_layer_backward: _lstm_backward_flops,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}
#: operation -> its FLOPs, of its arguments and `out_val`
FORMULAS = {getattr(packet, overload): formula for packet, formula in _PACKETS.items()
             if hasattr(packet, "overloads") for overload in packet.overloads()}
