"""Kernels of the state-space dual form, backward; see `triton_ssd_forward` for how they are laid out.

A sum of log decays at a token carries the gradient of all that flowed over it: into the chunk's tokens from its first
state (`read`), out of them into its last state (`written`), and from token to token (`given` by the later, `taken` from
the earlier). The last two come from one product in fp32, so that they cancel where they should.
No sum is atomic: the same gradients come out each time, and one document's hold no bit of another's.

Further layout: gradients of the scores as the scores; read, written [B, H, T]; given, taken [B, H, tiles of a chunk,
T]; the gradient of the decay through a chunk [B, H, k, blocks of a state].
"""

from __future__ import annotations

import triton
import triton.language as tl

from tryplicity_plugins.layers.triton_ssd_forward import (
    decay_between,
    from_start,
    run_at,
    through,
    to_end,
    within,
)


@triton.jit
def pass_back_kernel(dstates, states, dlast, dstart, dthrough, sums, runs, T, H, SIZE, chunks, Q: tl.constexpr,
                     BLOCK: tl.constexpr, HAS_LAST: tl.constexpr, HAS_RUNS: tl.constexpr):
    """From chunk to chunk, backwards: what each chunk alone says of its first state becomes the gradient of its last
    state. SIZE = P * N."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    inside = i < SIZE
    sums += (b * H + h) * T
    gradient = tl.zeros([BLOCK], tl.float32)
    if HAS_LAST:
        gradient = tl.load(dlast + (b * H + h) * SIZE + i, mask=inside, other=0.0)
    for back in range(0, chunks):
        chunk = chunks - 1 - back
        place = ((b * chunks + chunk) * H + h) * SIZE + i
        alone = tl.load(dstates + place, mask=inside, other=0.0)
        state = tl.load(states + place, mask=inside, other=0.0)
        tl.store(dstates + place, gradient, mask=inside)
        decay = through(sums, runs, b * T, chunk * Q, tl.minimum((chunk + 1) * Q, T) - 1, HAS_RUNS)
        gradient = tl.where(decay == 0.0, 0.0, decay * gradient)
        flow = tl.sum(state * gradient, 0)  # with the decay already in it
        tl.store(dthrough + ((b * H + h) * chunks + chunk) * tl.num_programs(0) + tl.program_id(0), flow)
        gradient += alone
    tl.store(dstart + (b * H + h) * SIZE + i, gradient, mask=inside)


@triton.jit
def dscores_kernel(dy, x, scores, dscores, given, taken, sums, steps, runs, T, H, P, G, x_b, x_t, Q: tl.constexpr,
                   TILE: tl.constexpr, P_TILE: tl.constexpr, HAS_RUNS: tl.constexpr, DOT: tl.constexpr):
    """The gradient of the scores, summed over a group's heads, and of the decay between tokens, summed over either."""
    tiles: tl.constexpr = Q // TILE
    chunk, tile = tl.program_id(0) // (tiles * tiles), tl.program_id(0) % (tiles * tiles)
    chunks = tl.num_programs(0) // (tiles * tiles)
    g, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    tile_L, tile_S = tile // tiles, tile % tiles
    if tile_S <= tile_L:
        p = tl.arange(0, P_TILE)
        q_L, q_S = tile_L * TILE + tl.arange(0, TILE), tile_S * TILE + tl.arange(0, TILE)
        t_L, t_S = chunk * Q + q_L, chunk * Q + q_S
        valid_L, valid_S = t_L < T, t_S < T
        same = q_L[:, None] >= q_S[None, :]
        if HAS_RUNS:
            same = same & (run_at(runs, b * T, t_L, valid_L, HAS_RUNS)[:, None]
                           == run_at(runs, b * T, t_S, valid_S, HAS_RUNS)[None, :])
        earlier = same & (q_L[:, None] > q_S[None, :])  # there is no decay from a token to itself
        place = (((b * chunks + chunk) * G + g) * Q + q_L[:, None]) * Q + q_S[None, :]
        scores_LS = tl.load(scores + place)
        total = tl.zeros([TILE, TILE], tl.float32)
        for h in range(g * (H // G), (g + 1) * (H // G)):
            head = (b * H + h) * T
            dy_LP = tl.load(dy + ((b * T + t_L[:, None]) * H + h) * P + p[None, :],
                            mask=valid_L[:, None] & (p < P)[None, :], other=0.0)
            x_PS = tl.load(x + b * x_b + t_S[None, :].to(tl.int64) * x_t + h * P + p[:, None],
                           mask=valid_S[None, :] & (p < P)[:, None], other=0.0)
            decay = decay_between(tl.load(sums + head + t_L, mask=valid_L, other=0.0)[:, None],
                                  tl.load(sums + head + t_S, mask=valid_S, other=0.0)[None, :])
            decay *= tl.load(steps + head + t_S, mask=valid_S, other=0.0)[None, :]
            product = tl.dot(dy_LP.to(DOT), x_PS.to(DOT), input_precision="ieee") * decay
            total += tl.where(same, product, 0.0)
            flow = tl.where(earlier, product * scores_LS, 0.0)
            tl.store(given + (b * H + h) * tiles * T + tile_S * T + t_L, tl.sum(flow, 1), mask=valid_L)
            tl.store(taken + (b * H + h) * tiles * T + tile_L * T + t_S, tl.sum(flow, 0), mask=valid_S)
        tl.store(dscores + place, total)


@triton.jit
def dB_dC_kernel(u, v, other, dscores, states, flow, out, sums, steps, runs, T, H, P, G, N, u_b, u_t, v_b, v_t,
                 other_b, other_t, Q: tl.constexpr, TILE: tl.constexpr, P_TILE: tl.constexpr, N_TILE: tl.constexpr,
                 TO_END: tl.constexpr, HAS_RUNS: tl.constexpr, DOT: tl.constexpr):
    """The gradient of B, TO_END (u = x, v = B, other = C, the states' gradients at the end), or of C (u = dy, v = C,
    other = B, the states at the start), both through the states and through the scores."""
    tiles: tl.constexpr = Q // TILE
    chunk, first = tl.program_id(0) // tiles, tl.program_id(0) % tiles * TILE
    chunks = tl.num_programs(0) // tiles
    g, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    p, n = tl.arange(0, P_TILE), tl.arange(0, N_TILE)
    start = chunk * Q
    last = tl.minimum(start + Q, T) - 1
    q = first + tl.arange(0, TILE)
    t = start + q
    valid = t < T
    t64 = t[:, None].to(tl.int64)
    wide = valid[:, None] & (n < N)[None, :]
    v_TN = tl.load(v + b * v_b + t64 * v_t + g * N + n[None, :], mask=wide, other=0.0).to(tl.float32)
    total = tl.zeros([TILE, N_TILE], tl.float32)
    for h in range(g * (H // G), (g + 1) * (H // G)):
        head = (b * H + h) * T
        if TO_END:
            factor = to_end(sums + head, runs, b * T, t, valid, last, HAS_RUNS)
            factor *= tl.load(steps + head + t, mask=valid, other=0.0)
        else:
            factor = from_start(sums + head, runs, b * T, t, valid, start, HAS_RUNS)
        u_TP = tl.load(u + b * u_b + t64 * u_t + h * P + p[None, :], mask=valid[:, None] & (p < P)[None, :], other=0.0)
        S_PN = tl.load(states + (((b * chunks + chunk) * H + h) * P + p[:, None]) * N + n[None, :],
                       mask=(p < P)[:, None] & (n < N)[None, :], other=0.0)
        product = tl.dot(u_TP.to(DOT), S_PN.to(DOT), input_precision="ieee") * factor[:, None]
        tl.store(flow + head + t, tl.sum(product * v_TN, 1), mask=valid)
        total += product
    dscores += ((b * chunks + chunk) * G + g) * Q * Q
    if TO_END:
        low, high = first, first + Q - first
    else:
        low, high = first - first, first + TILE
    for first_other in range(low, high, TILE):
        q_other = first_other + tl.arange(0, TILE)
        t_other = start + q_other
        if TO_END:  # transposed: from the later tokens to this one
            d_TO = tl.load(dscores + q_other[None, :] * Q + q[:, None])
        else:
            d_TO = tl.load(dscores + q[:, None] * Q + q_other[None, :])
        other_ON = tl.load(other + b * other_b + t_other[:, None].to(tl.int64) * other_t + g * N + n[None, :],
                           mask=(t_other < T)[:, None] & (n < N)[None, :], other=0.0)
        total += tl.dot(d_TO.to(DOT), other_ON.to(DOT), input_precision="ieee")
    tl.store(out + ((b * T + t[:, None]) * G + g) * N + n[None, :], total, mask=wide)


@triton.jit
def dx_kernel(dy, x, B, scores, dstates, dx, ddt, sums, steps, runs, T, H, P, G, N, x_b, x_t, B_b, B_t,
              Q: tl.constexpr, TILE: tl.constexpr, P_TILE: tl.constexpr, N_TILE: tl.constexpr,
              HAS_RUNS: tl.constexpr, DOT: tl.constexpr):
    """The gradients of dt * x: to x [B, T, H, P], and to dt (as a factor of x alone) [B, T, H]."""
    tiles: tl.constexpr = Q // TILE
    chunk, first = tl.program_id(0) // tiles, tl.program_id(0) % tiles * TILE
    chunks = tl.num_programs(0) // tiles
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    g, p, n = h // (H // G), tl.arange(0, P_TILE), tl.arange(0, N_TILE)
    start = chunk * Q
    last = tl.minimum(start + Q, T) - 1
    q_S = first + tl.arange(0, TILE)
    t_S = start + q_S
    valid_S = t_S < T
    t64 = t_S[:, None].to(tl.int64)
    narrow = valid_S[:, None] & (p < P)[None, :]
    sums += (b * H + h) * T
    dstates += ((b * chunks + chunk) * H + h) * P * N
    scores += ((b * chunks + chunk) * G + g) * Q * Q
    total = tl.zeros([TILE, P_TILE], tl.float32)
    for n0 in range(0, N, N_TILE):
        inside = n0 + n < N
        B_SN = tl.load(B + b * B_b + t64 * B_t + g * N + n0 + n[None, :], mask=valid_S[:, None] & inside[None, :],
                       other=0.0)
        dS_NP = tl.load(dstates + p[None, :] * N + n0 + n[:, None], mask=inside[:, None] & (p < P)[None, :], other=0.0)
        total += tl.dot(B_SN.to(DOT), dS_NP.to(DOT), input_precision="ieee")
    total *= to_end(sums, runs, b * T, t_S, valid_S, last, HAS_RUNS)[:, None]
    sums_S = tl.load(sums + t_S, mask=valid_S, other=0.0)
    for first_L in range(first, Q, TILE):
        q_L = first_L + tl.arange(0, TILE)
        t_L = start + q_L
        valid_L = t_L < T
        decay = decay_between(tl.load(sums + t_L, mask=valid_L, other=0.0)[None, :], sums_S[:, None])
        mixing = tl.load(scores + q_L[None, :] * Q + q_S[:, None]) * decay
        dy_LP = tl.load(dy + ((b * T + t_L[:, None]) * H + h) * P + p[None, :],
                        mask=valid_L[:, None] & (p < P)[None, :], other=0.0)
        total += tl.dot(mixing.to(DOT), dy_LP.to(DOT), input_precision="ieee")
    x_SP = tl.load(x + b * x_b + t64 * x_t + h * P + p[None, :], mask=narrow, other=0.0)
    tl.store(ddt + (b * T + t_S) * H + h, tl.sum(total * x_SP.to(tl.float32), 1), mask=valid_S)
    steps_S = tl.load(steps + (b * H + h) * T + t_S, mask=valid_S, other=0.0)
    tl.store(dx + ((b * T + t_S[:, None]) * H + h) * P + p[None, :], total * steps_S[:, None], mask=narrow)


@triton.jit
def da_ends_kernel(given, taken, read, runs, da, T, H, Q: tl.constexpr, TILE: tl.constexpr, HAS_RUNS: tl.constexpr):
    """The gradient of each log decay a [B, T, H]: of the flows that pass the token and end at it or later."""
    tiles: tl.constexpr = Q // TILE
    chunk, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    last = tl.minimum(chunk * Q + Q, T) - 1
    head = (b * H + h) * T
    q = Q - 1 - tl.arange(0, Q)  # from the last token to the first
    t = chunk * Q + q
    valid = t <= last
    ends = tl.load(read + head + t, mask=valid, other=0.0)
    for tile in range(0, tiles):
        part = head * tiles + tile * T + t
        ends += tl.load(given + part, mask=valid & (tile <= q // TILE), other=0.0)
        ends -= tl.load(taken + part, mask=valid & (tile >= q // TILE), other=0.0)
    begins = tl.zeros([Q], tl.int32)
    if HAS_RUNS:
        later = run_at(runs, b * T, t + 1, t < last, HAS_RUNS)
        begins = (run_at(runs, b * T, t, valid, HAS_RUNS) != later).to(tl.int32)
    tl.store(da + (b * T + t) * H + h, within(ends, begins, HAS_RUNS), mask=valid)


@triton.jit
def da_passes_kernel(written, dthrough, runs, da, T, H, BLOCKS, Q: tl.constexpr, BLOCKS_TILE: tl.constexpr,
                     HAS_RUNS: tl.constexpr):
    """Adds to it the flows into the chunk's last state, from earlier tokens and from the first state."""
    chunk, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    start = chunk * Q
    t = start + tl.arange(0, Q)
    valid = t < T
    # of a token whose document ends in this chunk it is zero, as the other is where any document ends in it
    flow = tl.load(written + (b * H + h) * T + t - 1, mask=valid & (t > start), other=0.0)
    begins = tl.zeros([Q], tl.int32)
    if HAS_RUNS:
        earlier = run_at(runs, b * T, t - 1, valid & (t > start), HAS_RUNS)
        begins = (run_at(runs, b * T, t, valid, HAS_RUNS) != earlier).to(tl.int32)
    block = tl.arange(0, BLOCKS_TILE)
    whole = tl.load(dthrough + ((b * H + h) * tl.num_programs(0) + chunk) * BLOCKS + block, mask=block < BLOCKS,
                    other=0.0)
    here = da + (b * T + t) * H + h
    passed = within(flow, begins, HAS_RUNS) + tl.sum(whole, 0)
    tl.store(here, tl.load(here, mask=valid, other=0.0) + passed, mask=valid)
