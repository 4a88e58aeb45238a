"""The gated delta rule in chunks (Yang, Kautz and Hatamizadeh, arXiv:2412.06464).

Each head of a sequence keeps a state S [K, V] and, token by token, does

    S = exp(g) * S;    S = S + k (beta * (v - k S))^T;    y = q S

so that what the state says of a key is moved towards the value by a share beta. `delta_rule` computes the same in
chunks of Q tokens. Inside a chunk every correction depends on those before it, which is a triangular system of Q
equations (the WY form): solved once, it leaves masked matrix products, and the states at the chunks' borders.

Packed documents, as in `ssd.py`: a foreign token enters every product with a factor that is exactly zero, and no sum of
decays runs across a border. Plain operations, which autograd or a compiler differentiates; products in fp32 or wider.

Shapes: B batch, T time, H heads, K key dim, V value dim, n chunks, Q tokens of a chunk (L as target, S as source).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def delta_rule(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, g_BTH: Tensor, beta_BTH: Tensor, *, chunk: int = 64,
               start_BHKV: Tensor | None = None, runs_BT: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The outputs [B, T, H, V] and the last state [B, H, K, V] of the recurrence above, both in g's dtype.

    g_BTH: log decays, never positive, fp32 or wider. start_BHKV: the state before the first token, zero when absent.
    runs_BT: the documents of a row, 0 being the one the state belongs to.
    """
    with torch.autocast(q_BTHK.device.type, enabled=False):
        return _delta_rule(q_BTHK, k_BTHK, v_BTHV, g_BTH, beta_BTH, chunk, start_BHKV, runs_BT)


def _delta_rule(q, k, v, g_BTH, beta_BTH, chunk, start_BHKV, runs_BT):
    batch, time, heads, _ = q.shape
    wide, chunk = g_BTH.dtype, max(1, min(chunk, time))
    chunks, pad = -(-time // chunk), -time % chunk

    def cut(x_BTHX: Tensor) -> Tensor:  # [B, n, H, Q, X]; padded tokens have beta = 0 and g = 0: they change nothing
        x_BTHX = F.pad(x_BTHX.to(wide), (0, 0, 0, 0, 0, pad))
        return x_BTHX.unflatten(1, (chunks, chunk)).transpose(2, 3)

    q, k, v, beta = cut(q), cut(k), cut(v), cut(beta_BTH[..., None])
    masks = _masks(runs_BT, chunks, chunk, pad, g_BTH)
    mask_nLS, to_end_nQ1, from_start_nQ1 = masks
    cum = mask_nLS @ cut(g_BTH[..., None])  # since each token's document or chunk began
    # within one document the difference is never positive; across documents it is clamped, then made zero
    decay = (cum - cum.transpose(-1, -2)).clamp(max=0).exp() * mask_nLS
    into, out = cum.exp() * from_start_nQ1, (cum[..., -1:, :] - cum).clamp(max=0).exp() * to_end_nQ1
    through = into[..., -1:, :]

    system = (k * beta) @ k.transpose(-1, -2) * decay
    both = torch.linalg.solve_triangular(system, torch.cat([v * beta, k * (beta * into)], -1), upper=False,
                                         unitriangular=True)
    new, seen = both.split([v.shape[-1], k.shape[-1]], -1)  # corrections; what of them the first state answers for
    inside = q @ k.transpose(-1, -2) * decay
    q_into, k_out = q * into, (k * out).transpose(-1, -2)

    state = q.new_zeros(batch, heads, k.shape[-1], v.shape[-1]) if start_BHKV is None else start_BHKV.to(wide)
    outputs = []
    for i in range(chunks):
        corrections = new[:, i] - seen[:, i] @ state
        outputs.append(q_into[:, i] @ state + inside[:, i] @ corrections)
        state = state * through[:, i] + k_out[:, i] @ corrections
    y_BTHV = torch.stack(outputs, 1).transpose(2, 3).flatten(1, 2)[:, :time]
    return y_BTHV, state


def _masks(runs_BT: Tensor | None, chunks: int, chunk: int, pad: int, like: Tensor) -> tuple[Tensor, ...]:
    """1 where a token sees another [.., L, S], reaches the chunk's end, comes from its first state [.., Q, 1]; with
    dimensions for batch, chunks and heads."""
    causal = torch.ones(chunk, chunk, device=like.device, dtype=like.dtype).tril()
    if runs_BT is None:
        return causal, causal[-1:].T, causal[:, :1]
    runs_BnQ = torch.cat([runs_BT, runs_BT[:, -1:].expand(-1, pad)], 1).unflatten(1, (chunks, chunk))
    before_Bn1 = F.pad(runs_BnQ[:, :, -1], (1, 0))[:, :-1, None]
    same = (runs_BnQ[..., :, None] == runs_BnQ[..., None, :]).to(like.dtype) * causal
    to_end, from_start = ((runs_BnQ == other).to(like.dtype) for other in (runs_BnQ[:, :, -1:], before_Bn1))
    return same[:, :, None], to_end[:, :, None, :, None], from_start[:, :, None, :, None]
