"""What torch does otherwise on fake CPU tensors than a GPU would, put right for the length of one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

#: computed in fp32 by autocast on a GPU, in bf16 on a CPU (torch's list of autocast operators)
_FP32 = ("acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt",
         "sinh", "tan", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", "softplus", "layer_norm",
         "native_layer_norm", "group_norm", "rms_norm", "frobenius_norm.dim", "nuclear_norm", "cosine_similarity",
         "kl_div", "nll_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "mse_loss",
         "binary_cross_entropy_with_logits", "dist", "cdist", "renorm", "logsumexp", "norm.Scalar",
         "norm.ScalarOpt_dim")
#: likewise, by the dtype of the result
_RESULT_FP32 = ("prod", "prod.dim_int", "softmax.int", "log_softmax.int", "cumprod", "cumsum", "linalg_vector_norm",
                "linalg_matrix_norm", "sum", "sum.dim_IntList")
_KEY = "AutocastCPU"
_library: list[Any] = []


def autocast_as_on_a_gpu() -> None:
    """Give autocast on CPUs the list of operators that a GPU computes in fp32. For a process of its own: there is no
    way back."""
    if _library:
        return
    library = torch.library.Library("aten", "IMPL")
    _library.append(library)
    for names, rule in ((_FP32, _in_fp32), (_RESULT_FP32, _to_fp32)):
        for name in names:
            packet, _, overload = name.partition(".")
            op = getattr(getattr(torch.ops.aten, packet, None), overload or "default", None)
            if op is not None and not torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), _KEY):
                library.impl(name, rule(op), _KEY)


def _lower(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)


def _in_fp32(op: Callable) -> Callable:
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)):
            return op(*(a.float() if _lower(a) else a for a in args),
                      **{name: a.float() if _lower(a) else a for name, a in kwargs.items()})

    return run


def _to_fp32(op: Callable) -> Callable:
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)):
            if kwargs.get("dtype") is None and _lower(args[0]) and not _dtype_given(op, args):
                kwargs = {**kwargs, "dtype": torch.float32}
            return op(*args, **kwargs)

    return run


def _dtype_given(op: Any, args: tuple) -> bool:
    """By its place: softmax(x, dim, dtype)."""
    return any(argument.name == "dtype" and args[place] is not None
               for place, argument in enumerate(op._schema.arguments) if place < len(args))


@contextmanager
def fake_group(ranks: int) -> Iterator[None]:
    """A process group whose other ranks are not there: what is sent is not sent, what comes has no data."""
    from torch import distributed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    distributed.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        distributed.destroy_process_group()
