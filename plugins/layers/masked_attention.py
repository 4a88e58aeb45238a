"""Causal attention over packed documents, cached text and windows, in memory that grows with the length and not its
square.

torch's own causal kernel knows no documents, and a mask of every query against every key is quadratic, twice: as
booleans and as the numbers that the kernel adds to its scores and keeps for the backward pass. Above `DENSE` tokens
the queries are attended to block by block, each with the keys up to its end, and their scores worked out again in the
backward pass: a third less work all the same, since with a dense mask the half above the diagonal is multiplied too,
and far less where keys are left out that are behind a window, or belong to earlier documents alone (on a CPU, where
looking costs no wait).

Shapes: B batch, T new tokens (queries), S all tokens so far (keys), Q queries of a block, H heads, G key/value heads,
K head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

DENSE = 384  # queries up to which one mask of all is as fast
GPU_DENSE = 4096  # the same there, of compiled code, which makes the mask on the way
BLOCK, LONGEST = 128, 512  # queries of a block: more of them in longer texts, of which there would be very many blocks


class Scores(NamedTuple):
    """What is made of the products of queries and keys."""

    scale: float | None = None
    """their factor; K ** -0.5 by default"""
    softcap: float | None = None
    """softcap * tanh(score / softcap) in their place (Gemma 2, arXiv:2408.00118)"""


PLAIN = Scores()


def masked_attention(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, docs_BS: Tensor | None,
                     window: int | None = None, scores: Scores = PLAIN) -> Tensor:
    """[B, H, T, K]: the queries, which are the last T of S tokens, see what is not after them, with a window no more
    than so many tokens, and with `docs_BS` only those of their own id."""
    kind = q_BHTK.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind) and q_BHTK.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        q_BHTK, k_BGSK, v_BGSK = q_BHTK.to(dtype), k_BGSK.to(dtype), v_BGSK.to(dtype)
    on_gpu = torch.compiler.is_compiling() and kind != "cpu"
    if q_BHTK.shape[2] <= (GPU_DENSE if on_gpu else DENSE):
        first, mask = _mask(docs_BS, window, q_BHTK, k_BGSK, 0, q_BHTK.shape[2])
        return _attention(q_BHTK, k_BGSK[:, :, first:], v_BGSK[:, :, first:], mask, scores)
    if torch.compiler.is_compiling():
        return _blockwise(q_BHTK, k_BGSK, v_BGSK, docs_BS, window, *scores)
    return _Blockwise.apply(q_BHTK, k_BGSK, v_BGSK, docs_BS, window, scores)


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scores: Scores) -> Tensor:
    if scores.softcap is None:
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scores.scale, enable_gqa=k.shape[1] != q.shape[1])
    wide, shared = torch.promote_types(q.dtype, torch.float32), q.shape[1] // k.shape[1]
    # the heads that share a key are rows of one product
    score_BGRS = (q.unflatten(1, (-1, shared)).flatten(2, 3) @ k.mT).to(wide) * _scale(q, scores.scale)
    capped_BGRS = (score_BGRS / scores.softcap).tanh() * scores.softcap
    score_BHQS = capped_BGRS.view(*q.shape[:3], -1).masked_fill(~mask, -torch.inf)
    p_BGRS = score_BHQS.softmax(-1).to(v.dtype).view_as(score_BGRS)
    return (p_BGRS @ v).view(*q.shape[:3], -1)


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def _mask(docs_BS: Tensor | None, window: int | None, q: Tensor, k: Tensor, start: int, end: int) -> tuple[int, Tensor]:
    """The first key that one of the queries `start` to `end` sees, and what they see of the keys from there to the last
    of them: [Q, keys], or with documents [B, 1, Q, keys]."""
    seen = k.shape[2] - q.shape[2]
    first = 0 if window is None else max(0, seen + start - window + 1)
    mask = torch.ones(end - start, seen + end - first, dtype=torch.bool, device=q.device)
    if end - start > 1:
        mask = mask.tril(seen + start - first)
        if window is not None:
            mask = mask.triu(seen + start - first - window + 1)
    if docs_BS is None:
        return first, mask
    own = docs_BS[:, seen + start:seen + end, None] == docs_BS[:, None, first:seen + end]
    return first, (own & mask).unsqueeze(1)


def _blocks(docs_BS: Tensor | None, window: int | None, q: Tensor,
            k: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """(queries, keys, mask) of each block: slices, and what of the mask belongs to them."""
    T, seen = q.shape[2], k.shape[2] - q.shape[2]
    size = min(max(BLOCK, T // 32), LONGEST)
    for start in range(0, T, size):
        end, unseen = min(start + size, T), 0
        first, mask = _mask(docs_BS, window, q, k, start, end)
        if docs_BS is not None and type(docs_BS) is Tensor and docs_BS.is_cpu:
            unseen = int(mask.flatten(0, -2).any(0).to(torch.uint8).argmax())
        yield slice(start, end), slice(first + unseen, seen + end), mask[..., unseen:]


class _With(torch.autograd.Function):
    """A scalar of which y has this gradient. Given to torch.autograd.grad itself, its shape would be checked with the
    compiler's algebra, two seconds to import."""

    @staticmethod
    def forward(ctx, y, grad):
        ctx.save_for_backward(grad)
        return y.new_empty(())

    @staticmethod
    def backward(ctx, _):
        return *ctx.saved_tensors, None


def _room(q: Tensor, v: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """For the output, laid out as the kernels lay it."""
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3], dtype=dtype).transpose(1, 2)


def _all_blocks(q: Tensor, k: Tensor, v: Tensor, docs_BS: Tensor | None, window: int | None,
                scores: Scores) -> Tensor:
    y_BHTK = _room(q, v)
    for queries, keys, mask in _blocks(docs_BS, window, q, k):
        y_BHTK[:, :, queries] = _attention(q[:, :, queries], k[:, :, keys], v[:, :, keys], mask, scores)
    return y_BHTK


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, docs_BS, window, scores):
        ctx.save_for_backward(q, k, v, docs_BS)
        ctx.window, ctx.scores = window, scores
        return _all_blocks(q, k, v, docs_BS, window, scores)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BHTK):
        q, k, v, docs_BS = ctx.saved_tensors
        wide = torch.promote_types(k.dtype, torch.float32)  # sums over blocks
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        for queries, keys, mask in _blocks(docs_BS, ctx.window, q, k):
            parts = [t.detach().requires_grad_() for t in (q[:, :, queries], k[:, :, keys], v[:, :, keys])]
            with torch.enable_grad():
                end = _With.apply(_attention(*parts, mask, ctx.scores), grad_BHTK[:, :, queries])
            own_q, own_k, own_v = torch.autograd.grad(end, parts)
            grad_q[:, :, queries] = own_q
            grad_k[:, :, keys] += own_k
            grad_v[:, :, keys] += own_v
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), None, None, None


# The same as two operators that a compiler takes as they are, since it has no better attention and would write out the
# loop. Inside an operator nothing is differentiated, so that the gradient is written by hand. (In eager PyTorch their
# products would be hidden from whoever counts FLOPs.)
@torch.library.custom_op("tryplicity::blockwise_attention", mutates_args=())
def _blockwise(q: Tensor, k: Tensor, v: Tensor, docs_BS: Tensor | None, window: int | None, scale: float | None,
               softcap: float | None) -> Tensor:
    return _all_blocks(q, k, v, docs_BS, window, Scores(scale, softcap))


@torch.library.custom_op("tryplicity::blockwise_attention_backward", mutates_args=())
def _blockwise_backward(grad_BHTK: Tensor, y_BHTK: Tensor, q: Tensor, k: Tensor, v: Tensor,
                        docs_BS: Tensor | None, window: int | None, scale: float | None,
                        softcap: float | None) -> tuple[Tensor, Tensor, Tensor]:
    (H, G), dtype, wide = (q.shape[1], k.shape[1]), k.dtype, torch.promote_types(k.dtype, torch.float32)
    grad_q, grad_k, grad_v = _room(q, q), _room(k, k, wide).zero_(), _room(v, v, wide).zero_()
    along_BHT1 = (grad_BHTK.to(wide) * y_BHTK.to(wide)).sum(-1, keepdim=True)
    scale = _scale(q, scale)
    for queries, keys, mask in _blocks(docs_BS, window, q, k):
        own_q, own_grad = q[:, :, queries], grad_BHTK[:, :, queries].to(dtype)
        own_k, own_v = (t[:, :, keys].repeat_interleave(H // G, 1) for t in (k, v))
        score = (own_q @ own_k.mT).to(wide).mul_(scale)
        if softcap is not None:
            tanh = score.div_(softcap).tanh_()
            score = tanh * softcap
        p = score.masked_fill_(~mask, -torch.inf).softmax(-1)
        ds = ((own_grad @ own_v.mT).to(wide) - along_BHT1[:, :, queries]).mul_(p).mul_(scale)
        if softcap is not None:
            ds.mul_(tanh.square_().neg_().add_(1))
        ds = ds.to(dtype)
        grad_q[:, :, queries] = ds @ own_k
        grad_k[:, :, keys] += (ds.mT @ own_q).unflatten(1, (G, H // G)).sum(2, dtype=wide)
        grad_v[:, :, keys] += (p.to(dtype).mT @ own_grad).unflatten(1, (G, H // G)).sum(2, dtype=wide)
    return grad_q, grad_k.to(dtype), grad_v.to(dtype)


@_blockwise.register_fake
def _(q, k, v, docs_BS, window, scale, softcap):
    return _room(q, v)


@_blockwise_backward.register_fake
def _(grad_BHTK, y_BHTK, q, k, v, docs_BS, window, scale, softcap):
    return _room(q, q), _room(k, k), _room(v, v)


def _save_for_backward(ctx, inputs, output) -> None:
    *tensors, ctx.window, ctx.scale, ctx.softcap = inputs
    ctx.save_for_backward(output, *tensors)


def _gradients(ctx, grad_BHTK):
    found = _blockwise_backward(grad_BHTK, *ctx.saved_tensors, ctx.window, ctx.scale, ctx.softcap)
    return *found, None, None, None, None


_blockwise.register_autograd(_gradients, setup_context=_save_for_backward)
