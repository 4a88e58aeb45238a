"""The layers' own C++ (all .cpp files beside this one), compiled into one library when first needed.

Decoding one token is a few small operations between the matrix products, and in eager PyTorch each of them costs more
than its arithmetic. A layer does them in one call of C instead, wherever `for_inference` says that it may, and keeps
its PyTorch path for everything else: gradients, autocast, other dtypes and devices, a machine without a compiler.

Every C function gives a token the same bits whatever the number of tokens, sequences and threads in the call.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from tryplicity import State, kernels

_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float}
_functions: dict[str, Callable[..., None] | None] = {}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled library; None where there is no compiler (`kernels.why_not` says why)."""
    found = kernels.compile_library(*sorted(Path(__file__).parent.glob("*.cpp")))
    if found is not None and (pool := kernels.entry("parallel")) is not None:
        found.use_threads(ctypes.c_void_p(pool))
    return found


def function(name: str, signature: str) -> Callable[..., None] | None:
    """The C function `name`, or None without a library. signature: a letter for each argument: p an address (of a
    tensor: its data_ptr(); None is NULL; or a ctypes array), i an int64, f a float. It returns nothing, and raises
    MemoryError. In C the number of threads that it may use stands before them, an int64, and it gives an int64: 0, or
    1 where memory ran out."""
    try:
        return _functions[name]
    except KeyError:
        call, found = None, library()
        if found is not None:
            call = _with_threads(getattr(found, name), signature)
        return _functions.setdefault(name, call)


def _with_threads(in_c: Callable[..., None], signature: str) -> Callable[..., None]:
    in_c.argtypes, in_c.restype = [ctypes.c_int64, *(_TYPES[letter] for letter in signature)], ctypes.c_int64
    threads = torch.get_num_threads
    return lambda *arguments: in_c(threads(), *arguments) and _no_memory()


def _no_memory() -> None:
    raise MemoryError("no memory for what a layer computes in C")


def addresses(*tensors: Tensor) -> ctypes.Array:
    """Their data_ptr()s as a C array, for an argument `p` that points to pointers."""
    return (ctypes.c_void_p * len(tensors))(*[tensor.data_ptr() for tensor in tensors])


def row_addresses(states: Sequence[State], name: str, batch: int) -> ctypes.Array:
    """Where each row of a batch has its part of this tensor of the states: one state of all rows, or one for each."""
    if len(states) == batch:
        return addresses(*[state[name] for state in states])
    (whole,) = (state[name] for state in states)
    assert len(whole) == batch
    start, step = whole.data_ptr(), whole.stride(0) * whole.element_size()
    return (ctypes.c_void_p * batch)(*range(start, start + batch * step, step))


def for_inference(x: Tensor) -> bool:
    """Whether C may compute on x here and now: fp32 in this machine's memory, contiguous, no subclass of Tensor, and
    neither gradients nor autocast to heed."""
    return (not torch.is_grad_enabled() and type(x) is Tensor and x.dtype is torch.float32 and x.is_cpu
            and x.is_contiguous() and not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling())


def plain(*parameters: Tensor) -> bool:
    """Whether C may read these parameters: fp32, contiguous, in this machine's memory, not sharded."""
    return all(type(p) in (Tensor, nn.Parameter) and p.dtype is torch.float32 and p.is_cpu and p.is_contiguous()
               for p in parameters)


def own_parameters(module: nn.Module, *names: str) -> list[int | None] | None:
    """The addresses of these parameters of the module itself, None for one that it has not; nothing where C may not
    read them. They are looked at closely only when one has moved: this is asked for every token."""
    parameters = module._parameters  # without one it is None or missing
    found = [None if (p := parameters.get(name)) is None else p.data_ptr() for name in names]
    if module.__dict__.get("_addresses") != found:
        if not plain(*(p for name in names if (p := parameters.get(name)) is not None)):
            return None
        module.__dict__["_addresses"] = found
    return found
