"""The C++ beside this file, and memory for the weights that it reads."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import mmap
import threading
from pathlib import Path

import torch
from torch import Tensor

from tryplicity.kernels import compiling

SOURCES = [Path(__file__).with_name(name) for name in ("ternary.cpp", "rows.cpp", "parallel.cpp")]
HUGE_PAGE, BLOCK = 1 << 21, 1 << 25
_block, _allocating = torch.empty(0, dtype=torch.uint8), threading.Lock()


@functools.cache
def library() -> ctypes.CDLL | None:
    found = compiling.compile_library(*SOURCES)
    if found is None:
        return None
    p, n, i = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    for name, result, arguments in [
        ("quantise", None, [p, n, n, n, p, p, p, i]),
        ("linear", i, [p, p, n, p, p, i]),
        ("experts", i, [p, p, n, p, p, n, p, p, p, p, n, i]),
        ("planes", i, [p, p, n, n, n, n, n, p, i]),
        ("pack", None, [p, n, n, p, i]),
        ("unpack", None, [p, n, n, p, i]),
        ("rows", i, [n, p, p, p, n, n, n, p, i]),
    ]:
        function = getattr(found, f"tryplicity_{name}")
        function.restype, function.argtypes = result, arguments
    return found


def native(*tensors: Tensor | None) -> ctypes.CDLL | None:
    """The library, if the tensors are where it can reach them, and no compiler wants to see what is done."""
    if torch.compiler.is_compiling():
        return None
    return library() if all(t is None or t.is_cpu for t in tensors) else None


def why_not() -> str | None:
    """Why plain PyTorch does the work here or in another library that was asked for, in one line for whoever waits for
    it to read; None if it does not."""
    library()
    return compiling.why_not()


def entry(name: str) -> int | None:
    """The address of `tryplicity_<name>` in the C++ here, for C++ elsewhere to call; None without a library."""
    found = library()
    return None if found is None else ctypes.cast(getattr(found, f"tryplicity_{name}"), ctypes.c_void_p).value


def huge(shape: tuple[int, ...]) -> Tensor:
    """uint8 memory in pages of 2 MB where the system has them: weights that are read once a token otherwise spend up
    to a fifth of their time on finding pages. Small matrices share a block, which is free when the last of them is."""
    global _block
    size = math.prod(shape)
    room = -(-size // 64) * 64
    if room > BLOCK // 4:
        return _pages(room)[:size].view(shape)
    with _allocating:
        if room > len(_block):
            _block = _pages(BLOCK)
        memory, _block = _block[:size], _block[room:]
    return memory.view(shape)


def _pages(size: int) -> Tensor:
    memory = torch.empty(size + HUGE_PAGE, dtype=torch.uint8)
    begin = -memory.data_ptr() % HUGE_PAGE
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        libc.madvise(memory.data_ptr() + begin, size, mmap.MADV_HUGEPAGE)
    return memory[begin:begin + size]
