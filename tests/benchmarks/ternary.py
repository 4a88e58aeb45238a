"""Ternary products beside PyTorch's fp32 F.linear and, if there is a build of it, ggml's TQ2_0 (llama.cpp).

    python -m tests.benchmarks.ternary [--ggml BUILD] [--seconds 2] [--tokens 1 16 256]

Weights come from memory, not from a cache: each side walks through at least 192 MB of matrices of its own. The sides
take turns, a walk each, so that a drift in the machine's speed meets all alike; medians over the turns.
BUILD is a folder that cmake built ggml in (`cmake -S .../ggml -B BUILD -DBUILD_SHARED_LIBS=ON; cmake --build BUILD`).
ours includes the quantisation of the tokens and the call from Python, one matrix a call; ggml runs one graph of all.
"""

from __future__ import annotations

import argparse
import ctypes
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tryplicity.training.process import limit_spinning

limit_spinning()  # as every command does, before torch

import torch  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from tryplicity import UserError, kernels  # noqa: E402

SIZES = [(2048, 2048), (5632, 2048), (4096, 4096)]  # out, in
COLD = 192 << 20  # bytes walked through, several times the last cache


def stream_rate(seconds: float = 1.0) -> float:
    """Bytes per second that all threads together read from memory: the best of what `seconds` show."""
    library = kernels.compile_library(Path(__file__).with_name("stream.cpp"))
    if library is None:
        raise UserError(kernels.why_not())
    library.stream_sum.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32]
    data = torch.ones(COLD // 8, dtype=torch.int64)
    best, ends = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < ends:
        started = time.perf_counter()
        library.stream_sum(data.data_ptr(), len(data), torch.get_num_threads())
        best = min(best, time.perf_counter() - started)
    return data.nbytes / best


class Ggml:
    """ggml's mul_mat through a few lines of C, compiled against a build of it."""

    def __init__(self, build: Path) -> None:
        cache = (build / "CMakeCache.txt").read_text(encoding="utf-8")
        source = Path(re.search(r"CMAKE_HOME_DIRECTORY:INTERNAL=(.*)", cache)[1])
        libraries = [next(build.rglob(f"libggml-{part}.so")) for part in ("cpu", "base")]
        self._folder = tempfile.TemporaryDirectory()
        driver = Path(self._folder.name) / "driver.so"
        subprocess.run(["cc", "-O2", "-shared", "-fPIC", f"-I{source / 'include'}",
                        str(Path(__file__).with_name("ternary_ggml.c")), "-o", str(driver), *map(str, libraries),
                        *(f"-Wl,-rpath,{library.parent}" for library in libraries)], check=True)
        self._library = ctypes.CDLL(str(driver))
        p, n, i = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        for name, result, arguments in [("new", p, [ctypes.c_char_p, p, p, n, n, n, i, i]), ("run", i, [p]),
                                        ("result", ctypes.POINTER(ctypes.c_float), [p]), ("free", None, [p])]:
            function = getattr(self._library, f"bench_{name}")
            function.restype, function.argtypes = result, arguments

    def products(self, kind: str, weight_OD: torch.Tensor, x_ND: torch.Tensor, copies: int) -> int:
        return self._library.bench_new(kind.encode(), weight_OD.data_ptr(), x_ND.data_ptr(), *weight_OD.shape,
                                       len(x_ND), copies, torch.get_num_threads())

    def run(self, bench: int) -> None:
        assert self._library.bench_run(bench) == 0

    def result(self, bench: int, count: int) -> torch.Tensor:
        return torch.tensor(self._library.bench_result(bench)[:count])

    def free(self, bench: int) -> None:
        self._library.bench_free(bench)


def copies_of(size: int) -> int:
    return -(-COLD // size)


def take_turns(sides: dict[str, tuple[Callable[[], None], int]], seconds: float) -> dict[str, list[float]]:
    """Seconds of one product of each side, turn by turn; a side is a walk and the products in it."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for walk, _ in sides.values():
        walk()
    ends = time.perf_counter() + seconds * len(sides)
    while time.perf_counter() < ends or len(times[next(iter(sides))]) < 5:
        for name, (walk, count) in sides.items():
            time.sleep(0.02)  # the threads of the side before spin for a while, on the cores of this one
            started = time.perf_counter()
            walk()
            times[name].append((time.perf_counter() - started) / count)
    return times


@torch.inference_mode()
def measure(out: int, columns: int, tokens: int, ggml: Ggml | None, kinds: list[str], seconds: float) -> dict:
    generator = torch.Generator().manual_seed(0)
    digits_OD = torch.randint(-1, 2, (out, columns), generator=generator, dtype=torch.int8)
    x_ND = torch.randn(tokens, columns, generator=generator)
    first = kernels.TernaryMatrix.from_digits(digits_OD, 0.02)
    # compute-bound products need no walk: a few of them make a turn long enough to time
    limit = max(2, 4096 // tokens)
    matrices = [kernels.TernaryMatrix.from_digits(digits_OD, 0.02)  # in memory as a loaded model's lie
                for _ in range(min(limit, copies_of(first.nbytes)))]
    dense_OD = digits_OD.float() * 0.02
    dense = [dense_OD.clone() for _ in range(min(limit, copies_of(dense_OD.nbytes)))]

    def ours() -> None:
        for matrix in matrices:
            kernels.packed_linear(x_ND, matrix)

    def fp32() -> None:
        for weight_OD in dense:
            F.linear(x_ND, weight_OD)

    sides = {"ours": (ours, len(matrices)), "fp32": (fp32, len(dense))}
    benches = []
    for kind in kinds if ggml else []:
        bench = ggml.products(kind, dense_OD, x_ND, len(matrices))
        benches.append(bench)
        sides[kind] = (lambda bench=bench: ggml.run(bench), len(matrices))
        ggml.run(bench)
        expected = F.linear(x_ND, dense_OD)
        error = (ggml.result(bench, expected.numel()).view_as(expected) - expected).norm() / expected.norm()
        assert error < 0.05, f"ggml's {kind} is off by {error:.3f}"
    times = take_turns(sides, seconds)
    for bench in benches:
        ggml.free(bench)
    return {"bytes": first.planes.nbytes, "times": times}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ggml", type=Path, metavar="BUILD", help="a folder that ggml was built in")
    parser.add_argument("--kinds", nargs="+", default=["tq2_0"], help="ggml's formats to time (tq1_0, q4_0, f32 ...)")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each side of each row")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 256])
    parser.add_argument("--sizes", nargs="+", default=[f"{o}x{d}" for o, d in SIZES], metavar="OUTxIN")
    options = parser.parse_args(arguments)
    ggml = Ggml(options.ggml) if options.ggml else None
    kinds = options.kinds if ggml else []
    rate = stream_rate()
    print(f"{torch.get_num_threads()} threads read {rate / 1e9:.1f} GB/s from memory; microseconds a product, medians "
          "of turns; ratio > 1: ours is faster")
    heads = ["out x in", "tokens", "ours us", "of stream", "fp32 us", "fp32/ours",
             *(text for kind in kinds for text in (f"{kind} us", f"{kind}/ours"))]
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads), flush=True)
    for size in options.sizes:
        out, columns = map(int, size.split("x"))
        for tokens in options.tokens:
            found = measure(out, columns, tokens, ggml, kinds, options.seconds)
            times = found["times"]
            ours = statistics.median(times["ours"])
            row = [f"{out}x{columns}", str(tokens), f"{ours * 1e6:.0f}",
                   f"{found['bytes'] / ours / rate:.0%}" if tokens == 1 else ""]
            for kind in ("fp32", *kinds):
                ratio = statistics.median(other / mine for other, mine in zip(times[kind], times["ours"], strict=True))
                row += [f"{statistics.median(times[kind]) * 1e6:.0f}", f"{ratio:.2f}x"]
            print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
