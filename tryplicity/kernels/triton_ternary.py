"""The products of few tokens in Triton, on a card: what decoding does. The same numbers as the C++, to the last bit.

Tokens are quantised in one kernel and multiplied in another, which reads the planes as they lie, 2 bits a weight, and
adds int8 times digit in int32. Chosen experts are named by ids that only the kernel reads, so that nothing waits for
the device, and a CUDA graph of a step holds whatever is chosen later. The few steps in floating point are those of the
C++, each rounded by itself (no fused multiply-add).

Importing this module imports triton: only `cards` does, where it may.

Shapes: N tokens, O out, D in (P padded to whole blocks), E experts, S pairs of a token and an expert.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tryplicity.kernels import plain
from tryplicity.kernels.trying import on_its_device

COLUMNS, LANE, ROWS = (tl.constexpr(size) for size in (plain.COLUMNS, plain.LANE, plain.ROWS))
NORM_EPS, INPUT_FLOOR = tl.constexpr(plain.NORM_EPS), tl.constexpr(plain.INPUT_FLOOR)
TO_WHOLE = tl.constexpr(1.5 * 2**23)  # added to a small fp32 number it leaves no room for a fraction: half to even
ROWS_AT_ONCE, BYTES_AT_ONCE = 16, 128  # of a matrix, by one program
TOKENS_AT_ONCE = 16  # by one program, as wide as the narrowest product of a tensor core
EXACTLY = {"enable_fp_fusion": False}


@triton.jit
def quantise_kernel(x, q, step, total, D, PADDED, BLOCK: tl.constexpr):
    """A token: divided by its rms, then in 127 steps either way up to its absmax."""
    n, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    squares, most = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float32)
    for first in range(0, D, BLOCK):
        value = tl.load(x + n * D + first + i, mask=first + i < D, other=0.0).to(tl.float32)
        wide = value.to(tl.float64)
        squares += wide * wide
        most = tl.maximum(most, tl.abs(value))
    mean = (tl.sum(squares, 0) / D.to(tl.float64)).to(tl.float32)
    rstd = (1.0 / tl.sqrt((mean + NORM_EPS).to(tl.float64))).to(tl.float32)
    size = tl.max(most, 0) * rstd
    size = tl.where(size < INPUT_FLOOR, INPUT_FLOOR, size)  # a NaN stays one
    steps = tl.div_rn(size, tl.zeros_like(size) + 127.0)
    factor = tl.div_rn(rstd, steps)
    sums = tl.zeros([BLOCK], tl.int32)
    for first in range(0, PADDED, BLOCK):
        value = tl.load(x + n * D + first + i, mask=first + i < D, other=0.0).to(tl.float32)
        whole = (value * factor + TO_WHOLE) - TO_WHOLE
        whole = tl.where((whole >= -127.0) & (whole <= 127.0), whole, -128.0)
        whole = tl.where(first + i < D, whole, 0.0)
        sums += whole.to(tl.int32)
        tl.store(q + n * PADDED + first + i, whole.to(tl.int8), mask=first + i < PADDED)
    tl.store(step + n, steps)
    tl.store(total + n, tl.sum(sums, 0))


@triton.jit
def bytes_of(planes, o, OUT, first, BLOCKS, BYTES: tl.constexpr):
    """BYTES bytes of each row o, from block `first` on: of four columns each, LANE apart."""
    byte = tl.arange(0, BYTES)
    block = first + byte // LANE
    row = planes + (o // ROWS).to(tl.int64) * BLOCKS * (ROWS * LANE) + o % ROWS * LANE
    place = row[:, None] + block[None, :] * (ROWS * LANE) + (byte % LANE)[None, :]
    return tl.load(place, mask=(o < OUT)[:, None] & (block < BLOCKS)[None, :], other=0)


@triton.jit
def row_kernel(q, step, total, planes, scale, bias, token, expert, y, OUT, GROUPS, BLOCKS, TOKENS, EXPERTS,
               AT_ONCE: tl.constexpr, BYTES: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_TOKEN: tl.constexpr,
               HAS_EXPERT: tl.constexpr):
    """Of one pair: AT_ONCE numbers of y [S, O]. An expert or a token that is not there makes zeros."""
    o, pair = tl.program_id(0) * AT_ONCE + tl.arange(0, AT_ONCE), tl.program_id(1)
    n, e = pair.to(tl.int64), tl.zeros([], tl.int64)
    if HAS_TOKEN:
        n = tl.load(token + pair).to(tl.int64)
    if HAS_EXPERT:
        e = tl.load(expert + pair).to(tl.int64)
    there = (n >= 0) & (n < TOKENS) & (e >= 0) & (e < EXPERTS)
    n, e = tl.where(there, n, 0), tl.where(there, e, 0)
    byte = tl.arange(0, BYTES)
    sums = tl.zeros([AT_ONCE, BYTES], tl.int32)
    for first in range(0, tl.where(there, BLOCKS, 0), BYTES // LANE):
        packed = bytes_of(planes + e * GROUPS * BLOCKS * (ROWS * LANE), o, OUT, first, BLOCKS, BYTES).to(tl.int32)
        block = first + byte // LANE
        column = (n * BLOCKS + block) * COLUMNS + byte % LANE
        for plane in tl.static_range(4):
            tokens = tl.load(q + column + plane * LANE, mask=block < BLOCKS, other=0).to(tl.int32)
            sums += ((packed >> 2 * plane) & 3) * tokens[None, :]
    value = (tl.sum(sums, 1) - tl.load(total + n)).to(tl.float32) * (tl.load(step + n) * tl.load(scale + e))
    if HAS_BIAS:
        value += tl.load(bias + o, mask=o < OUT, other=0.0)
    tl.store(y + pair.to(tl.int64) * OUT + o, tl.where(there, value, 0.0), mask=o < OUT)


@triton.jit
def rows_kernel(q, step, total, planes, scale, bias, y, OUT, BLOCKS, TOKENS, AT_ONCE: tl.constexpr,
                BYTES: tl.constexpr, TOKENS_TILE: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Of up to TOKENS_TILE tokens and a single matrix, which is read once for all of them."""
    o, n = tl.program_id(0) * AT_ONCE + tl.arange(0, AT_ONCE), tl.arange(0, TOKENS_TILE)
    byte = tl.arange(0, BYTES)
    sums = tl.zeros([AT_ONCE, TOKENS_TILE], tl.int32)
    for first in range(0, BLOCKS, BYTES // LANE):
        packed = bytes_of(planes, o, OUT, first, BLOCKS, BYTES)
        block = first + byte // LANE
        column = block[:, None] * COLUMNS + (byte % LANE)[:, None] + n[None, :] * BLOCKS * COLUMNS
        inside = (block < BLOCKS)[:, None] & (n < TOKENS)[None, :]
        for plane in tl.static_range(4):
            tokens = tl.load(q + column + plane * LANE, mask=inside, other=0)
            sums += tl.dot(((packed >> 2 * plane) & 3).to(tl.int8), tokens, out_dtype=tl.int32)
    sums -= tl.load(total + n, mask=n < TOKENS, other=0)[None, :]
    value = sums.to(tl.float32) * (tl.load(step + n, mask=n < TOKENS, other=0.0) * tl.load(scale))[None, :]
    if HAS_BIAS:
        value += tl.load(bias + o, mask=o < OUT, other=0.0)[:, None]
    tl.store(y + n[None, :] * OUT + o[:, None], value, mask=(o < OUT)[:, None] & (n < TOKENS)[None, :])


@triton.jit
def sum_kernel(y, weight, into, out, OUT, PAIRS, BLOCK: tl.constexpr):
    """out[n] += weight[s] * y[s] of all pairs into n, in the order of s."""
    o, n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1)
    inside = o < OUT
    here = out + n.to(tl.int64) * OUT + o
    sums = tl.load(here, mask=inside, other=0.0)
    for s in range(0, PAIRS):
        ours = tl.load(into + s) == n
        mask = tl.where(ours, inside, False)  # not `inside & ours`: Triton 3.9's interpreter makes a number of that
        product = tl.load(weight + s) * tl.load(y + s * OUT + o, mask=mask, other=0.0)
        sums = tl.where(ours, sums + product, sums)
    tl.store(here, sums, mask=inside)


@torch.library.custom_op("tryplicity::ternary_quantise", mutates_args=())
@on_its_device
def ternary_quantise(x: Tensor, padded: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `plain.quantise`: (q int8 [N, P], step fp32 [N], sum of q int32 [N]) of x [N, D] of any dtype."""
    q, step, total = _quantised_like(x, padded)
    block = min(1024, triton.next_power_of_2(padded))
    quantise_kernel[(len(x),)](x.contiguous(), q, step, total, x.shape[1], padded, BLOCK=block, **EXACTLY)
    return q, step, total


@ternary_quantise.register_fake
def _quantised_like(x, padded):
    return (x.new_empty((len(x), padded), dtype=torch.int8), x.new_empty(len(x), dtype=torch.float32),
            x.new_empty(len(x), dtype=torch.int32))


@torch.library.custom_op("tryplicity::ternary_rows", mutates_args=())
@on_its_device
def ternary_rows(q: Tensor, step: Tensor, total: Tensor, planes: Tensor, scale: Tensor, out: int,
                 bias: Tensor | None, token: Tensor | None, expert: Tensor | None) -> Tensor:
    """fp32 [S, O]: quantised token token[s] (None: s) by matrix expert[s] (None: the only one), and the bias."""
    pairs = len(q) if token is None else len(token)
    y = q.new_empty((pairs, out), dtype=torch.float32)
    _, groups, blocks = planes.shape[:3]
    tiles = triton.cdiv(out, ROWS_AT_ONCE)
    sizes = {"AT_ONCE": ROWS_AT_ONCE, "BYTES": BYTES_AT_ONCE, "HAS_BIAS": bias is not None, **EXACTLY}
    if 1 < pairs <= TOKENS_AT_ONCE and token is None and expert is None:
        rows_kernel[(tiles,)](q, step, total, planes, scale, bias, y, out, blocks, pairs, TOKENS_TILE=TOKENS_AT_ONCE,
                              **sizes)
    else:
        row_kernel[tiles, pairs](q, step, total, planes, scale, bias, token, expert, y, out, groups, blocks, len(q),
                                 len(planes), HAS_TOKEN=token is not None, HAS_EXPERT=expert is not None, **sizes)
    return y


@ternary_rows.register_fake
def _(q, step, total, planes, scale, out, bias, token, expert):
    return q.new_empty((len(q) if token is None else len(token), out), dtype=torch.float32)


@torch.library.custom_op("tryplicity::add_weighted_rows", mutates_args=("out",))
@on_its_device
def add_weighted_rows(out: Tensor, y: Tensor, weight: Tensor, into: Tensor) -> None:
    """out[into[s]] += weight[s] * y[s], in the order of s; out contiguous fp32 [N, O], y and weight fp32."""
    if out.numel():
        sum_kernel[triton.cdiv(y.shape[1], 256), len(out)](y.contiguous(), weight.contiguous(), into.contiguous(), out,
                                                           y.shape[1], len(y), BLOCK=256, **EXACTLY)


@add_weighted_rows.register_fake
def _(out, y, weight, into):
    return None


def linear(x_ND: Tensor, planes_EGB: Tensor, scale_E: Tensor, out: int, bias: Tensor | None) -> Tensor:
    """As `plain.linear`."""
    quantised = ternary_quantise(x_ND, planes_EGB.shape[2] * plain.COLUMNS)
    return ternary_rows(*quantised, planes_EGB, scale_E, out, bias, None, None)


def experts(x_ND: Tensor, planes_EGB: Tensor, scale_E: Tensor, out: int, row_S: Tensor | None,
            expert_S: Tensor) -> Tensor:
    """As `plain.experts`; a pair whose expert or token is not there gives zeros."""
    quantised = ternary_quantise(x_ND, planes_EGB.shape[2] * plain.COLUMNS)
    return ternary_rows(*quantised, planes_EGB, scale_E, out, None, row_S, expert_S)
