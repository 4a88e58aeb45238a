"""Kernels of the state-space dual form, forward: what `triton_ssd` launches.

A chunk of Q tokens is worked on in tiles of `TILE` of them. All that a program does with decays and sums is in fp32;
the two sides of a product are in `DOT`: the inputs' own dtype on a card, fp32 in Triton's interpreter.

Packed documents: `runs` numbers them, and the incoming state belongs to run 0. What is foreign enters no sum of decays
and meets every product as an exact zero.

Layout: x, y [B, T, H, P]; B, C [B, T, G, N]; sums (of log decays since the chunk or the document began), steps
[B, H, T]; scores [B, k, G, Q, Q]; states [B, k, H, P, N]. Only batch and time may lie otherwise in x, B and C: their
strides are `x_b`, `x_t` and so on. Grids: chunks and their tiles, heads or groups, batch.

Shapes: B batch, T time, H heads, P head dim, G groups, N state, k chunks, Q tokens of a chunk (L as target, S as
source).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_within(sum_a, begins_a, sum_b, begins_b):
    """Of a scan: a sum that starts anew wherever `begins` is 1."""
    return tl.where(begins_b != 0, sum_b, sum_a + sum_b), begins_a | begins_b


@triton.jit
def within(values, begins, HAS_RUNS: tl.constexpr):
    """The sum of a document's values up to each token. No other document's enter it, not even as zeros."""
    if HAS_RUNS:
        values, _ = tl.associative_scan((values, begins), 0, add_within)
    else:
        values = tl.cumsum(values, 0)
    return values


@triton.jit
def run_before(runs, row, start, HAS_RUNS: tl.constexpr):
    """The document that the state at the chunk's start belongs to."""
    run = 0
    if HAS_RUNS:
        run = tl.load(runs + row + start - 1, mask=start > 0, other=0).to(tl.int32)
    return run


@triton.jit
def run_at(runs, row, t, valid, HAS_RUNS: tl.constexpr):
    run = tl.zeros_like(t)
    if HAS_RUNS:
        run = tl.load(runs + row + t, mask=valid, other=-1).to(tl.int32)
    return run


@triton.jit
def decay_between(later, earlier):
    """Within one document the difference of two sums is never positive; across documents what comes out meets a zero.
    Not `minimum`, which would make a number of a NaN."""
    difference = later - earlier
    return tl.exp(tl.where(difference > 0.0, 0.0, difference))


@triton.jit
def from_start(sums, runs, row, t, valid, start, HAS_RUNS: tl.constexpr):
    """The decay from the chunk's first state to each token."""
    alive = valid
    if HAS_RUNS:
        alive = alive & (run_at(runs, row, t, valid, HAS_RUNS) == run_before(runs, row, start, HAS_RUNS))
    return tl.where(alive, tl.exp(tl.load(sums + t, mask=valid, other=0.0)), 0.0)


@triton.jit
def to_end(sums, runs, row, t, valid, last, HAS_RUNS: tl.constexpr):
    """The decay from each token to the chunk's last state; `last` is the chunk's last token."""
    alive = valid
    if HAS_RUNS:
        alive = alive & (run_at(runs, row, t, valid, HAS_RUNS) == tl.load(runs + row + last).to(tl.int32))
    return tl.where(alive, decay_between(tl.load(sums + last), tl.load(sums + t, mask=valid, other=0.0)), 0.0)


@triton.jit
def through(sums, runs, row, start, last, HAS_RUNS: tl.constexpr):
    """The decay from the chunk's first state to its last."""
    decay = tl.exp(tl.load(sums + last))
    if HAS_RUNS:
        alive = tl.load(runs + row + last).to(tl.int32) == run_before(runs, row, start, HAS_RUNS)
        decay = tl.where(alive, decay, 0.0)
    return decay


@triton.jit
def sums_kernel(a, dt, runs, sums, steps, T, H, Q: tl.constexpr, HAS_RUNS: tl.constexpr):
    """Sums of the log decays a [B, T, H] since the chunk or the document began, and dt heads first."""
    chunk, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    t = chunk * Q + tl.arange(0, Q)
    valid = t < T
    values = tl.load(a + (b * T + t) * H + h, mask=valid, other=0.0)
    begins = tl.zeros([Q], tl.int32)
    if HAS_RUNS:
        run = run_at(runs, b * T, t, valid, HAS_RUNS)
        begins = (run != tl.load(runs + b * T + t - 1, mask=valid & (t > 0), other=-1).to(tl.int32)).to(tl.int32)
    tl.store(sums + (b * H + h) * T + t, within(values, begins, HAS_RUNS), mask=valid)
    tl.store(steps + (b * H + h) * T + t, tl.load(dt + (b * T + t) * H + h, mask=valid, other=0.0), mask=valid)


@triton.jit
def scores_kernel(B, C, runs, scores, T, G, N, B_b, B_t, C_b, C_t, Q: tl.constexpr, TILE: tl.constexpr,
                  N_TILE: tl.constexpr, HAS_RUNS: tl.constexpr, DOT: tl.constexpr):
    """C B^T of a chunk, once per group: zero above the diagonal and across documents. Tiles above the diagonal stay
    unwritten, and nobody reads them."""
    tiles: tl.constexpr = Q // TILE
    chunk, tile = tl.program_id(0) // (tiles * tiles), tl.program_id(0) % (tiles * tiles)
    g, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    first_L, first_S = tile // tiles * TILE, tile % tiles * TILE
    if first_S <= first_L:
        q_L, q_S, n = first_L + tl.arange(0, TILE), first_S + tl.arange(0, TILE), tl.arange(0, N_TILE)
        t_L, t_S = chunk * Q + q_L, chunk * Q + q_S
        product = tl.zeros([TILE, TILE], tl.float32)
        for n0 in range(0, N, N_TILE):
            inside = n0 + n < N
            C_LN = tl.load(C + b * C_b + t_L[:, None].to(tl.int64) * C_t + g * N + n0 + n[None, :],
                           mask=(t_L < T)[:, None] & inside[None, :], other=0.0)
            B_NS = tl.load(B + b * B_b + t_S[None, :].to(tl.int64) * B_t + g * N + n0 + n[:, None],
                           mask=(t_S < T)[None, :] & inside[:, None], other=0.0)
            product += tl.dot(C_LN.to(DOT), B_NS.to(DOT), input_precision="ieee")
        same = q_L[:, None] >= q_S[None, :]
        if HAS_RUNS:
            same = same & (run_at(runs, b * T, t_L, t_L < T, HAS_RUNS)[:, None]
                           == run_at(runs, b * T, t_S, t_S < T, HAS_RUNS)[None, :])
        place = (b * (tl.num_programs(0) // (tiles * tiles)) + chunk) * G + g
        tl.store(scores + (place * Q + q_L[:, None]) * Q + q_S[None, :], tl.where(same, product, 0.0))


@triton.jit
def outer_kernel(u, v, sums, steps, runs, states, T, H, P, G, N, u_b, u_t, v_b, v_t, Q: tl.constexpr,
                 TILE: tl.constexpr, P_TILE: tl.constexpr, N_TILE: tl.constexpr, TO_END: tl.constexpr,
                 HAS_RUNS: tl.constexpr, DOT: tl.constexpr):
    """states[P, N] of each chunk: the sum over its tokens of factor * u[P] v[N].

    TO_END: u = x, v = B and factor = dt * the decay to the chunk's end: what the chunk adds to the state. Otherwise u =
    dy, v = C and factor = the decay from the chunk's start: the gradient of the first state, as the chunk alone has it.
    """
    n_tiles = tl.cdiv(N, N_TILE)
    chunk, n = tl.program_id(0) // n_tiles, tl.program_id(0) % n_tiles * N_TILE + tl.arange(0, N_TILE)
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    g, p = h // (H // G), tl.arange(0, P_TILE)
    start = chunk * Q
    last = tl.minimum(start + Q, T) - 1
    sums += (b * H + h) * T
    steps += (b * H + h) * T
    total = tl.zeros([P_TILE, N_TILE], tl.float32)
    for first in range(start, last + 1, TILE):
        t = first + tl.arange(0, TILE)
        valid = t <= last
        if TO_END:
            factor = to_end(sums, runs, b * T, t, valid, last, HAS_RUNS) * tl.load(steps + t, mask=valid, other=0.0)
        else:
            factor = from_start(sums, runs, b * T, t, valid, start, HAS_RUNS)
        t64 = t.to(tl.int64)
        u_PT = tl.load(u + b * u_b + t64[None, :] * u_t + h * P + p[:, None], mask=valid[None, :] & (p < P)[:, None],
                       other=0.0)
        v_TN = tl.load(v + b * v_b + t64[:, None] * v_t + g * N + n[None, :], mask=valid[:, None] & (n < N)[None, :],
                       other=0.0)
        total += tl.dot((u_PT * factor[None, :]).to(DOT), v_TN.to(DOT), input_precision="ieee")
    place = ((b * (tl.num_programs(0) // n_tiles) + chunk) * H + h) * P
    tl.store(states + (place + p[:, None]) * N + n[None, :], total, mask=(p < P)[:, None] & (n < N)[None, :])


@triton.jit
def pass_kernel(states, start_state, last_state, sums, runs, T, H, SIZE, chunks, Q: tl.constexpr,
                BLOCK: tl.constexpr, HAS_START: tl.constexpr, HAS_RUNS: tl.constexpr):
    """What each chunk adds becomes the state at its start, from chunk to chunk; SIZE = P * N."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    inside = i < SIZE
    sums += (b * H + h) * T
    state = tl.zeros([BLOCK], tl.float32)
    if HAS_START:
        state = tl.load(start_state + (b * H + h) * SIZE + i, mask=inside, other=0.0)
    for chunk in range(0, chunks):
        here = states + ((b * chunks + chunk) * H + h) * SIZE + i
        added = tl.load(here, mask=inside, other=0.0)
        tl.store(here, state, mask=inside)
        decay = through(sums, runs, b * T, chunk * Q, tl.minimum((chunk + 1) * Q, T) - 1, HAS_RUNS)
        state = tl.where(decay == 0.0, 0.0, decay * state) + added
    tl.store(last_state + (b * H + h) * SIZE + i, state, mask=inside)


@triton.jit
def output_kernel(x, C, scores, sums, steps, runs, states, y, T, H, P, G, N, x_b, x_t, C_b, C_t, Q: tl.constexpr,
                  TILE: tl.constexpr, P_TILE: tl.constexpr, N_TILE: tl.constexpr, HAS_RUNS: tl.constexpr,
                  DOT: tl.constexpr):
    """y = decay from the start * C S + sum over earlier tokens of scores * decay * dt * x."""
    tiles: tl.constexpr = Q // TILE
    chunk, first = tl.program_id(0) // tiles, tl.program_id(0) % tiles * TILE
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    chunks = tl.num_programs(0) // tiles
    g, p, n = h // (H // G), tl.arange(0, P_TILE), tl.arange(0, N_TILE)
    start = chunk * Q
    q_L = first + tl.arange(0, TILE)
    t_L = start + q_L
    valid_L = t_L < T
    sums += (b * H + h) * T
    steps += (b * H + h) * T
    states += ((b * chunks + chunk) * H + h) * P * N
    scores += ((b * chunks + chunk) * G + g) * Q * Q
    total = tl.zeros([TILE, P_TILE], tl.float32)
    for n0 in range(0, N, N_TILE):
        inside = n0 + n < N
        C_LN = tl.load(C + b * C_b + t_L[:, None].to(tl.int64) * C_t + g * N + n0 + n[None, :],
                       mask=valid_L[:, None] & inside[None, :], other=0.0)
        S_NP = tl.load(states + p[None, :] * N + n0 + n[:, None], mask=inside[:, None] & (p < P)[None, :], other=0.0)
        total += tl.dot(C_LN.to(DOT), S_NP.to(DOT), input_precision="ieee")
    total *= from_start(sums, runs, b * T, t_L, valid_L, start, HAS_RUNS)[:, None]
    sums_L = tl.load(sums + t_L, mask=valid_L, other=0.0)
    for first_S in range(0, first + TILE, TILE):
        q_S = first_S + tl.arange(0, TILE)
        t_S = start + q_S
        valid_S = t_S < T
        decay = decay_between(sums_L[:, None], tl.load(sums + t_S, mask=valid_S, other=0.0)[None, :])
        mixing = tl.load(scores + q_L[:, None] * Q + q_S[None, :]) * decay
        mixing *= tl.load(steps + t_S, mask=valid_S, other=0.0)[None, :]
        x_SP = tl.load(x + b * x_b + t_S[:, None].to(tl.int64) * x_t + h * P + p[None, :],
                       mask=valid_S[:, None] & (p < P)[None, :], other=0.0)
        total += tl.dot(mixing.to(DOT), x_SP.to(DOT), input_precision="ieee")
    tl.store(y + ((b * T + t_L[:, None]) * H + h) * P + p[None, :], total, mask=valid_L[:, None] & (p < P)[None, :])
