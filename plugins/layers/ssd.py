"""The state-space dual form of Mamba-2 and the two elementwise stages around it, with hand-written gradients.

Dao and Gu, "Transformers are SSMs" (arXiv:2405.21060), sections 6 and 7. Each head h of a sequence keeps a
state S [P, N] and, token by token, does

    S = exp(dt * A_h) * S + dt * x B^T,        y = S C

`scan` computes the same in chunks of Q tokens: inside a chunk as masked matrix products, between chunks
through the states at the chunk borders. The gradients are written out because autograd would keep and walk
over several times as many large tensors; each function works through the batch in blocks of rows that stay in
cache. A compiler is given the plain forms of `ssd_traced.py`: these it could not fuse.

Packed documents: `runs_BT` numbers the documents of a row, 0 being the one the incoming state belongs to. A
foreign token enters every product with a factor that is exactly zero, and no sum of decays runs across a
border, so no bit of one document depends on another.

Shapes: B batch, T time, H heads, P head dim, G groups, R heads per group, N state, C channels, W conv width,
b rows of a block, k chunks, n = b * k, Q tokens of a chunk (L as target, S as source).
"""

from __future__ import annotations

from functools import wraps

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from tryplicity_plugins.layers import fused, ssd_traced


def _row_blocks(like: Tensor, batch: int, row_elements: int) -> list[slice]:
    """The batch cut into blocks of rows: about 2 MB of fp32 each on a CPU, to stay in its cache."""
    budget = 2**19 if like.device.type == "cpu" else 2**24
    rows = max(1, budget // max(row_elements, 1))
    return [slice(start, min(start + rows, batch)) for start in range(0, batch, rows)]


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What decays and sums are computed in: fp32 at least."""
    return torch.promote_types(dtype, torch.float32)


def own_dtypes(function):
    """Runs a forward or backward without autocast: it chooses the dtype of each product itself."""

    @wraps(function)
    def run(ctx, *args):
        device_type = next(arg for arg in args if isinstance(arg, Tensor)).device.type
        if not torch.amp.is_autocast_available(device_type):
            return function(ctx, *args)
        with torch.autocast(device_type, enabled=False):
            return function(ctx, *args)

    return run


def _room(rows: Tensor, wide: torch.dtype) -> Tensor:
    """Where to compute what ends in `rows`: there, if it is of dtype `wide`, else in a tensor to `_keep`."""
    return rows if rows.dtype == wide else torch.empty_like(rows, dtype=wide)


def _keep(room: Tensor, rows: Tensor) -> None:
    if room is not rows:
        rows.copy_(room)


# --- short causal convolution and SiLU ---


class _ConvSiLU(Function):
    @staticmethod
    @own_dtypes
    def forward(ctx, x_BTC, weight_WC, bias_C, same_BWT, lead, sizes):
        batch, time, channels = x_BTC.shape
        width, length = weight_WC.shape[0], time - lead
        wide = _wide(x_BTC.dtype)
        ctx.lead, ctx.sizes, ctx.bias_dtype = lead, sizes, bias_C.dtype
        if (done := fused.conv_silu(x_BTC, weight_WC, bias_C, same_BWT, lead, sizes)) is not None:
            pre_BTC, outputs = done
            ctx.save_for_backward(x_BTC, weight_WC, bias_C, same_BWT, pre_BTC)
            return tuple(outputs)
        w_WC, b_C = weight_WC.to(wide), bias_C.to(wide)
        pre_BTC = x_BTC.new_empty(batch, length, channels)
        outputs = [x_BTC.new_empty(batch, length, size) for size in sizes]
        for rows in _row_blocks(x_BTC, batch, length * channels):
            x, kept = x_BTC[rows].to(wide), pre_BTC[rows]
            pre = _room(kept, wide)
            torch.addcmul(b_C, x[:, lead:], w_WC[-1], out=pre)
            for lag in range(1, width):
                start = max(0, lag - lead)  # without a tail, the first tokens have nothing so far back
                source = x[:, start + lead - lag : max(time - lag, 0)]
                if same_BWT is not None:
                    source = source * same_BWT[rows, lag - 1, lead + start :, None]
                pre[:, start:].addcmul_(source, w_WC[-1 - lag])
            _keep(pre, kept)
            for out, part in zip(outputs, kept.split(sizes, -1), strict=True):
                torch.ops.aten.silu.out(part, out=out[rows])
        ctx.save_for_backward(x_BTC, weight_WC, bias_C, same_BWT, pre_BTC)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    @own_dtypes
    def backward(ctx, *grads):
        x_BTC, weight_WC, bias_C, same_BWT, pre_BTC = ctx.saved_tensors
        done = fused.conv_silu_backward(grads, x_BTC, weight_WC, bias_C, same_BWT, pre_BTC, ctx.lead, ctx.sizes)
        if done is not None:
            return *done, None, None, None
        lead, time, width = ctx.lead, x_BTC.shape[1], weight_WC.shape[0]
        wide = _wide(x_BTC.dtype)
        w_WC = weight_WC.to(wide)
        dx_BTC = torch.empty_like(x_BTC, memory_format=torch.contiguous_format)
        dw_WC, db_C = torch.zeros_like(w_WC), torch.zeros_like(w_WC[0])
        for rows in _row_blocks(x_BTC, len(x_BTC), pre_BTC[0].numel()):
            x, pre = x_BTC[rows].to(wide), pre_BTC[rows].to(wide)
            dpre = torch.empty_like(pre)
            parts = zip(dpre.split(ctx.sizes, -1), grads, pre.split(ctx.sizes, -1), strict=True)
            for dpre_part, grad, pre_part in parts:
                torch.ops.aten.silu_backward.grad_input(grad[rows].to(wide), pre_part, grad_input=dpre_part)
            db_C += dpre.sum((0, 1))
            dw_WC[-1] += (dpre * x[:, lead:]).sum((0, 1))
            kept = dx_BTC[rows]
            dx = _room(kept, wide)
            dx[:, :lead].zero_()
            torch.mul(dpre, w_WC[-1], out=dx[:, lead:])
            for lag in range(1, width):
                start = max(0, lag - lead)
                source = slice(start + lead - lag, max(time - lag, 0))
                d = dpre[:, start:]
                if same_BWT is not None:
                    d = d * same_BWT[rows, lag - 1, lead + start :, None]
                dw_WC[-1 - lag] += (d * x[:, source]).sum((0, 1))
                dx[:, source].addcmul_(d, w_WC[-1 - lag])
            _keep(dx, kept)
        return dx_BTC, dw_WC.to(weight_WC.dtype), db_C.to(ctx.bias_dtype), None, None, None


def conv_silu(x_BTC: Tensor, weight_WC: Tensor, bias_C: Tensor, *, sizes: list[int], lead: int = 0,
              same_BWT: Tensor | None = None) -> tuple[Tensor, ...]:
    """silu of a causal convolution over time of each channel, split into `sizes` channels.

    weight_WC: the last of the W taps meets the current token. lead: how many of the first tokens are only
    looked back on (the tail of what came before) and give no output. same_BWT: from `conv_masks`.
    """
    run = ssd_traced.conv_silu if torch.compiler.is_compiling() else _ConvSiLU.apply
    return run(x_BTC, weight_WC, bias_C, same_BWT, lead, list(sizes))


# --- the scan ---


def _decays(a_nQH, mask_nLS, to_end_nQ, from_start_nQ):
    """Sums of log decays since each token's document or chunk began, and the factors at the chunk's borders.

    Returns cum [n, H, Q]; into [n, Q, H] from the chunk's first state to the token; out [n, Q, H] from the
    token to the chunk's last state; through [n, H] from the first state to the last.
    """
    cum_nQH = mask_nLS @ a_nQH
    into_nQH = cum_nQH.exp()
    # within one document the difference is never positive; across documents it is clamped, then made zero
    out_nQH = (cum_nQH[:, -1:] - cum_nQH).clamp_(max=0).exp_()
    if to_end_nQ is not None:
        into_nQH = into_nQH * from_start_nQ[..., None]
        out_nQH = out_nQH * to_end_nQ[..., None]
    return cum_nQH.transpose(1, 2).contiguous(), into_nQH, out_nQH, into_nQH[:, -1]


def _scores(cum_nHQ, B_nGQN, C_nGQN):
    """C B^T [n, G, L, S], once per group, as wide as the decays."""
    return (C_nGQN @ B_nGQN.transpose(-1, -2)).to(cum_nHQ.dtype)


def _mixing(cum_nHQ, scores_nGLS, mask_nLS):
    """The decay from S to L [n, H, L, S]; the scores are masked in place."""
    decay_nHLS = (cum_nHQ[..., :, None] - cum_nHQ[..., None, :]).clamp_(max=0).exp_()
    scores_nGLS *= mask_nLS if mask_nLS.dim() == 2 else mask_nLS[:, None]
    return decay_nHLS


def _times_group(t_nHLS, scores_nGLS):
    """t * scores, each head with its group's, in place."""
    t_nHLS.unflatten(1, (scores_nGLS.shape[1], -1)).mul_(scores_nGLS[:, :, None])
    return t_nHLS


def _mixing_backward(cum_nHQ, scores_nGLS, mask_nLS, dM_nHLS):
    """M = decay * mask * scores again; the gradient of the scores; that of cum as [n, Q, H]."""
    if (done := fused.scan_mixing_backward(cum_nHQ, scores_nGLS, mask_nLS, dM_nHLS)) is not None:
        return done
    dtype, (n, G, Q, _) = dM_nHLS.dtype, scores_nGLS.shape
    decay_nHLS = _mixing(cum_nHQ, scores_nGLS, mask_nLS)
    dM_nHLS = dM_nHLS.to(cum_nHQ.dtype).mul_(decay_nHLS)
    dscores_nGLS = dM_nHLS.view(n, G, -1, Q, Q).sum(2)
    dscores_nGLS *= mask_nLS if mask_nLS.dim() == 2 else mask_nLS[:, None]
    M_nHLS = _times_group(decay_nHLS, scores_nGLS).to(dtype)
    # the decay from S to L, as the difference of two sums; none from a token to itself
    flow_nHLS = _times_group(dM_nHLS, scores_nGLS)
    flow_nHLS.diagonal(dim1=-2, dim2=-1).zero_()
    return M_nHLS, dscores_nGLS.to(dtype), (flow_nHLS.sum(-1) - flow_nHLS.sum(-2)).transpose(1, 2)


def _rows_backward(x_nQHP, dy_nQHP, before_nQHP, inside_nHQP, dxo_nGQX, dt_nQH, into_nQH, out_nQH, dcum_nQH, dx_nQHP):
    """See fused.scan_rows_backward: dx and dcum are written, ddt and the flow into the states given."""
    given = x_nQHP, dy_nQHP, before_nQHP, inside_nHQP, dxo_nGQX, dt_nQH, into_nQH, out_nQH, dcum_nQH, dx_nQHP
    if (done := fused.scan_rows_backward(*given)) is not None:
        return done
    wide, dtype = dt_nQH.dtype, x_nQHP.dtype
    inside_nQHP, dxo_nQHP = inside_nHQP.transpose(1, 2), dxo_nGQX.transpose(1, 2).reshape(x_nQHP.shape)
    ddt_nQH = (x_nQHP * inside_nQHP).sum(-1, dtype=wide)
    dcum_nQH += (before_nQHP * dy_nQHP).sum(-1, dtype=wide) * into_nQH
    ddto_nQH = (x_nQHP * dxo_nQHP).sum(-1, dtype=wide).mul_(out_nQH)
    ddt_nQH += ddto_nQH
    flow_nQH = ddto_nQH.mul_(dt_nQH)
    dcum_nQH -= flow_nQH
    dxdt_nQHP = torch.addcmul(inside_nQHP, dxo_nQHP, out_nQH[..., None].to(dtype))
    torch.mul(dxdt_nQHP, dt_nQH[..., None].to(dtype), out=dx_nQHP)
    return ddt_nQH, flow_nQH


class _Scan(Function):
    """x [B, k, Q, H, P]; dt and a = dt * A [B, k, Q, H]; B and C [B, k, Q, G, N]; start [B, H, P, N]."""

    @staticmethod
    @own_dtypes
    def forward(ctx, x, dt, a, Bs, Cs, start, mask, to_end, from_start):
        batch, k, Q, H, P = x.shape
        G, N = Bs.shape[-2:]
        dtype, wide = x.dtype, dt.dtype
        y = x.new_empty(batch, k, Q, H, P)
        states, last = dt.new_empty(batch, k, H, P, N), dt.new_empty(batch, H, P, N)  # at the start of each chunk
        states[:, 0].zero_() if start is None else states[:, 0].copy_(start)
        ctx.blocks, befores = _row_blocks(x, batch, k * Q * H * P), []
        for rows in ctx.blocks:
            x_nQHP, dt_nQH, a_nQH = x[rows].flatten(0, 1), dt[rows].flatten(0, 1), a[rows].flatten(0, 1)
            B_nGQN, C_nGQN = (t[rows].flatten(0, 1).transpose(1, 2) for t in (Bs, Cs))
            mask_nLS, ends = _masks_of(mask, to_end, from_start, rows)
            n = x_nQHP.shape[0]
            cum, into, out, through = _decays(a_nQH, mask_nLS, *ends)

            S_bkHPN = states[rows]
            xo_nQHP = x_nQHP * (dt_nQH * out)[..., None].to(dtype)
            added = xo_nQHP.view(n, Q, G, -1).permute(0, 2, 3, 1) @ B_nGQN  # [n, G, R * P, N]
            added, through = added.view(-1, k, H, P, N), through.view(-1, k, H, 1, 1)
            for i in range(k):
                torch.addcmul(added[:, i].to(wide), through[:, i], S_bkHPN[:, i],
                              out=last[rows] if i == k - 1 else S_bkHPN[:, i + 1])

            scores_nGLS = _scores(cum, B_nGQN, C_nGQN)
            if (M_nHLS := fused.scan_mixing(cum, scores_nGLS, mask_nLS)) is None:
                decay_nHLS = _mixing(cum, scores_nGLS, mask_nLS)
                M_nHLS = _times_group(decay_nHLS, scores_nGLS)
            xdt_nHQP = _scaled_heads(x_nQHP, dt_nQH)
            inside_nHQP = M_nHLS.to(dtype) @ xdt_nHQP
            S_nGXN = S_bkHPN.to(dtype).reshape(n, G, -1, N)
            before_nQHP = (C_nGQN @ S_nGXN.transpose(-1, -2)).transpose(1, 2).reshape(n, Q, H, P)
            inside_nQHP = inside_nHQP.transpose(1, 2)
            torch.addcmul(inside_nQHP, before_nQHP, into[..., None].to(dtype), out=y[rows].view(n, Q, H, P))
            befores.append(before_nQHP)
        ctx.save_for_backward(x, dt, a, Bs, Cs, mask, to_end, from_start, states, *befores)
        ctx.has_start = start is not None
        return y, last

    @staticmethod
    @once_differentiable
    @own_dtypes
    def backward(ctx, dy_all, dlast):
        x, dt, a, Bs, Cs, mask, to_end, from_start, states, *befores = ctx.saved_tensors
        batch, k, Q, H, P = x.shape
        G, N = Bs.shape[-2:]
        dtype, wide = x.dtype, dt.dtype
        dx, dB, dC = x.new_empty(x.shape), Bs.new_empty(Bs.shape), Cs.new_empty(Cs.shape)
        ddt, da = torch.empty_like(dt), torch.empty_like(dt)
        dstart = states.new_empty(batch, H, P, N) if ctx.has_start else None
        for rows, before_nQHP in zip(ctx.blocks, befores, strict=True):
            x_nQHP, dt_nQH, a_nQH = x[rows].flatten(0, 1), dt[rows].flatten(0, 1), a[rows].flatten(0, 1)
            dy_nQHP = dy_all[rows].flatten(0, 1)
            B_nGQN, C_nGQN = (t[rows].flatten(0, 1).transpose(1, 2) for t in (Bs, Cs))
            mask_nLS, ends = _masks_of(mask, to_end, from_start, rows)
            n = x_nQHP.shape[0]
            cum, into, out, through = _decays(a_nQH, mask_nLS, *ends)

            # inside the chunks: y += M xdt, M = decay * scores
            dy_nHQP = dy_nQHP.transpose(1, 2).contiguous()
            xdt_nHQP = _scaled_heads(x_nQHP, dt_nQH)
            dM_nHLS = dy_nHQP @ xdt_nHQP.transpose(-1, -2)
            M_nHLS, dscores, dcum_nQH = _mixing_backward(cum, _scores(cum, B_nGQN, C_nGQN), mask_nLS, dM_nHLS)
            inside_nHQP = M_nHLS.transpose(-1, -2) @ dy_nHQP
            del dM_nHLS, M_nHLS, dy_nHQP, xdt_nHQP

            # from the states: y += into * C S, and the states' own recurrence, backwards
            dyi_nGQX = (dy_nQHP * into[..., None].to(dtype)).view(n, Q, G, -1).transpose(1, 2)
            S_bkHPN = states[rows]
            S_nGXN = S_bkHPN.to(dtype).reshape(n, G, -1, N)
            dC_nGQN = dscores @ B_nGQN + dyi_nGQX @ S_nGXN
            dS_bkHPN = torch.empty_like(S_bkHPN)  # at the end of each chunk
            dS_bkHPN[:, -1] = dlast[rows]
            direct = (dyi_nGQX.transpose(-1, -2) @ C_nGQN).view(-1, k, H, P, N)
            through_bkH11 = through.view(-1, k, H, 1, 1)
            for i in reversed(range(k)):
                earlier = dS_bkHPN[:, i - 1] if i else None if dstart is None else dstart[rows]
                if earlier is not None:
                    torch.addcmul(direct[:, i].to(wide), through_bkH11[:, i], dS_bkHPN[:, i], out=earlier)

            # into the states: S += sum of out * xdt B
            dS_nGXN = dS_bkHPN.to(dtype).reshape(n, G, -1, N)
            xo_nGQX = (x_nQHP * (dt_nQH * out)[..., None].to(dtype)).view(n, Q, G, -1).transpose(1, 2)
            dB_nGQN = dscores.transpose(-1, -2) @ C_nGQN + xo_nGQX @ dS_nGXN
            dxo_nGQX = B_nGQN @ dS_nGXN.transpose(-1, -2)
            ddt_nQH, flow_nQH = _rows_backward(x_nQHP, dy_nQHP, before_nQHP, inside_nHQP, dxo_nGQX, dt_nQH, into, out,
                                               dcum_nQH, dx[rows].view(n, Q, H, P))
            dthrough_nH = (S_bkHPN * dS_bkHPN).sum((-1, -2)).flatten(0, 1)
            dcum_nQH[:, -1] += flow_nQH.sum(1).addcmul_(dthrough_nH, through)

            shape = (-1, k, Q, H)
            ddt[rows] = ddt_nQH.view(shape)
            da[rows] = (mask_nLS.transpose(-1, -2) @ dcum_nQH).view(shape)
            dB[rows] = dB_nGQN.transpose(1, 2).view(-1, k, Q, G, N)
            dC[rows] = dC_nGQN.transpose(1, 2).view(-1, k, Q, G, N)
        return dx, ddt, da, dB, dC, dstart, None, None, None


def _masks_of(mask, to_end, from_start, rows):
    if to_end is None:
        return mask, (None, None)
    return mask[rows].flatten(0, 1), (to_end[rows].flatten(0, 1), from_start[rows].flatten(0, 1))


def _scaled_heads(x_nQHP, dt_nQH):
    """x * dt, heads first, so that products per head need no further copy."""
    n, Q, H, P = x_nQHP.shape
    out = x_nQHP.new_empty(n, H, Q, P)
    return torch.mul(x_nQHP.transpose(1, 2), dt_nQH.transpose(1, 2)[..., None].to(x_nQHP.dtype), out=out)


def scan(x_BTHP: Tensor, dt_BTH: Tensor, A_H: Tensor, B_BTGN: Tensor, C_BTGN: Tensor, *, chunk: int = 64,
         start_BHPN: Tensor | None = None, runs_BT: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The outputs y [B, T, H, P] and the last state [B, H, P, N] of the recurrence above.

    dt_BTH: positive, fp32 (or wider). A_H: negative, the same dtype. H is a multiple of G; head h reads group
    h // (H / G). Any T; products in x's dtype, decays and states in dt's.
    start_BHPN: the state before the first token, zero when absent. runs_BT: document numbers, see above.
    """
    batch, time = x_BTHP.shape[:2]
    chunk = max(1, min(chunk, time))
    pad = -time % chunk
    a_BTH = dt_BTH * A_H
    if pad:  # padded tokens have dt = 0: they add nothing to the state and let it pass undecayed
        x_BTHP, B_BTGN, C_BTGN = (F.pad(t, (0, 0, 0, 0, 0, pad)) for t in (x_BTHP, B_BTGN, C_BTGN))
        dt_BTH, a_BTH = F.pad(dt_BTH, (0, 0, 0, pad)), F.pad(a_BTH, (0, 0, 0, pad))
    k = (time + pad) // chunk
    mask = torch.ones(chunk, chunk, device=dt_BTH.device, dtype=dt_BTH.dtype).tril_()
    to_end = from_start = None
    if runs_BT is not None:
        runs_BT = torch.cat([runs_BT, runs_BT[:, -1:].expand(-1, pad)], 1)
        runs_BkQ = runs_BT.view(batch, k, chunk)
        last_Bk = runs_BkQ[:, :, -1]
        mask = mask * (runs_BkQ[..., :, None] == runs_BkQ[..., None, :])
        to_end = (runs_BkQ == last_Bk[..., None]).to(dt_BTH.dtype)
        from_start = (runs_BkQ == F.pad(last_Bk, (1, 0))[:, :k, None]).to(dt_BTH.dtype)
    x, dt, a, Bs, Cs = (t.unflatten(1, (k, chunk)) for t in (x_BTHP, dt_BTH, a_BTH, B_BTGN, C_BTGN))
    run = ssd_traced.scan if torch.compiler.is_compiling() else _Scan.apply
    y, last_BHPN = run(x, dt, a, Bs, Cs, start_BHPN, mask, to_end, from_start)
    return y.flatten(1, 2)[:, :time], last_BHPN


# --- skip, gate and norm ---


class _GatedNorm(Function):
    @staticmethod
    @own_dtypes
    def forward(ctx, y_BTHP, x_BTHP, D_H, z_BTC, weight_C, groups, eps):
        batch, time, heads, head_dim = y_BTHP.shape
        channels = heads * head_dim
        wide = _wide(y_BTHP.dtype)
        D_C = D_H.to(wide).repeat_interleave(head_dim)
        ctx.groups = groups
        done = fused.gated_norm(y_BTHP.flatten(2), x_BTHP.flatten(2), D_C, z_BTC, weight_C, groups, eps)
        if done is not None:
            out_BTC, rms_BTG = done
            ctx.save_for_backward(y_BTHP, x_BTHP, D_H, z_BTC, weight_C, rms_BTG)
            return out_BTC
        out_BTC = z_BTC.new_empty(batch, time, channels)
        rms_BTG = torch.empty(batch, time, groups, 1, dtype=wide, device=z_BTC.device)  # its inverse
        for rows in _row_blocks(y_BTHP, batch, time * channels):
            x, z = x_BTHP[rows].flatten(2).to(wide), z_BTC[rows].to(wide)
            u = torch.addcmul(y_BTHP[rows].flatten(2).to(wide), x, D_C)
            g = u.mul_(F.silu(z)).unflatten(-1, (groups, -1))
            norm = torch.linalg.vector_norm(g, dim=-1, keepdim=True)
            r = norm.square_().mul_(groups / channels).add_(eps).rsqrt_()
            torch.mul(g.mul_(r).flatten(2), weight_C, out=out_BTC[rows])
            rms_BTG[rows] = r
        ctx.save_for_backward(y_BTHP, x_BTHP, D_H, z_BTC, weight_C, rms_BTG)
        return out_BTC

    @staticmethod
    @once_differentiable
    @own_dtypes
    def backward(ctx, dout_BTC):
        y_BTHP, x_BTHP, D_H, z_BTC, weight_C, rms_BTG = ctx.saved_tensors
        groups = ctx.groups
        batch, time, heads, head_dim = y_BTHP.shape
        channels = heads * head_dim
        wide = _wide(y_BTHP.dtype)
        D_C, w_C = D_H.to(wide).repeat_interleave(head_dim), weight_C.to(wide)
        done = fused.gated_norm_backward(dout_BTC, y_BTHP.flatten(2), x_BTHP.flatten(2), D_C, z_BTC, weight_C, rms_BTG,
                                         groups)
        if done is not None:
            dy, dx, dD_C, dz, dw_C = done
            dD_H = dD_C.view(heads, head_dim).sum(-1)
            return dy.view_as(y_BTHP), dx.view_as(x_BTHP), dD_H, dz, dw_C, None, None
        dy, dx = y_BTHP.new_empty(y_BTHP.shape), x_BTHP.new_empty(x_BTHP.shape)
        dz = z_BTC.new_empty(batch, time, channels)
        dD_C, dw_C = torch.zeros_like(D_C), torch.zeros_like(w_C)
        for rows in _row_blocks(y_BTHP, batch, time * channels):
            x, z, r = x_BTHP[rows].flatten(2).to(wide), z_BTC[rows].to(wide), rms_BTG[rows]
            dout = dout_BTC[rows].to(wide)
            u = torch.addcmul(y_BTHP[rows].flatten(2).to(wide), x, D_C)
            gate = F.silu(z)
            n = (u * gate).unflatten(-1, (groups, -1)).mul_(r).flatten(2)
            t = dout * n
            dw_C += t.sum((0, 1))
            dot = (t * w_C).unflatten(-1, (groups, -1)).sum(-1, keepdim=True).mul_(groups / channels)
            dn = (dout * w_C).unflatten(-1, (groups, -1))
            dg = dn.addcmul_(n.unflatten(-1, (groups, -1)), dot, value=-1).mul_(r).flatten(2)
            dz[rows] = torch.ops.aten.silu_backward.grad_input(u.mul_(dg), z, grad_input=n.view_as(z))
            du = torch.mul(dg, gate, out=gate)
            dy[rows] = du.unflatten(-1, (heads, head_dim))
            dD_C += torch.mul(du, x, out=t).sum((0, 1))
            dx[rows] = du.mul_(D_C).unflatten(-1, (heads, head_dim))
        dD_H = dD_C.view(heads, head_dim).sum(-1).to(D_H.dtype)
        return dy, dx, dD_H, dz, dw_C.to(weight_C.dtype), None, None


def gated_norm(y_BTHP: Tensor, x_BTHP: Tensor, D_H: Tensor, z_BTC: Tensor, weight_C: Tensor, *,
               groups: int = 1, eps: float = 1e-5) -> Tensor:
    """rms_norm((y + D x) * silu(z)) * weight, the mean square taken over each of `groups` parts: [B, T, C],
    C = H * P."""
    run = ssd_traced.gated_norm if torch.compiler.is_compiling() else _GatedNorm.apply
    return run(y_BTHP, x_BTHP, D_H, z_BTC, weight_C, groups, eps)
