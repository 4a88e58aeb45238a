"""The two elementwise stages and the scan of `ssd.py` in plain operations, for a compiler to fuse and differentiate.

The same values and gradients to rounding; `ssd.py` says what each computes, and chooses. Here the states at the
chunks' borders are one product with the decays from each chunk to each later one, in place of a loop over chunks that
a compiler would write out.

Shapes: as in `ssd.py`; b the whole batch, n = b * k.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tryplicity_plugins.layers.recurrent import causal_conv


def conv_silu(x_BTC: Tensor, weight_WC: Tensor, bias_C: Tensor, same_BWT: Tensor | None, lead: int,
              sizes: list[int]) -> tuple[Tensor, ...]:
    return F.silu(causal_conv(x_BTC, weight_WC, bias_C, lead, same_BWT)).to(x_BTC.dtype).split(sizes, -1)


def gated_norm(y_BTHP: Tensor, x_BTHP: Tensor, D_H: Tensor, z_BTC: Tensor, weight_C: Tensor, groups: int,
               eps: float) -> Tensor:
    wide = torch.promote_types(y_BTHP.dtype, torch.float32)
    u_BTC = (y_BTHP.to(wide) + x_BTHP.to(wide) * D_H.to(wide)[:, None]).flatten(2)
    g_BTGX = (u_BTC * F.silu(z_BTC.to(wide))).unflatten(-1, (groups, -1))
    rstd_BTG1 = (g_BTGX.square().mean(-1, keepdim=True) + eps).rsqrt()
    return ((g_BTGX * rstd_BTG1).flatten(2) * weight_C.to(wide)).to(z_BTC.dtype)


def _between(through_bkH: Tensor, whole_bk: Tensor | None) -> Tensor:
    """The factor of what chunk j adds in the state after chunk i, [b, H, k, k]. through_bkH: log decays of whole
    chunks; whole_bk: 1 where no document begins in the chunk or at its start."""
    k = through_bkH.shape[1]
    log_bHkj = through_bkH.transpose(1, 2)[..., None].expand(-1, -1, -1, k)
    lower_kj = torch.ones(k, k, dtype=torch.bool, device=through_bkH.device).tril()
    # sums from j + 1 on, each by itself: a difference of two sums over the whole text would round
    sums_bHkj = log_bHkj.where(lower_kj.tril(-1), 0).cumsum(-2)
    factor_bHkj = sums_bHkj.exp() * lower_kj
    if whole_bk is not None:  # nothing passes a chunk in which a document ends
        ends_bk = (1 - whole_bk).cumsum(-1)
        factor_bHkj = factor_bHkj * (ends_bk[:, :, None] == ends_bk[:, None, :])[:, None]
    return factor_bHkj


def scan(x: Tensor, dt: Tensor, a: Tensor, Bs: Tensor, Cs: Tensor, start: Tensor | None, mask: Tensor,
         to_end: Tensor | None, from_start: Tensor | None) -> tuple[Tensor, Tensor]:
    """As `_Scan` of ssd.py: x [B, k, Q, H, P]; dt and a [B, k, Q, H]; B and C [B, k, Q, G, N]; start [B, H, P, N]."""
    with torch.autocast(x.device.type, enabled=False):
        return _scan(x, dt, a, Bs, Cs, start, mask, to_end, from_start)


def _scan(x, dt, a, Bs, Cs, start, mask, to_end, from_start):
    batch, k, Q, H, P = x.shape
    G, N = Bs.shape[-2:]
    dtype, wide = x.dtype, dt.dtype
    B_bkGQN, C_bkGQN = Bs.transpose(2, 3), Cs.transpose(2, 3)
    cum_bkQH = mask @ a  # since each token's document or chunk began
    into_bkQH = cum_bkQH.exp()
    # within one document the difference is never positive; across documents it is clamped, then made zero
    out_bkQH = (cum_bkQH[:, :, -1:] - cum_bkQH).clamp(max=0).exp()
    if to_end is not None:
        into_bkQH, out_bkQH = into_bkQH * from_start[..., None], out_bkQH * to_end[..., None]

    xo_bkQHP = x * (dt * out_bkQH)[..., None].to(dtype)
    added = xo_bkQHP.view(batch, k, Q, G, -1).permute(0, 1, 3, 4, 2) @ B_bkGQN  # [b, k, G, R * P, N]
    added_bHkX = added.to(wide).reshape(batch, k, H, P * N).transpose(1, 2)
    if start is not None:  # as what a chunk before the first added
        added_bHkX = torch.cat([start.to(wide).view(batch, H, 1, P * N), added_bHkX], 2)
    log_bkH, whole_bk = cum_bkQH[:, :, -1], None if from_start is None else from_start[:, :, -1]
    if start is not None:
        log_bkH, whole_bk = F.pad(log_bkH, (0, 0, 1, 0)), None if whole_bk is None else F.pad(whole_bk, (1, 0), value=1)
    after_bHkX = _between(log_bkH, whole_bk) @ added_bHkX  # the states after each chunk
    if start is None:
        after_bHkX = F.pad(after_bHkX, (0, 0, 1, 0))
    S_bkGXN = after_bHkX[:, :, :k].transpose(1, 2).to(dtype).reshape(batch, k, G, -1, N)
    last_bHPN = after_bHkX[:, :, k].view(batch, H, P, N)

    cum_bkHQ = cum_bkQH.transpose(2, 3)
    decay_bkHLS = (cum_bkHQ[..., :, None] - cum_bkHQ[..., None, :]).clamp(max=0).exp()
    scores_bkGLS = (C_bkGQN @ B_bkGQN.transpose(-1, -2)).to(wide) * (mask if mask.dim() == 2 else mask[:, :, None])
    M_bkHLS = (decay_bkHLS.unflatten(2, (G, -1)) * scores_bkGLS[:, :, :, None]).flatten(2, 3).to(dtype)
    xdt_bkHQP = (x * dt[..., None].to(dtype)).transpose(2, 3)
    inside_bkQHP = (M_bkHLS @ xdt_bkHQP).transpose(2, 3)
    before_bkQHP = (C_bkGQN @ S_bkGXN.transpose(-1, -2)).transpose(2, 3).reshape(batch, k, Q, H, P)
    return inside_bkQHP + before_bkQHP * into_bkQH[..., None].to(dtype), last_bHPN
