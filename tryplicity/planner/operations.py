"""What each operation that models are made of gives for tensors without data, on the meta device: sizes, strides and
dtypes, without the Python of torch's own rules, which takes longer than an answer at once may."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

aten = torch.ops.aten
META = torch.device("meta")


def _empty(*sizes: int, like: Tensor) -> Tensor:
    return torch.empty(sizes, dtype=like.dtype, device=META)


def _new(x: Tensor, dtype: torch.dtype | None = None, memory_format: Any = None) -> Tensor:
    """As torch.empty_like, whose kernel is python: x's order of dimensions, dense."""
    dtype = dtype or x.dtype
    if memory_format not in (None, torch.preserve_format, torch.contiguous_format):
        return torch.empty(x.shape, dtype=dtype, device=META, memory_format=memory_format)
    if x.is_contiguous() or memory_format is torch.contiguous_format:
        return torch.empty(x.shape, dtype=dtype, device=META)
    strides = x.stride() if _dense(x) else _dense_strides(x.shape, [x])
    return torch.empty_strided(x.shape, strides, dtype=dtype, device=META)


def _dense(x: Tensor) -> bool:
    """Whether x fills its memory without gap or overlap."""
    step = 1
    for size, stride in sorted(((n, s) for n, s in zip(x.shape, x.stride(), strict=True) if n != 1),
                               key=lambda pair: pair[1]):
        if stride != step:
            return False
        step *= size
    return True


def _dense_strides(sizes: Sequence[int], inputs: Sequence[Tensor]) -> list[int]:
    """Of a new tensor, in the order of dimensions of its inputs, which broadcast to its sizes: the first whose strides
    tell two dimensions apart decides (torch's TensorIterator, reorder_dimensions)."""
    rank = len(sizes)
    known = []
    for x in inputs:
        lead = rank - x.dim()
        known.append([0] * lead + [0 if n == 1 and sizes[lead + d] != 1 else s
                                   for d, (n, s) in enumerate(zip(x.shape, x.stride(), strict=True))])

    def outer(a: int, b: int) -> int:
        """1 where dimension a lies outside of b, -1 inside, 0 where nothing tells."""
        for strides in known:
            if strides[a] and strides[b]:
                if strides[a] != strides[b]:
                    return 1 if strides[a] > strides[b] else -1
                if sizes[a] > sizes[b]:
                    return 1
        return 0

    order = list(range(rank))[::-1]  # from the inside out
    for i in range(1, rank):
        at = i
        for before in range(i - 1, -1, -1):
            found = outer(order[before], order[at])
            if found > 0:
                order[before], order[at] = order[at], order[before]
                at = before
            elif found < 0:
                break
    strides, step = [0] * rank, 1
    for d in order:
        strides[d] = step
        step *= max(sizes[d], 1)
    return strides


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
    return torch.empty(x.shape, dtype=dtype or (torch.int64 if integer else x.dtype), device=META)


def _masked_fill(x, mask, value):
    return torch.empty(_broadcast([x.shape, mask.shape]), dtype=x.dtype, device=META)


def _stack(tensors, dim=0):
    return _cat([t.unsqueeze(dim) for t in tensors], dim)


def _reduce(x, dim=None, keepdim=False, *, dtype=None):
    """Sums and means."""
    integer = not (x.dtype.is_floating_point or x.dtype.is_complex)
    dims = range(x.dim()) if not dim and dim != 0 else [dim] if isinstance(dim, int) else dim
    gone = {d % x.dim() for d in dims} if x.dim() else set()
    sizes = [1 if d in gone else n for d, n in enumerate(x.shape) if keepdim or d not in gone]
    return torch.empty(sizes, dtype=dtype or (torch.int64 if integer else x.dtype), device=META)


def _norm(x, ord=2, dim=None, keepdim=False, *, dtype=None):
    return _reduce(x, dim, keepdim, dtype=(dtype or x.dtype).to_real())


def _argmax(x, dim=None, keepdim=False):
    return _reduce(x, dim, keepdim, dtype=torch.int64)


def _topk(x, k, dim=-1, largest=True, sorted=True):
    sizes = list(x.shape)
    sizes[dim] = k
    return _empty(*sizes, like=x), torch.empty(sizes, dtype=torch.int64, device=META)


def _sort(x, *args, **kwargs):
    return _new(x), _new(x, torch.int64)


def _searchsorted(x, values, *, out_int32=False, right=False, side=None, sorter=None):
    return torch.empty(values.shape, dtype=torch.int32 if out_int32 else torch.int64, device=META)


def _bucketize(values, boundaries, *, out_int32=False, right=False):
    return _searchsorted(boundaries, values, out_int32=out_int32)


def _pad(x, pad, value=0):
    """pad: before and after, from the last dimension on; below zero it cuts. A mere cut is a copy of what is left, and
    torch's own rule would import the compiler for it."""
    if max(pad) > 0:
        return aten.constant_pad_nd.default(x, pad, value)
    for dim, (before, after) in enumerate(zip(pad[::2], pad[1::2], strict=True), 1):
        x = x.narrow(-dim, -before, x.shape[-dim] + before + after)
    return _new(x)


def _index(x, indices):
    """By whole numbers, at one place or at adjacent ones."""
    places = [i for i, index in enumerate(indices) if index is not None]
    if places != list(range(places[0], places[-1] + 1)) or any(indices[i].dtype == torch.bool for i in places):
        return NotImplemented
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


def _lstm(x, w_FI, w_FH, b_F, b2_F, h_BH, c_BH, *args, **kwargs):
    """oneDNN's LSTM, which a CPU runs. Its workspace is not told by torch: gates, states and their gradients of every
    step, rows a little longer where they would be a multiple of 1 KB; found by running it, right to 2 % in fp32 and
    bf16."""
    T, B, I, H, size = *x.shape, h_BH.shape[-1], x.element_size()

    def row(n: int) -> int:
        n = -(-n // 16) * 16
        return n + 16 if n % 256 == 0 else n

    kept = B * (T * row(4 * H) + (T + 1) * (3 * row(H) + 2 * row(max(I, H))))
    gradients = B * (T + 1) * (2 * row(H) + 4 * row(max(I, H)))  # in fp32
    workspace = torch.empty(kept * size + gradients * 4 + 2**14, dtype=torch.uint8, device=META)
    return _empty(T, B, H, like=x), _new(h_BH), _new(c_BH), workspace


def _lstm_backward(*args):
    return tuple(map(_new, args[:7]))


def _like_first(x, *args, **kwargs):
    return _new(x)


_RULES: dict[Any, Callable[..., Any]] = {
    aten.embedding.default: lambda table, ids, *_: _empty(*ids.shape, table.shape[1], like=table),
    aten.mm.default: lambda a, b: _empty(a.shape[0], b.shape[1], like=a),
    aten.addmm.default: lambda x, a, b, **_: _empty(a.shape[0], b.shape[1], like=a),
    aten.bmm.default: lambda a, b: _empty(*a.shape[:2], b.shape[2], like=a),
    aten.baddbmm.default: lambda x, a, b, **_: _empty(*a.shape[:2], b.shape[2], like=a),
    aten.argmax.default: _argmax,
    aten.argmin.default: _argmax,
    aten.topk.default: _topk,
    aten.sort.default: _sort,
    aten.sort.stable: _sort,
    aten.searchsorted.Tensor: _searchsorted,
    aten.constant_pad_nd.default: _pad,
    aten.bucketize.Tensor: _bucketize,
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
    aten.mkldnn_rnn_layer.default: _lstm,
    aten.mkldnn_rnn_layer_backward.default: _lstm_backward,
    aten.softplus_backward.default: _like_first,
    aten.tril.default: _like_first,
    aten.flip.default: _like_first,
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
    aten.masked_fill.Scalar: _masked_fill,
    aten.masked_fill.Tensor: _masked_fill,
    aten.stack.default: _stack,
    aten.sum.default: _reduce,
    aten.sum.dim_IntList: _reduce,
    aten.mean.default: _reduce,
    aten.mean.dim: _reduce,
    aten.logsumexp.default: _reduce,
    aten.amax.default: lambda x, dim=(), keepdim=False: _reduce(x, dim, keepdim, dtype=x.dtype),
    aten.linalg_vector_norm.default: _norm,
}


#: operations that need no rule: the meta device runs them, in C++, as a CPU does
_ON_META = {
    aten.constant_pad_nd.default, aten.empty.memory_format, aten.empty_strided.default, aten.eye.default,
    aten.full.default, aten.new_empty.default, aten.new_empty_strided.default, aten.new_full.default,
    aten.new_ones.default, aten.new_zeros.default, aten.ones.default, aten.promote_types.default,
    aten.scalar_tensor.default, aten.zeros.default}


class Kind(NamedTuple):
    """How an operation is run: `returns` says which arguments it gives back, by position or name, where it only
    writes into them."""

    how: str  # device, writes, view, reshapes, new or any
    returns: tuple[int | str, ...] = ()


_KINDS: dict[Any, Kind] = {torch.ops.prim.device.default: Kind("device"), **dict.fromkeys(
    (aten._unsafe_view.default, aten.unsafe_split.Tensor, aten.unsafe_split_with_sizes.default), Kind("view"))}


@functools.cache
def kind_of(func: Any) -> Kind:
    """How an operation is run, by its schema."""
    if func in _KINDS:
        return _KINDS[func]
    schema = func._schema
    written: dict[str, int | str] = {}
    for place, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written |= dict.fromkeys(argument.alias_info.before_set, argument.name if argument.kwarg_only else place)
    aliases = [r.alias_info and next(iter(r.alias_info.before_set), "*") for r in schema.returns]
    if torch.Tag.inplace_view in func.tags and aliases and aliases[0] in written:
        kind = Kind("reshapes")
    elif schema.is_mutable and all(alias in written for alias in aliases):
        kind = Kind("writes", tuple(written[alias] for alias in aliases))
    elif schema.is_mutable:
        kind = Kind("any")
    elif all(aliases) and aliases:
        kind = Kind("view")
    else:
        kind = Kind("any" if any(aliases) else "new")
    return kind


def has_rule(func: Any) -> bool:
    """Whether `result_of` may be asked."""
    if func in _RULES or func in _ON_META or func is aten.floor_divide.default or func.namespace == "tryplicity":
        return True
    return torch.Tag.pointwise in func.tags and torch.Tag.nondeterministic_seeded not in func.tags


def _pointwise(func: Any, args: list, kwargs: dict) -> Any:
    """Sizes by broadcasting; dtypes by running the operation on one element; strides as the inputs'."""

    def one(value: Any) -> Any:
        return torch.ones((1,) * value.dim(), dtype=value.dtype) if isinstance(value, Tensor) else value

    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
    sizes = _broadcast([t.shape for t in tensors])
    pattern = next((t for t in tensors if t.shape == sizes), None)
    alike = pattern is not None and all((t.shape == sizes and t.stride() == pattern.stride()) or t.dim() == 0
                                        for t in tensors)
    strides = None if alike else _dense_strides(sizes, tensors)

    def grow(one: Any) -> Any:
        if not isinstance(one, Tensor):
            return one
        if strides is None:
            return _new(pattern, one.dtype)
        return torch.empty_strided(sizes, strides, dtype=one.dtype, device=META)

    result = func(*map(one, args), **{k: one(v) for k, v in kwargs.items()})
    return tuple(map(grow, result)) if isinstance(result, tuple) else grow(result)


def result_of(func: Any, args: list, kwargs: dict) -> Any:
    """What an operation that has a rule gives for tensors on the meta device."""
    if func in _RULES:
        return _RULES[func](*args, **kwargs)
    if torch.Tag.pointwise in func.tags or func is aten.floor_divide.default:
        return _pointwise(func, args, kwargs)
    return func(*args, **kwargs)
