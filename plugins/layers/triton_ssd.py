"""The scan of Mamba-2 in Triton, as operators of torch with gradients: on a card, or in Triton's interpreter.

The same function as `ssd.scan`, in five kernels forward and nine backward. Chunks of `CHUNK` tokens, states in fp32,
products of the inputs' dtype with sums in fp32; for the gradients only the states at the chunks' starts and the sums of
log decays are kept. Nothing here waits for the device, and nothing depends on an order of threads.

Importing this module imports triton: only `scans` does, where it may.

Shapes: B batch, T time, H heads, P head dim, G groups, N state, k chunks, Q tokens of a chunk.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from tryplicity import kernels
from tryplicity_plugins.layers import triton_ssd_backward as backward
from tryplicity_plugins.layers import triton_ssd_forward as forward

CHUNK = 256  # tokens; a power of 2
TILE = 64  # tokens of a chunk that one program works on; a power of 2, 16 at least
STATE_BLOCK = 1024  # numbers of a state that one program carries from chunk to chunk
USUAL_STATE = 64 * 128  # numbers of a head's state up to which it is worked on in whole


def fits(dtype: torch.dtype, head_dim: int, state_size: int) -> bool:
    """Whether the kernels can do heads and states of these sizes in the memory that a program has on a card."""
    longest, largest = {torch.float32: (64, USUAL_STATE), torch.bfloat16: (128, 2 * USUAL_STATE),
                        torch.float16: (128, 2 * USUAL_STATE)}.get(dtype, (0, 0))
    return head_dim <= longest and _power(head_dim) * _power(state_size) <= largest


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on a CPU: as TRITON_INTERPRET was when triton was imported."""
    return not isinstance(forward.sums_kernel, triton.JITFunction)


def _power(number: int, least: int = 16) -> int:
    return max(least, triton.next_power_of_2(number))


class _Plan:
    """Sizes, and what every launch is told."""

    def __init__(self, x: Tensor, B: Tensor, runs: Tensor | None) -> None:
        self.batch, self.T, self.H, self.P = x.shape
        self.G, self.N = B.shape[-2:]
        self.Q = min(CHUNK, _power(self.T))
        self.TILE = min(TILE, self.Q)
        self.chunks, self.tiles = triton.cdiv(self.T, self.Q), self.Q // self.TILE
        self.P_TILE, self.N_TILE = _power(self.P), _power(self.N)
        # what else would not fit a card's shared memory: less of a state at a time, fewer fetched in advance
        large, wide = self.P_TILE * self.N_TILE > USUAL_STATE, x.dtype == torch.float32
        self.N_PART = min(self.N_TILE, 64 if large or wide else 128)
        self.ahead = {"num_stages": 1 if large else 2} if large or wide else {}
        self.blocks = triton.cdiv(self.P * self.N, STATE_BLOCK)
        self.told = {"Q": self.Q, "HAS_RUNS": runs is not None}
        # the interpreter multiplies bf16 as if it were whole numbers
        dot = {torch.bfloat16: triton.language.bfloat16, torch.float16: triton.language.float16}.get(x.dtype)
        self.dots = {"DOT": dot if dot is not None and not interpreted() else triton.language.float32}

    def grid(self, in_chunk: int, of: int) -> tuple[int, int, int]:
        return self.chunks * in_chunk, of, self.batch

    def chunk_grids(self, x: Tensor, *shape: int) -> Tensor:
        return torch.empty((self.batch, *shape), device=x.device, dtype=torch.float32)


def _rows(t: Tensor) -> Tensor:
    """As the kernels can read it: a token's numbers side by side."""
    return t if t.stride(-1) == 1 and t.stride(-2) == t.shape[-1] else t.contiguous()


def _scores(plan: _Plan, B: Tensor, C: Tensor, runs: Tensor | None) -> Tensor:
    scores = plan.chunk_grids(B, plan.chunks, plan.G, plan.Q, plan.Q)
    forward.scores_kernel[plan.grid(plan.tiles**2, plan.G)](
        B, C, runs, scores, plan.T, plan.G, plan.N, *B.stride()[:2], *C.stride()[:2], TILE=plan.TILE,
        N_TILE=min(plan.N_TILE, 64), **plan.told, **plan.dots)
    return scores


def _outer(plan: _Plan, u: Tensor, v: Tensor, sums: Tensor, steps: Tensor, runs: Tensor | None,
           to_end: bool) -> Tensor:
    states = plan.chunk_grids(u, plan.chunks, plan.H, plan.P, plan.N)
    forward.outer_kernel[plan.grid(triton.cdiv(plan.N, plan.N_PART), plan.H)](
        u, v, sums, steps, runs, states, plan.T, plan.H, plan.P, plan.G, plan.N, *u.stride()[:2], *v.stride()[:2],
        TILE=plan.TILE, P_TILE=plan.P_TILE, N_TILE=plan.N_PART, TO_END=to_end, **plan.told, **plan.dots)
    return states


@torch.library.custom_op("tryplicity::ssd_scan", mutates_args=())
@kernels.on_its_device
def ssd_scan(x: Tensor, dt: Tensor, a: Tensor, B: Tensor, C: Tensor, start: Tensor | None,
             runs: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y [B, T, H, P], the last state [B, H, P, N], and what the gradients need: the states at the chunks' starts
    [B, k, H, P, N], sums of log decays and dt, heads first [B, H, T].

    x [B, T, H, P]; dt and a = dt * A fp32 [B, T, H]; B and C [B, T, G, N]; start fp32 [B, H, P, N]; runs integers
    [B, T], the documents' numbers, rising from the incoming state's 0.
    """
    plan, x, B, C = _Plan(x, B, runs), _rows(x), _rows(B), _rows(C)
    dt, a = dt.contiguous(), a.contiguous()
    start, runs = (None if t is None else t.contiguous() for t in (start, runs))
    sums, steps = plan.chunk_grids(x, plan.H, plan.T), plan.chunk_grids(x, plan.H, plan.T)
    forward.sums_kernel[plan.grid(1, plan.H)](a, dt, runs, sums, steps, plan.T, plan.H, **plan.told)
    states, last = _outer(plan, x, B, sums, steps, runs, True), plan.chunk_grids(x, plan.H, plan.P, plan.N)
    forward.pass_kernel[plan.blocks, plan.H, plan.batch](
        states, start, last, sums, runs, plan.T, plan.H, plan.P * plan.N, plan.chunks, BLOCK=STATE_BLOCK,
        HAS_START=start is not None, **plan.told)
    y = torch.empty(x.shape, device=x.device, dtype=x.dtype)
    forward.output_kernel[plan.grid(plan.tiles, plan.H)](
        x, C, _scores(plan, B, C, runs), sums, steps, runs, states, y, plan.T, plan.H, plan.P, plan.G, plan.N,
        *x.stride()[:2], *C.stride()[:2], TILE=plan.TILE, P_TILE=plan.P_TILE, N_TILE=min(plan.N_TILE, 64),
        **plan.told, **plan.dots)
    return y, last, states, sums, steps


@ssd_scan.register_fake
def _(x, dt, a, B, C, start, runs):
    plan = _Plan(x, B, runs)
    state, row = (plan.H, plan.P, plan.N), plan.chunk_grids(x, plan.H, plan.T)
    y = torch.empty(x.shape, device=x.device, dtype=x.dtype)
    return y, plan.chunk_grids(x, *state), plan.chunk_grids(x, plan.chunks, *state), row, torch.empty_like(row)


@torch.library.custom_op("tryplicity::ssd_scan_backward", mutates_args=())
@kernels.on_its_device
def ssd_scan_backward(dy: Tensor, dlast: Tensor | None, x: Tensor, B: Tensor, C: Tensor, runs: Tensor | None,
                      states: Tensor, sums: Tensor, steps: Tensor
                      ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, dt, a, B, C and of the state before the first token."""
    plan, x, B, C, dy = _Plan(x, B, runs), _rows(x), _rows(B), _rows(C), dy.contiguous()
    runs, dlast = (None if t is None else t.contiguous() for t in (runs, dlast))
    T, H, P, G, N = plan.T, plan.H, plan.P, plan.G, plan.N
    x_strides, B_strides, C_strides = x.stride()[:2], B.stride()[:2], C.stride()[:2]
    told = {"TILE": plan.TILE, "P_TILE": plan.P_TILE, **plan.told, **plan.dots}

    dstates, dstart = _outer(plan, dy, C, sums, steps, runs, False), plan.chunk_grids(x, H, P, N)
    dthrough = plan.chunk_grids(x, H, plan.chunks, plan.blocks)
    backward.pass_back_kernel[plan.blocks, H, plan.batch](
        dstates, states, dlast, dstart, dthrough, sums, runs, T, H, P * N, plan.chunks, BLOCK=STATE_BLOCK,
        HAS_LAST=dlast is not None, **plan.told)

    scores = _scores(plan, B, C, runs)
    dscores = torch.empty_like(scores, dtype=x.dtype)
    given, taken = (plan.chunk_grids(x, H, plan.tiles, T) for _ in range(2))
    backward.dscores_kernel[plan.grid(plan.tiles**2, G)](
        dy, x, scores, dscores, given, taken, sums, steps, runs, T, H, P, G, *x_strides, **told)

    dB, dC = (torch.empty(t.shape, device=t.device, dtype=t.dtype) for t in (B, C))
    read, written = plan.chunk_grids(x, H, T), plan.chunk_grids(x, H, T)
    wide = {"N_TILE": plan.N_TILE, "num_warps": 8, **plan.ahead, **told}
    backward.dB_dC_kernel[plan.grid(plan.tiles, G)](
        dy, C, B, dscores, states, read, dC, sums, steps, runs, T, H, P, G, N, *dy.stride()[:2], *C_strides, *B_strides,
        TO_END=False, **wide)
    backward.dB_dC_kernel[plan.grid(plan.tiles, G)](
        x, B, C, dscores, dstates, written, dB, sums, steps, runs, T, H, P, G, N, *x_strides, *B_strides, *C_strides,
        TO_END=True, **wide)

    dx = torch.empty(x.shape, device=x.device, dtype=x.dtype)
    ddt, da = plan.chunk_grids(x, T, H), plan.chunk_grids(x, T, H)
    backward.dx_kernel[plan.grid(plan.tiles, H)](
        dy, x, B, scores, dstates, dx, ddt, sums, steps, runs, T, H, P, G, N, *x_strides, *B_strides,
        N_TILE=min(plan.N_TILE, 64), **told)
    backward.da_ends_kernel[plan.grid(1, H)](given, taken, read, runs, da, T, H, TILE=plan.TILE, **plan.told)
    backward.da_passes_kernel[plan.grid(1, H)](
        written, dthrough, runs, da, T, H, plan.blocks, BLOCKS_TILE=_power(plan.blocks, 1), **plan.told)
    return dx, ddt, da, dB, dC, dstart


@ssd_scan_backward.register_fake
def _(dy, dlast, x, B, C, runs, states, sums, steps):
    dx, dB, dC = (torch.empty(t.shape, device=t.device, dtype=t.dtype) for t in (x, B, C))
    ddt = torch.empty(x.shape[:3], device=x.device, dtype=torch.float32)
    return dx, ddt, torch.empty_like(ddt), dB, dC, torch.empty_like(states[:, 0]).contiguous()


def _save(ctx, inputs, output) -> None:
    x, _, _, B, C, start, runs = inputs
    _, _, states, sums, steps = output
    ctx.has_start = start is not None
    ctx.save_for_backward(x, B, C, runs, states, sums, steps)
    ctx.mark_non_differentiable(states, sums, steps)
    ctx.set_materialize_grads(False)


def _gradients(ctx, dy, dlast, *_):
    x, B, C, runs, states, sums, steps = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(x)
    dx, ddt, da, dB, dC, dstart = ssd_scan_backward(dy, dlast, x, B, C, runs, states, sums, steps)
    return dx, ddt, da, dB, dC, dstart if ctx.has_start else None, None


ssd_scan.register_autograd(_gradients, setup_context=_save)


def _products(x_shape, B_shape) -> int:
    batch, T, H, P = x_shape
    G, N = B_shape[-2:]
    Q = min(CHUNK, _power(T))
    return batch * triton.cdiv(T, Q) * Q, Q * G * N, Q * H * P, H * P * N


@register_flop_formula(torch.ops.tryplicity.ssd_scan)
def _forward_flops(x_shape, dt_shape, a_shape, B_shape, *args, out_shape=None, **kwargs) -> int:
    tokens, scores, inside, states = _products(x_shape, B_shape)
    return 2 * tokens * (scores + inside + 2 * states)


@register_flop_formula(torch.ops.tryplicity.ssd_scan_backward)
def _backward_flops(dy_shape, dlast_shape, x_shape, B_shape, *args, out_shape=None, **kwargs) -> int:
    tokens, scores, inside, states = _products(x_shape, B_shape)
    return 2 * tokens * (3 * scores + 2 * inside + 4 * states)


def scan(x_BTHP: Tensor, dt_BTH: Tensor, A_H: Tensor, B_BTGN: Tensor, C_BTGN: Tensor, *,
         start_BHPN: Tensor | None = None, runs_BT: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As `ssd.scan`, whose chunk is the kernels' own. dt, A and the states in fp32."""
    return ssd_scan(x_BTHP, dt_BTH, dt_BTH * A_H, B_BTGN, C_BTGN, start_BHPN, runs_BT)[:2]
