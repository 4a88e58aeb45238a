"""The selective scan of Mamba (S6), with hand-written gradients.

Gu and Dao, "Mamba" (arXiv:2312.00752). Each channel i of a sequence keeps a state h [N] and, token by token, does

    h = exp(dt * A_i) * h + dt * x * B,        y = C h

Every number of a state has a decay of its own, so that no product of matrices does it, as Mamba-2's do. The tokens are
walked through a chunk at a time: decays and inputs of a whole chunk at once, then one operation a token, in both
directions; kept for the gradients are only the states at the chunks' borders. A compiler, which would write the walk
out, is given a scan by doubling in plain operations.

Shapes: B batch, T time, I inner channels, N state, Q tokens of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from tryplicity_plugins.layers.ssd import own_dtypes


def _chunk_of(x, dt, A, Bs, Cs, keep, tokens: slice):
    """Decays and inputs of some tokens, and what they are made of, time first: [Q, B, I, N] and shorter."""
    x, dt, Bs, Cs = (t[:, tokens].transpose(0, 1) for t in (x, dt, Bs, Cs))
    decay = torch.mul(dt[..., None], A).exp_()
    if keep is not None:
        decay *= keep[:, tokens].T[:, :, None, None]
    return x, dt, Bs, Cs, decay, (dt * x)[..., None] * Bs[:, :, None]


def _walk(decay_QBIN: Tensor, h_QBIN: Tensor, start_BIN: Tensor) -> Tensor:
    """h[t] += decay[t] * h[t - 1], in place; the last."""
    if type(h_QBIN) is not Tensor or h_QBIN.is_meta:  # nothing but shapes: a plan
        return h_QBIN[-1]
    h_BIN = start_BIN
    for decay, h in zip(decay_QBIN.unbind(), h_QBIN.unbind(), strict=True):
        h_BIN = h.addcmul_(decay, h_BIN)
    return h_BIN


class _Scan(Function):
    """x and dt [B, T, I], A [I, N], B and C [B, T, N], start [B, I, N], keep [B, T] or None, all of one dtype."""

    @staticmethod
    @own_dtypes
    def forward(ctx, x, dt, A, Bs, Cs, start, keep, chunk):
        y, h = torch.empty_like(x), start
        borders, pieces = [], [slice(i, i + chunk) for i in range(0, x.shape[1], chunk)]
        for tokens in pieces:
            borders.append(h)
            *_, own_Cs, decay, h_QBIN = _chunk_of(x, dt, A, Bs, Cs, keep, tokens)
            h = _walk(decay, h_QBIN, h).clone()
            y[:, tokens] = (h_QBIN @ own_Cs[..., None])[..., 0].transpose(0, 1)
        ctx.save_for_backward(x, dt, A, Bs, Cs, keep, *borders)
        ctx.pieces = pieces
        return y, h.clone() if h is start else h

    @staticmethod
    @once_differentiable
    @own_dtypes
    def backward(ctx, dy, dlast):
        x_all, dt_all, A, Bs_all, Cs_all, keep, *borders = ctx.saved_tensors
        dx, ddt, dA = torch.empty_like(x_all), torch.empty_like(dt_all), torch.zeros_like(A)
        dB, dC, later = torch.empty_like(Bs_all), torch.empty_like(Cs_all), dlast
        for tokens, start in zip(reversed(ctx.pieces), reversed(borders), strict=True):
            x, dt, Bs, Cs, decay, h = _chunk_of(x_all, dt_all, A, Bs_all, Cs_all, keep, tokens)
            _walk(decay, h, start)
            dy_QBI = dy[:, tokens].transpose(0, 1)
            dC[:, tokens] = (dy_QBI[..., None, :] @ h)[..., 0, :].transpose(0, 1)
            grad = dy_QBI[..., None] * Cs[:, :, None]  # of each state, from its own output; then from what follows
            grad[-1] += later
            _walk_back(decay, grad)
            later = decay[0] * grad[0]
            before = torch.cat([start[None], h[:-1]])
            flow = before.mul_(grad).mul_(decay)  # of dt * A
            u = (grad @ Bs[..., None])[..., 0]
            dx[:, tokens] = (u * dt).transpose(0, 1)
            ddt[:, tokens] = torch.addcmul((flow * A).sum(-1), u, x).transpose(0, 1)
            dA += (flow * dt[..., None]).sum((0, 1))
            dB[:, tokens] = ((dt * x)[..., None, :] @ grad)[..., 0, :].transpose(0, 1)
        return dx, ddt, dA, dB, dC, later, None, None


def _walk_back(decay_QBIN: Tensor, grad_QBIN: Tensor) -> None:
    """grad[t] += decay[t + 1] * grad[t + 1], in place, from the end."""
    if type(grad_QBIN) is not Tensor or grad_QBIN.is_meta:
        return
    grads, decays = grad_QBIN.unbind(), decay_QBIN.unbind()
    for t in reversed(range(len(grads) - 1)):
        grads[t].addcmul_(decays[t + 1], grads[t + 1])


def _traced(x, dt, A, Bs, Cs, start, keep, chunk):
    """The same for a compiler: inside a chunk by doubling, so that it takes log2(chunk) steps."""
    batch, time = x.shape[:2]
    pad = -time % chunk
    x, dt, Bs, Cs = (F.pad(t, (0, 0, 0, pad)).unflatten(1, (-1, chunk)) for t in (x, dt, Bs, Cs))
    decay, h = (dt[..., None] * A).exp(), (dt * x)[..., None] * Bs[..., None, :]  # [B, k, Q, I, N]
    if keep is not None:
        decay = decay * F.pad(keep, (0, pad), value=1).view(batch, -1, chunk, 1, 1)
    reach = 1
    while reach < chunk:
        shifted, ahead = ((0, 0) * 2 + (reach, 0)), slice(None, -reach)
        h = h + decay * F.pad(h[:, :, ahead], shifted)
        decay = decay * F.pad(decay[:, :, ahead], shifted, value=1)
        reach *= 2
    ys = []
    for i in range(h.shape[1]):
        whole = h[:, i] + decay[:, i] * start[:, None]
        start = whole[:, -1]
        ys.append((whole @ Cs[:, i, ..., None])[..., 0])
    return torch.cat(ys, 1)[:, :time], start


def selective_scan(x_BTI: Tensor, dt_BTI: Tensor, A_IN: Tensor, B_BTN: Tensor, C_BTN: Tensor, *, chunk: int = 32,
                   start_BIN: Tensor | None = None, begins_BT: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The outputs y [B, T, I] and the last state [B, I, N] of the recurrence above, in dt's dtype.

    dt_BTI: positive, fp32 or wider; A_IN: negative, of that dtype. start_BIN: the state before the first token, zero
    when absent. begins_BT: True where a document begins: its first token sees no state.
    """
    wide, chunk = dt_BTI.dtype, max(1, min(chunk, x_BTI.shape[1]))
    keep_BT = None if begins_BT is None else (~begins_BT).to(wide)
    if start_BIN is None:
        start_BIN = dt_BTI.new_zeros(len(x_BTI), *A_IN.shape)
    run = _traced if torch.compiler.is_compiling() else _Scan.apply
    with torch.autocast(x_BTI.device.type, enabled=False):
        return run(x_BTI.to(wide), dt_BTI, A_IN, B_BTN.to(wide), C_BTN.to(wide), start_BIN.to(wide), keep_BT, chunk)
