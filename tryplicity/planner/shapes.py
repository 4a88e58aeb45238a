"""Tensors that have a shape, a dtype and a device but no data, and a mode that runs torch on them.

torch's own FakeTensorMode does the same and more; it takes two seconds to import and a fifth of a millisecond for
each operation, which is too much for an answer at once. The tests hold the two against each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from tryplicity.errors import UserError

aten = torch.ops.aten
CPU = torch.device("cpu")
META = torch.device("meta")


class Shape(Tensor):
    """Looks like a CPU tensor; `meta` is the tensor on the meta device that knows its sizes and storage."""

    meta: Tensor

    @staticmethod
    def __new__(cls, meta: Tensor) -> Shape:
        self = Tensor._make_wrapper_subclass(cls, meta.shape, strides=meta.stride(), dtype=meta.dtype, device=CPU,
                                             storage_offset=meta.storage_offset())
        self.meta = meta
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} on a tensor without data outside of its mode")

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Shape({tuple(self.meta.shape)}, {self.meta.dtype})"


def shape_like(tensor: Tensor, dtype: torch.dtype | None = None) -> Shape:
    """A tensor without data, contiguous, of another's sizes."""
    return Shape(torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device=META))


def _meta(value: Any) -> Any:
    if isinstance(value, Shape):
        return value.meta
    return value.to(META) if isinstance(value, Tensor) else META if value == CPU else value


def _shape(value: Any) -> Any:
    return Shape(value) if isinstance(value, Tensor) else value


# --- operations whose kernels for the meta device are missing, or slow python ---

def _empty(*sizes: int, like: Tensor) -> Tensor:
    return torch.empty(sizes, dtype=like.dtype, device=META)


def _new(x: Tensor, dtype: torch.dtype | None = None, memory_format: Any = None) -> Tensor:
    """As torch.empty_like, whose kernel is python: x's order of dimensions, dense."""
    dtype = dtype or x.dtype
    if x.is_contiguous() or memory_format is torch.contiguous_format:
        return torch.empty(x.shape, dtype=dtype, device=META)
    order = sorted(range(x.dim()), key=lambda d: -x.stride(d))  # stable: equal strides keep their order
    strides, step = [0] * x.dim(), 1
    for d in reversed(order):
        strides[d], step = step, step * x.shape[d]
    return torch.empty_strided(x.shape, strides, dtype=dtype, device=META)


def _grouped_mm(a, b, offs=None, bias=None, out_dtype=None):
    if a.dim() == 2 and b.dim() == 2:
        return _empty(offs.shape[0], a.shape[0], b.shape[1], like=a)
    if a.dim() == 2:
        return _empty(a.shape[0], b.shape[2], like=a)
    return _empty(*a.shape[:-1], b.shape[-1], like=a)


def _attention(q, k, v, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None):
    out = _empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3], like=q).transpose(1, 2)
    return out, torch.empty(q.shape[:3], dtype=torch.float32, device=META)


def _attention_backward(grad, q, k, v, out, logsumexp, dropout_p, is_causal, *, attn_mask=None, scale=None):
    return tuple(_empty(t.shape[0], t.shape[2], t.shape[1], t.shape[3], like=t).transpose(1, 2) for t in (q, k, v))


def _cat(tensors, dim=0):
    kept = [t for t in tensors if t.shape != (0,)] or tensors
    sizes = list(kept[0].shape)
    sizes[dim] = sum(t.shape[dim] for t in kept)
    dtype = kept[0].dtype
    for t in kept[1:]:
        dtype = torch.promote_types(dtype, t.dtype)
    return torch.empty(sizes, dtype=dtype, device=META)


def _cumsum(x, dim, *, dtype=None):
    integer = not (x.dtype.is_floating_point or x.dtype.is_complex)
    return _new(x, dtype or (torch.int64 if integer else x.dtype))


def _stack(tensors, dim=0):
    return _cat([t.unsqueeze(dim) for t in tensors], dim)


def _reduce(x, dim=None, keepdim=False, *, dtype=None):
    """Sums, means and norms."""
    dims = range(x.dim()) if not dim and dim != 0 else [dim] if isinstance(dim, int) else dim
    gone = {d % x.dim() for d in dims} if x.dim() else set()
    sizes = [1 if d in gone else n for d, n in enumerate(x.shape) if keepdim or d not in gone]
    return torch.empty(sizes, dtype=dtype or (x.dtype if x.is_floating_point() else torch.int64), device=META)


def _topk(x, k, dim=-1, largest=True, sorted=True):
    sizes = list(x.shape)
    sizes[dim] = k
    return _empty(*sizes, like=x), torch.empty(sizes, dtype=torch.int64, device=META)


def _sort(x, *args, **kwargs):
    return _new(x), _new(x, torch.int64)


def _searchsorted(x, values, *, out_int32=False, right=False, side=None, sorter=None):
    return _new(values, torch.int32 if out_int32 else torch.int64)


def _index(x, indices):
    """By whole numbers, at one place or at adjacent ones; anything else is left to torch."""
    places = [i for i, index in enumerate(indices) if index is not None]
    if places != list(range(places[0], places[-1] + 1)) or any(indices[i].dtype == torch.bool for i in places):
        return aten.index.Tensor(x, indices)
    chosen = _broadcast([indices[i].shape for i in places])
    return _empty(*x.shape[:places[0]], *chosen, *x.shape[places[-1] + 1:], like=x)


def _arange(*bounds, dtype=None, layout=None, device=None, pin_memory=None):
    start, end, step = (0, *bounds, 1) if len(bounds) == 1 else (*bounds, 1) if len(bounds) == 2 else bounds
    whole = all(isinstance(b, int) for b in bounds)
    return torch.empty(max(0, math.ceil((end - start) / step)), device=META,
                       dtype=dtype or (torch.int64 if whole else torch.get_default_dtype()))


def _broadcast(sizes):
    """As torch.broadcast_shapes, which imports a symbolic algebra."""
    out = [1] * max(map(len, sizes), default=0)
    for size in sizes:
        for i, n in enumerate(reversed(size), 1):
            if n != 1:
                out[-i] = n
    return torch.Size(out)


def _copy(x, *, dtype=None, layout=None, device=None, pin_memory=None, non_blocking=False,
          memory_format=torch.preserve_format):
    return _new(x, dtype, memory_format)


def _repeat(x, repeats):
    sizes = [1] * (len(repeats) - x.dim()) + list(x.shape)
    return _empty(*(n * r for n, r in zip(sizes, repeats, strict=True)), like=x)


def _softmax(x, dim, half_to_float):
    return _new(x, torch.float32 if half_to_float else None)


def _like_first(x, *args, **kwargs):
    return _new(x)


_RULES: dict[Any, Callable[..., Any]] = {
    aten.embedding.default: lambda table, ids, *_: _empty(*ids.shape, table.shape[1], like=table),
    aten.mm.default: lambda a, b: _empty(a.shape[0], b.shape[1], like=a),
    aten.addmm.default: lambda x, a, b, **_: _empty(a.shape[0], b.shape[1], like=a),
    aten.bmm.default: lambda a, b: _empty(*a.shape[:2], b.shape[2], like=a),
    aten.baddbmm.default: lambda x, a, b, **_: _empty(*a.shape[:2], b.shape[2], like=a),
    aten.topk.default: _topk,
    aten.sort.default: _sort,
    aten.sort.stable: _sort,
    aten.searchsorted.Tensor: _searchsorted,
    aten.gather.default: lambda x, dim, index, **_: _new(index, x.dtype, torch.contiguous_format),
    aten.index.Tensor: _index,
    aten.index_select.default: lambda x, dim, index: _empty(*x.shape[:dim], index.numel(), *x.shape[dim:][1:], like=x),
    aten.index_add.default: _like_first,
    aten.scatter.src: _like_first,
    aten.scatter.value: _like_first,
    aten.scatter_add.default: _like_first,
    aten.slice_backward.default: lambda grad, sizes, *_: _empty(*sizes, like=grad),
    aten.select_backward.default: lambda grad, sizes, *_: _empty(*sizes, like=grad),
    aten.embedding_dense_backward.default: lambda grad, ids, rows, *_: _empty(rows, grad.shape[-1], like=grad),
    aten.arange.default: _arange,
    aten.arange.start: _arange,
    aten.arange.start_step: _arange,
    aten.repeat.default: _repeat,
    aten.mv.default: lambda matrix, vector: _empty(matrix.shape[0], like=matrix),
    aten._softmax.default: _softmax,
    aten._log_softmax.default: _softmax,
    aten.softplus_backward.default: _like_first,
    aten.tril.default: _like_first,
    aten.triu.default: _like_first,
    aten._grouped_mm.default: _grouped_mm,
    aten._scaled_dot_product_flash_attention_for_cpu.default: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _attention_backward,
    aten._fused_sdp_choice.default: lambda *args, **kwargs: 1,  # a fused kernel, as every accelerator has
    aten._reshape_alias.default: lambda x, sizes, strides: x.as_strided(sizes, strides),
    aten._unsafe_view.default: lambda x, sizes: x.view(sizes),
    aten._to_copy.default: _copy,
    aten.clone.default: _copy,
    aten.empty_like.default: _copy,
    aten.ones_like.default: _copy,
    aten.zeros_like.default: _copy,
    aten.full_like.default: lambda x, _, **options: _copy(x, **options),
    aten.cat.default: _cat,
    aten.cumsum.default: _cumsum,
    aten.stack.default: _stack,
    aten.sum.default: _reduce,
    aten.sum.dim_IntList: _reduce,
    aten.mean.default: _reduce,
    aten.mean.dim: _reduce,
    aten.logsumexp.default: _reduce,
    aten.amax.default: lambda x, dim=(), keepdim=False: _reduce(x, dim, keepdim, dtype=x.dtype),
    aten.linalg_vector_norm.default: lambda x, ord=2, dim=None, keepdim=False, *, dtype=None:
        _reduce(x, dim, keepdim, dtype=dtype),
}


_KINDS: dict[Any, str] = {torch.ops.prim.device.default: "device", aten._unsafe_view.default: "view"}


def _kind(func: Any) -> str:
    """Whether an operation writes into an argument, gives a view of one, or makes a new tensor."""
    schema = func._schema
    views = any(r.alias_info is not None for r in schema.returns)
    _KINDS[func] = "writes" if schema.is_mutable else "view" if views else "new"
    return _KINDS[func]


def _pointwise(func: Any, args: list, kwargs: dict) -> Any:
    """Sizes by broadcasting; dtypes by running the operation on one element; strides of the first full input."""

    def one(value: Any) -> Any:
        return torch.ones((1,) * value.dim(), dtype=value.dtype) if isinstance(value, Tensor) else value

    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
    sizes = _broadcast([t.shape for t in tensors])
    pattern = next((t for t in tensors if t.shape == sizes), None)

    def grow(one: Any) -> Any:
        if not isinstance(one, Tensor):
            return one
        if pattern is not None:
            return _new(pattern, one.dtype)
        return torch.empty(sizes, dtype=one.dtype, device=META)

    result = func(*map(one, args), **{k: one(v) for k, v in kwargs.items()})
    return tuple(map(grow, result)) if isinstance(result, tuple) else grow(result)


def _key(value: Any) -> Any:
    """What of an argument decides the result's sizes and dtype."""
    if isinstance(value, Shape):
        meta = value.meta
        return meta.shape, meta.stride(), meta.dtype
    if value.__class__ is int:
        return value
    if isinstance(value, list | tuple):
        return tuple(map(_key, value))
    return value.__class__, value  # 1, 1.0 and True are equal and give different dtypes


class ShapeMode(TorchDispatchMode):
    """Runs every operation on shapes alone; tensors made inside are `Shape`s.

    Raises UserError for an operation whose result depends on data.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # wrapping for the compiler would import it

    #: results by operation and arguments: recomputation, chunks and rows repeat most of them
    _seen: ClassVar[dict[Any, Any]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kind = _KINDS.get(func) or _kind(func)
        if kind == "device":
            return CPU
        kwargs = kwargs or {}
        if kind == "writes":
            return kwargs["out"] if "out" in kwargs else args[0]
        if kind == "view":
            result = self._run(func, args, kwargs)
            return Shape(result) if isinstance(result, Tensor) else tree_map(_shape, result)
        key = (func, _key(args), _key(tuple(kwargs.items())) if kwargs else None)
        if key not in self._seen:
            self._seen[key] = self._run(func, args, kwargs)
        return self._fresh(self._seen[key])

    def _fresh(self, value: Any) -> Any:
        """Tensors like those of an earlier call, in memory of their own."""
        if isinstance(value, Tensor):
            new = Shape(torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=META))
            self.made(new)
            return new
        return tuple(map(self._fresh, value)) if isinstance(value, tuple | list) else value

    def made(self, tensor: Shape) -> None:
        """Called with each tensor that has new memory, not with views and results written in place."""

    @staticmethod
    def _run(func: Any, args: tuple, kwargs: dict) -> Any:
        flat = [[_meta(x) for x in a] if isinstance(a, list | tuple) else _meta(a) for a in args]
        named = {k: _meta(v) for k, v in kwargs.items()}
        try:
            if func in _RULES:
                return _RULES[func](*flat, **named)
            if torch.Tag.pointwise in func.tags or func is aten.floor_divide.default:
                return _pointwise(func, flat, named)
            return func(*flat, **named)
        except (NotImplementedError, RuntimeError) as error:
            if torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags:
                raise UserError(f"{func} needs the data of a tensor: a training forward must not read values on the "
                                "host nor make shapes that depend on them") from error
            raise
