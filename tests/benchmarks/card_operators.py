"""Triton's scan and ternary products on a card, beside PyTorch's and, if it is installed, mamba-ssm's scan.

    python -m tests.benchmarks.card --only operators
    python -m tests.benchmarks.card_operators [--batch 4] [--time 4096] [--heads 32] [--head-dim 64] [--state 128]

For each chunk and tile: milliseconds forward and backward as a caller sees them, of the device alone, and its slowest
kernels; the largest error of a value or gradient, as a norm, of PyTorch's in fp64 (one row of the batch, 1024 tokens).
For each product: microseconds a call out of a CUDA graph of 20, beside bf16 F.linear. Medians of 20.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.benchmarks.card_parts import Place
from tryplicity import UserError, kernels
from tryplicity.kernels import TernaryMatrix, cards
from tryplicity_plugins.layers import scans, ssd

ROUNDS = 20
PRODUCTS = [(2048, 2048), (4384, 1024), (1280, 1024)]  # out, in
CHOSEN = (32, 4, 640, 1024)  # experts, of them chosen, out, in


def timed(work: Callable[[], object]) -> float:
    """Seconds, until the device has done it."""
    found = []
    for _ in range(ROUNDS + 3):
        torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - started)
    return statistics.median(found[3:])


def device_time(work: Callable[[], object]) -> tuple[float, list[tuple[str, float]]]:
    """Milliseconds of the device alone, and of each kernel, slowest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    found = [(event.key, event.self_device_time_total / 1e3) for event in profile.key_averages()]
    return sum(ms for _, ms in found), sorted(found, key=lambda item: -item[1])


def in_a_graph(work: Callable[[], object], calls: int = 20) -> float:
    """Seconds of one call, of `calls` launched together."""
    work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            work()
    return timed(graph.replay) / calls


def scans_of(options: argparse.Namespace) -> None:
    from tryplicity_plugins.layers import triton_ssd

    B, T, H, P, G, N = (getattr(options, name) for name in ("batch", "time", "heads", "head_dim", "groups", "state"))
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).cuda()

    x, Bs, Cs = (draw(B, T, *shape).bfloat16() for shape in ((H, P), (G, N), (G, N)))
    dt, A, weight = F.softplus(draw(B, T, H) - 3), -draw(H).exp(), draw(B, T, H, P).bfloat16()
    runs = (torch.arange(T, device="cuda") // 700).expand(B, T).contiguous()

    def step(function: Callable, rows=slice(None), tokens=slice(None), dtype=None) -> list[Tensor]:
        own = [t if t.dim() == 1 else t[rows, tokens] for t in (x, dt, A, Bs, Cs)]
        own = [t.detach().to(dtype or t.dtype, copy=True).requires_grad_() for t in own]
        y = function(*own, runs_BT=runs[rows, tokens])[0]
        return [y.detach(), *torch.autograd.grad(y, own, weight[rows, tokens].to(y.dtype))]

    def say(name: str, function: Callable) -> None:
        part = slice(0, 1), slice(0, 1024)
        right = step(ssd.scan, *part, torch.float64)
        errors = [float((a.double() - b).norm() / b.norm())
                  for a, b in zip(step(function, *part), right, strict=True)]
        whole, (alone, slowest) = timed(lambda: step(function)), device_time(lambda: step(function))
        print(f"{name:28} {whole * 1e3:7.2f} ms, device {alone:6.2f} ms, error {max(errors):.1e}, dA {errors[3]:.1e}  "
              + ", ".join(f"{kernel.removesuffix('_kernel')[:24]} {ms:.2f}" for kernel, ms in slowest[:6]), flush=True)

    print(f"scan, B {B} T {T} H {H} P {P} G {G} N {N}, bf16, documents of 700, forward and backward")
    for chunk, tile in ((256, 64), (128, 64), (256, 128), (128, 128), (256, 32)):
        triton_ssd.CHUNK, triton_ssd.TILE = chunk, tile
        try:
            say(f"Triton, chunk {chunk}, tile {tile}", triton_ssd.scan)
        except Exception as error:  # no room on this card: the next may have
            print(f"Triton, chunk {chunk}, tile {tile}: {type(error).__name__}: {error}".splitlines()[0])
    say("PyTorch, chunk 256", lambda *own, **told: ssd.scan(*own, chunk=256, **told))
    try:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    except ImportError:
        return
    say("mamba-ssm, chunk 256", lambda x, dt, A, B, C, runs_BT: (
        mamba_chunk_scan_combined(x, dt, A, B, C, 256, seq_idx=runs_BT.int()),))


def products() -> None:
    print("ternary products, microseconds of one call in a graph (quantisation of the tokens included)")
    for out, columns in PRODUCTS:
        digits = torch.randint(-1, 2, (out, columns), dtype=torch.int8)
        matrix, weight = TernaryMatrix.from_digits(digits, 0.1).to("cuda"), digits.cuda().bfloat16()
        for tokens in (1, 4, 16):
            x = torch.randn(tokens, columns, device="cuda")
            ours = in_a_graph(partial(kernels.packed_linear, x, matrix)) * 1e6
            theirs = in_a_graph(partial(F.linear, x.bfloat16(), weight)) * 1e6
            print(f"{out:5} x {columns:5}, {tokens:2} tokens: {ours:6.1f}, bf16 F.linear {theirs:6.1f}", flush=True)
    experts, chosen, out, columns = CHOSEN
    matrix = TernaryMatrix.from_digits(torch.randint(-1, 2, (experts, out, columns)), torch.ones(experts)).to("cuda")
    for tokens in (1, 16):
        x = torch.randn(tokens, columns, device="cuda")
        rows = torch.arange(tokens, device="cuda").repeat_interleave(chosen)
        ids = torch.randint(0, experts, (len(rows),), device="cuda")
        ours = in_a_graph(partial(kernels.packed_experts, x, matrix, rows, ids)) * 1e6
        print(f"{chosen} of {experts} experts {out} x {columns}, {tokens:2} tokens: {ours:6.1f}", flush=True)


def operators(place: Place) -> dict[str, Any]:
    """As a part of `tests.benchmarks.card`: the table's lines, at the usual sizes."""
    if place.device != "cuda":
        return {"result": "needs a card: nothing was timed", "ok": True, "lines": []}
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        passed = measure(arguments().parse_args([]))
    lines = said.getvalue().splitlines()
    return {"result": f"{len(lines)} lines, self-tests {'passed' if passed else 'not passed'}", "ok": passed,
            "lines": lines}


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("batch", 4), ("time", 4096), ("heads", 32), ("head-dim", 64), ("state", 128), ("groups", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser


def measure(options: argparse.Namespace) -> bool:
    """Print the table. Whether the self-tests passed."""
    print(torch.cuda.get_device_name(), torch.__version__)
    problems = [scans.why_not("cuda", None, torch.bfloat16, options.head_dim, options.state),
                cards.why_not("cuda", None)]
    print("self-tests:", *(problem or "passed" for problem in problems), sep="\n  ")
    if problems[0] is None:
        scans_of(options)
    if problems[1] is None:
        products()
    return problems == [None, None]


def main() -> None:
    options = arguments().parse_args()
    if not torch.cuda.is_available():
        raise UserError("these are timings of a card, and there is none here")
    measure(options)


if __name__ == "__main__":
    main()
