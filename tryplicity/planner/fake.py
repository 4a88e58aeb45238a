"""What torch does otherwise on fake CPU tensors than a GPU would, put right for the length of one process."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

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
def fake_group(ranks: int, looking_away: Callable[[], Any]) -> Iterator[None]:
    """A process group whose other ranks are not there: what is sent is not sent, what comes has no data.

    looking_away: a context for what torch computes on the side to find out shapes. The changes to torch that a
    group without others needs stay, for a process of its own.
    """
    from torch import distributed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    distributed.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    _meshes_are_real()
    _copies_are_alike()
    _all_reduce_has_a_future()
    _sharding_is_worked_out_aside(looking_away)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def _around(owner: Any, name: str, wrapper: Callable[[Callable], Callable]) -> None:
    """Replaces owner.name by what wrapper makes of it."""
    setattr(owner, name, functools.wraps(getattr(owner, name))(wrapper(getattr(owner, name))))


def _meshes_are_real() -> None:
    """A mesh of devices reads the numbers of its ranks, which are those of `arange`."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.utils._python_dispatch import _disable_current_modes

    def wrapper(original: Callable) -> Callable:
        def build(*args: Any, **kwargs: Any) -> Any:
            with _disable_current_modes():
                known = {name: torch.arange(value.numel(), dtype=torch.int).view(value.shape)
                         for name, value in kwargs.items() if isinstance(value, FakeTensor)}
                return original(*args, **kwargs | known)

        return build

    _around(DeviceMesh, "__init__", wrapper)


def _copies_are_alike() -> None:
    """torch's DistributedDataParallel compares its copies at the beginning and orders its buckets by the first step;
    both need data, neither takes memory."""
    from torch.nn.parallel import distributed as ddp

    ddp._verify_param_shape_across_processes = lambda *_, **__: None
    ddp._sync_module_states = lambda *_, **__: None

    class Reducer:
        def __init__(self, inner: Any) -> None:
            self._inner = inner

        def _rebuild_buckets(self) -> bool:
            return False

        def __getattr__(self, name: str) -> Any:
            return getattr(self._inner, name)

    def wrapper(original: Callable) -> Callable:
        def pre_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            if not isinstance(self.reducer, Reducer):
                if not self._comm_hooks:
                    self.register_comm_hook(None, _sum_hook)
                self.reducer = Reducer(self.reducer)
            return original(self, *args, **kwargs)

        return pre_forward

    _around(ddp.DistributedDataParallel, "_pre_forward", wrapper)


def _sum_hook(_, bucket):  # torch looks at annotations here
    from torch import distributed

    return distributed.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda done: done.value()[0])


class _Done:
    """What stands for the work of a collective that is over at once."""

    def __init__(self, work: Any, tensor: Tensor) -> None:
        self._work, self._tensor = work, tensor

    def get_future(self) -> torch.futures.Future:
        future = torch.futures.Future()
        future.set_result([self._tensor])
        return future

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def _all_reduce_has_a_future() -> None:
    """The fake group's own says nothing of the result."""
    from torch import distributed

    def wrapper(original: Callable) -> Callable:
        def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            work = original(tensor, *args, **kwargs)
            return work and _Done(work, tensor)

        return all_reduce

    _around(distributed, "all_reduce", wrapper)


def _sharding_is_worked_out_aside(looking_away: Callable[[], Any]) -> None:
    """A DTensor learns the shapes of a result by running the operation on tensors of the whole shape."""
    from torch.distributed.tensor._sharding_prop import ShardingPropagator

    def wrapper(original: Callable) -> Callable:
        def propagate(*args: Any, **kwargs: Any) -> Any:
            with looking_away():
                return original(*args, **kwargs)

        return propagate

    _around(ShardingPropagator, "_propagate_tensor_meta_non_cached", wrapper)
