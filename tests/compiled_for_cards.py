"""Compiles every kernel for the card that is named, which need not be there: what the interpreter does not check.

Run as `python compiled_for_cards.py cuda:90 [usual]`; prints one line of JSON a kernel: its name and its bytes of
shared memory. usual: of the sizes and dtypes only the first.
"""

import inspect
import json
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tryplicity.kernels import triton_ternary
from tryplicity_plugins.layers import triton_ssd

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64", torch.int32: "*i32",
            torch.uint8: "*u8", torch.int8: "*i8"}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
launches = []


KINDS = [(torch.bfloat16, (64, 1, 128), True), (torch.float32, (64, 2, 128), False),
         (torch.bfloat16, (128, 1, 128), True)]


def launch_everything(kinds) -> None:
    """The operators, whose kernels are only noted down."""
    triton.JITFunction.run = lambda kernel, *args, grid, warmup, **told: launches.append((kernel, args, told))
    with torch.no_grad():
        for dtype, (head_dim, groups, state), packed in kinds:
            assert triton_ssd.fits(dtype, head_dim, state)
            x, B = torch.empty(1, 512, 4, head_dim, dtype=dtype), torch.empty(1, 512, groups, state, dtype=dtype)
            dt, runs = torch.empty(1, 512, 4), torch.zeros(1, 512, dtype=torch.int64) if packed else None
            start = None if packed else torch.empty(1, 4, head_dim, state)
            y, last, *kept = triton_ssd.ssd_scan(x, dt, dt, B, B, start, runs)
            triton_ssd.ssd_scan_backward(y, last if packed else None, x, B, B, runs, *kept)
        planes, scale, bias = torch.empty(3, 64, 8, 4, 32, dtype=torch.uint8), torch.empty(3), torch.empty(256)
        for tokens in (1, 16):
            triton_ternary.linear(torch.empty(tokens, 1024), planes[:1], scale[:1], 256, bias)
        ids = torch.empty(64, dtype=torch.int64)
        y = triton_ternary.experts(torch.empty(16, 1024, dtype=torch.bfloat16), planes, scale, 256, ids, ids)
        triton_ternary.add_weighted_rows(torch.empty(16, 256), y, torch.empty(64), ids)


def compiled(kernel, args: tuple, told: dict, target: GPUTarget):
    options = {name: told[name] for name in OPTIONS if name in told}
    values = dict(zip(kernel.arg_names, args, strict=False)) | {k: v for k, v in told.items() if k not in OPTIONS}
    assert set(values) == set(inspect.signature(kernel.fn).parameters), kernel.fn.__name__
    signature, constants, aligned = {}, {}, {}
    for i, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
        value = values[name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[(i,)] = "constexpr", value
            continue
        signature[name] = POINTERS[value.dtype] if isinstance(value, torch.Tensor) else "i32"
        if isinstance(value, torch.Tensor) or value % 16 == 0:
            aligned[(i,)] = [["tt.divisibility", 16]]
    return triton.compile(ASTSource(kernel, signature, constants, aligned), target=target, options=options)


if __name__ == "__main__":
    backend, name = sys.argv[1].split(":")
    card = GPUTarget("cuda", int(name), 32) if backend == "cuda" else GPUTarget(backend, name, 64)
    # an MI300X has no room for large states; there the self-test leaves them to PyTorch
    launch_everything(KINDS[:1] if "usual" in sys.argv else KINDS[:2] if backend == "hip" else KINDS)
    done = set()
    for kernel, args, told in launches:
        kinds = str([arg.dtype if isinstance(arg, torch.Tensor) else arg is None for arg in args]) + str(told)
        if (kernel, kinds) not in done:
            done.add((kernel, kinds))
            made = compiled(kernel, args, told, card)
            print(json.dumps([kernel.fn.__name__, made.metadata.shared]), flush=True)
