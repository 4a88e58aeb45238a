"""Stages of training in one pass of C each, where eager PyTorch makes a pass over memory for every operation.

Each function does what the PyTorch beside its caller does, to rounding, or gives None where C may not: other dtypes and
devices, tensors without values, no compiler. The callers are autograd Functions, so no gradients are recorded here.

Shapes: N rows, D features, B batch, T time, L outputs, C channels, W width of a convolution, S slots, F neurons.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tryplicity_plugins.layers import native

CHUNK, TAPS = 64, 4  # training.cpp knows them too


class ConvolutionInC(ctypes.Structure):
    """training.cpp"""

    _fields_ = [*((name, ctypes.c_int64) for name in ("batch", "time", "channels", "width", "lead", "parts", "row",
                                                      "sequence")),
                *((name, ctypes.c_void_p) for name in ("sizes", "x", "weight", "bias", "same"))]


class GatedNormInC(ctypes.Structure):
    """training.cpp"""

    _fields_ = [*((name, ctypes.c_int64) for name in ("rows", "time", "channels", "groups", "y_row", "y_sequence",
                                                      "z_row", "z_sequence")),
                ("eps", ctypes.c_float), *((name, ctypes.c_void_p) for name in ("y", "x", "D", "z", "weight"))]


def readable(*whole: Tensor, rows: Sequence[Tensor] = ()) -> bool:
    """Whether C may read these: fp32 with values in this machine's memory, without gaps (`rows`: along the last axis),
    and a compiler is there."""
    return (all(type(t) in (Tensor, nn.Parameter) and t.dtype is torch.float32 and t.is_cpu for t in (*whole, *rows))
            and all(t.is_contiguous() for t in whole) and all(t.stride(-1) == 1 or t.shape[-1] == 1 for t in rows)
            and native.function("gated_silu_forward", "ppii") is not None)


def _chunks(rows: int) -> int:
    return -(-rows // CHUNK)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor] | None:
    """x / rms(x) * weight, and 1 / rms(x) [..., 1]."""
    if not readable(x, weight_D):
        return None
    y, D = torch.empty_like(x), x.shape[-1]
    rstd = x.new_empty(*x.shape[:-1], 1)
    native.function("rms_norm_forward", "ppppiif")(x.data_ptr(), weight_D.data_ptr(), y.data_ptr(), rstd.data_ptr(),
                                                   rstd.numel(), D, eps)
    return y, rstd


def rms_norm_backward(dy: Tensor, x: Tensor, weight_D: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor] | None:
    """The gradients of x and of the weight."""
    if not readable(x, weight_D, rstd, rows=[dy]):
        return None
    dy, dx, D, rows = dy.contiguous(), torch.empty_like(x), x.shape[-1], rstd.numel()
    dweight = x.new_empty(_chunks(rows), D)
    native.function("rms_norm_backward", "ppppppii")(dy.data_ptr(), x.data_ptr(), weight_D.data_ptr(), rstd.data_ptr(),
                                                     dx.data_ptr(), dweight.data_ptr(), rows, D)
    return dx, dweight.sum(0)


def gated_silu(gate_up: Tensor) -> Tensor | None:
    """silu(gate) * up of [..., 2 F], gate and up."""
    if not readable(gate_up):
        return None
    F = gate_up.shape[-1] // 2
    h = gate_up.new_empty(*gate_up.shape[:-1], F)
    native.function("gated_silu_forward", "ppii")(gate_up.data_ptr(), h.data_ptr(), h.numel() // F, F)
    return h


def gated_silu_backward(dh: Tensor, gate_up: Tensor) -> Tensor | None:
    """The gradient of gate_up."""
    if not readable(gate_up, rows=[dh]):
        return None
    dh, dgate_up, F = dh.contiguous(), torch.empty_like(gate_up), dh.shape[-1]
    native.function("gated_silu_backward", "pppii")(dh.data_ptr(), gate_up.data_ptr(), dgate_up.data_ptr(),
                                                    dh.numel() // F, F)
    return dgate_up


def _convolution(x_BTC: Tensor, weight_WC: Tensor, bias_C: Tensor, same_BWT: Tensor | None, lead: int,
                 sizes: Sequence[int]) -> ConvolutionInC | None:
    if not readable(weight_WC, bias_C, rows=[x_BTC]) or weight_WC.shape[0] > TAPS or x_BTC.shape[1] <= lead:
        return None
    (batch, time, channels), sizes = x_BTC.shape, (ctypes.c_int64 * len(sizes))(*sizes)
    struct = ConvolutionInC(batch, time, channels, weight_WC.shape[0], lead, len(sizes), x_BTC.stride(1),
                            x_BTC.stride(0), ctypes.addressof(sizes), x_BTC.data_ptr(), weight_WC.data_ptr(),
                            bias_C.data_ptr(), None if same_BWT is None else same_BWT.data_ptr())
    struct.alive = sizes
    return struct


def conv_silu(x_BTC: Tensor, weight_WC: Tensor, bias_C: Tensor, same_BWT: Tensor | None, lead: int,
              sizes: Sequence[int]) -> tuple[Tensor, list[Tensor]] | None:
    """The convolution [B, L, C], and its silu in parts of these sizes."""
    same_BWT = None if same_BWT is None else same_BWT.contiguous()
    if (struct := _convolution(x_BTC, weight_WC, bias_C, same_BWT, lead, sizes)) is None:
        return None
    batch, time, channels = x_BTC.shape
    pre_BLC = x_BTC.new_empty(batch, time - lead, channels)
    outputs = [x_BTC.new_empty(batch, time - lead, size) for size in sizes]
    native.function("conv_silu_forward", "ppp")(ctypes.addressof(struct), pre_BLC.data_ptr(),
                                                native.addresses(*outputs))
    return pre_BLC, outputs


def conv_silu_backward(grads: Sequence[Tensor], x_BTC: Tensor, weight_WC: Tensor, bias_C: Tensor,
                       same_BWT: Tensor | None, pre_BLC: Tensor, lead: int,
                       sizes: Sequence[int]) -> tuple[Tensor, Tensor, Tensor] | None:
    """The gradients of x, of the weight and of the bias."""
    same_BWT = None if same_BWT is None else same_BWT.contiguous()
    struct = _convolution(x_BTC, weight_WC, bias_C, same_BWT, lead, sizes)
    if struct is None or not readable(pre_BLC, rows=grads):
        return None
    grads = [grad.contiguous() for grad in grads]
    dx_BTC = torch.empty_like(x_BTC, memory_format=torch.contiguous_format)
    dweight_BWC, dbias_BC = x_BTC.new_empty(len(x_BTC), *weight_WC.shape), x_BTC.new_empty(len(x_BTC), bias_C.numel())
    native.function("conv_silu_backward", "pppppp")(
        ctypes.addressof(struct), pre_BLC.data_ptr(), native.addresses(*grads), dx_BTC.data_ptr(),
        dweight_BWC.data_ptr(), dbias_BC.data_ptr())
    return dx_BTC, dweight_BWC.sum(0), dbias_BC.sum(0)


def _gated_norm(y_BTC: Tensor, x_BTC: Tensor, D_C: Tensor, z_BTC: Tensor, weight_C: Tensor, groups: int,
                eps: float) -> GatedNormInC | None:
    if not readable(x_BTC, D_C, weight_C, rows=[y_BTC, z_BTC]):
        return None
    batch, time, channels = y_BTC.shape
    return GatedNormInC(batch * time, time, channels, groups, y_BTC.stride(1), y_BTC.stride(0), z_BTC.stride(1),
                        z_BTC.stride(0), eps, y_BTC.data_ptr(), x_BTC.data_ptr(), D_C.data_ptr(), z_BTC.data_ptr(),
                        weight_C.data_ptr())


def gated_norm(y_BTC: Tensor, x_BTC: Tensor, D_C: Tensor, z_BTC: Tensor, weight_C: Tensor, groups: int,
               eps: float) -> tuple[Tensor, Tensor] | None:
    """The norm of (y + D x) * silu(z), and 1 / its root mean square [B, T, groups, 1]."""
    if (struct := _gated_norm(y_BTC, x_BTC, D_C, z_BTC, weight_C, groups, eps)) is None:
        return None
    out_BTC, rms = y_BTC.new_empty(y_BTC.shape), y_BTC.new_empty(*y_BTC.shape[:2], groups, 1)
    native.function("gated_norm_forward", "ppp")(ctypes.addressof(struct), out_BTC.data_ptr(), rms.data_ptr())
    return out_BTC, rms


def gated_norm_backward(dout_BTC: Tensor, y_BTC: Tensor, x_BTC: Tensor, D_C: Tensor, z_BTC: Tensor, weight_C: Tensor,
                        rms: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None:
    """The gradients of y, x, D, z and the weight."""
    struct = _gated_norm(y_BTC, x_BTC, D_C, z_BTC, weight_C, groups, 0.0)
    if struct is None or not readable(rows=[dout_BTC]):
        return None
    dout_BTC = dout_BTC.contiguous()
    dy, dx, dz = (y_BTC.new_empty(y_BTC.shape) for _ in range(3))
    dD, dweight = (y_BTC.new_empty(_chunks(struct.rows), struct.channels) for _ in range(2))
    native.function("gated_norm_backward", "pppppppp")(
        ctypes.addressof(struct), dout_BTC.data_ptr(), rms.data_ptr(), dy.data_ptr(), dx.data_ptr(), dz.data_ptr(),
        dD.data_ptr(), dweight.data_ptr())
    return dy, dx, dD.sum(0), dz, dweight.sum(0)


class ChunksInC(ctypes.Structure):
    """scan.cpp"""

    _fields_ = [*((name, ctypes.c_int64) for name in ("n", "Q", "H", "G", "masks")),
                *((name, ctypes.c_void_p) for name in ("cum", "scores", "mask"))]


def _scan_chunks(cum_nHQ: Tensor, scores_nGLS: Tensor, mask: Tensor) -> ChunksInC | None:
    if not readable(cum_nHQ, scores_nGLS, mask):
        return None
    n, H, Q = cum_nHQ.shape
    return ChunksInC(n, Q, H, scores_nGLS.shape[1], len(mask) if mask.dim() == 3 else 1, cum_nHQ.data_ptr(),
                     scores_nGLS.data_ptr(), mask.data_ptr())


def scan_mixing(cum_nHQ: Tensor, scores_nGLS: Tensor, mask: Tensor) -> Tensor | None:
    """exp(cum_L - cum_S) * scores * mask [n, H, L, S], each head with its group's scores. mask: [L, S] or [n, L, S],
    lower triangular."""
    if (struct := _scan_chunks(cum_nHQ, scores_nGLS, mask)) is None:
        return None
    n, H, Q = cum_nHQ.shape
    M_nHLS = cum_nHQ.new_empty(n, H, Q, Q)
    native.function("scan_mixing", "pp")(ctypes.addressof(struct), M_nHLS.data_ptr())
    return M_nHLS


def scan_mixing_backward(cum_nHQ: Tensor, scores_nGLS: Tensor, mask: Tensor,
                         dM_nHLS: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """From the gradient of what `scan_mixing` gives: that again, in the gradient's memory; the gradient of the scores;
    that of cum as [n, Q, H], the decay from a token to itself left out."""
    struct = _scan_chunks(cum_nHQ, scores_nGLS, mask)
    if struct is None or not readable(dM_nHLS):
        return None
    n, H, Q = cum_nHQ.shape
    dscores_nGLS, dcum_nQH = torch.empty_like(scores_nGLS), cum_nHQ.new_empty(n, Q, H)
    native.function("scan_mixing_backward", "pppp")(ctypes.addressof(struct), dM_nHLS.data_ptr(),
                                                    dscores_nGLS.data_ptr(), dcum_nQH.data_ptr())
    return dM_nHLS, dscores_nGLS, dcum_nQH


class RowsInC(ctypes.Structure):
    """scan.cpp"""

    _fields_ = [*((name, ctypes.c_int64) for name in ("n", "Q", "H", "G", "P")),
                *((name, ctypes.c_void_p) for name in ("x", "dy", "before", "inside", "dxo", "dt", "into", "out", "dx",
                                                       "ddt", "dcum", "flow"))]


def scan_rows_backward(x_nQHP: Tensor, dy_nQHP: Tensor, before_nQHP: Tensor, inside_nHQP: Tensor, dxo_nGQX: Tensor,
                       dt_nQH: Tensor, into_nQH: Tensor, out_nQH: Tensor, dcum_nQH: Tensor,
                       dx_nQHP: Tensor) -> tuple[Tensor, Tensor] | None:
    """What is left for each token and head when the products are done. Writes dx; adds before . dy * into - flow to
    dcum; gives ddt and flow, x . dxo * out * dt, [n, Q, H]."""
    if not readable(inside_nHQP, dxo_nGQX, dt_nQH, into_nQH, out_nQH, dcum_nQH, dx_nQHP,
                    rows=[x_nQHP, dy_nQHP, before_nQHP]):
        return None
    x_nQHP, dy_nQHP, before_nQHP = x_nQHP.contiguous(), dy_nQHP.contiguous(), before_nQHP.contiguous()
    n, Q, H, P = x_nQHP.shape
    ddt_nQH, flow_nQH = torch.empty_like(dt_nQH), torch.empty_like(dt_nQH)
    struct = RowsInC(n, Q, H, dxo_nGQX.shape[1], P, *(t.data_ptr() for t in (
        x_nQHP, dy_nQHP, before_nQHP, inside_nHQP, dxo_nGQX, dt_nQH, into_nQH, out_nQH, dx_nQHP, ddt_nQH, dcum_nQH,
        flow_nQH)))
    native.function("scan_rows_backward", "p")(ctypes.addressof(struct))
    return ddt_nQH, flow_nQH
