"""Tensors that have a shape, a dtype and a device but no data, and a mode that runs torch on them.

torch's own FakeTensorMode does the same and more; it takes two seconds to import and a fifth of a millisecond for
each operation, which is too much for an answer at once. So the operations that models are made of have rules
(`operations`), and any other is asked of it. The tests hold all of them against tensors with data.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from tryplicity.errors import UserError
from tryplicity.planner.operations import META, has_rule, kind_of, result_of

CPU = torch.device("cpu")


class Shape(Tensor):
    """Looks like a CPU tensor; `meta` is the tensor on the meta device that knows its sizes and storage."""

    meta: Tensor

    @staticmethod
    def __new__(cls, meta: Tensor) -> Shape:
        self = Tensor._make_wrapper_subclass(cls, meta.shape, strides=meta.stride(), dtype=meta.dtype, device=CPU,
                                             storage_offset=meta.storage_offset())
        if meta.is_conj() or meta.is_neg():  # views that later operations see as such, or make real
            torch._C._set_conj(self, meta.is_conj())
            torch._C._set_neg(self, meta.is_neg())
        self.meta = meta
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} on a tensor without data outside of its mode")

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Shape({tuple(self.meta.shape)}, {self.meta.dtype})"


def _become(tensor: Shape, meta: Tensor) -> None:
    """A tensor has another's sizes, strides and storage from now on."""
    with torch._C._DisableTorchDispatch():
        tensor.data = Shape(meta)
    tensor.meta = meta


def shape_like(tensor: Tensor, dtype: torch.dtype | None = None) -> Shape:
    """A tensor without data, contiguous, of another's sizes."""
    return Shape(torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device=META))


def _meta(value: Any) -> Any:
    if isinstance(value, Shape):
        return value.meta
    return value.to(META) if isinstance(value, Tensor) else META if value == CPU else value


def _shape(value: Any) -> Any:
    return Shape(value) if isinstance(value, Tensor) else value


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
        kind = kind_of(func)
        kwargs = kwargs or {}
        how = kind.how
        if how == "device":
            return CPU
        if how == "writes":
            back = [kwargs[place] if isinstance(place, str) else args[place] for place in kind.returns]
            if not any(isinstance(place, str) and out.numel() == 0
                       for place, out in zip(kind.returns, back, strict=True)):
                return back[0] if len(back) == 1 else tuple(back) or None
        elif how == "view":
            result = _run(func, args, kwargs)
            return Shape(result) if isinstance(result, Tensor) else tree_map(_shape, result)
        elif how == "reshapes":
            _run(func, args, kwargs)  # its meta
            _become(args[0], args[0].meta)
            self.changed(args[0])
            return args[0]
        elif how == "new":
            key = (func, _key(args), _key(tuple(kwargs.items())) if kwargs else None)
            if key not in self._seen:
                self._seen[key] = _run(func, args, kwargs) if has_rule(func) else NotImplemented
            if self._seen[key] is not NotImplemented:
                return self._fresh(self._seen[key])
        return self._ask_torch(func, args, kwargs)

    def _fresh(self, value: Any) -> Any:
        """Tensors like those of an earlier call, in memory of their own."""
        if isinstance(value, Tensor):
            new = Shape(torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=META))
            self.made(new)
            return new
        return tuple(map(self._fresh, value)) if isinstance(value, tuple | list) else value

    def made(self, tensor: Shape) -> None:
        """Called with each tensor that has new memory, not with views and results written in place."""

    def changed(self, tensor: Shape) -> None:
        """Called with a tensor whose memory may have become another or larger."""

    def _ask_torch(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """Run an operation without a rule under torch's own FakeTensorMode."""
        from torch._subclasses import fake_tensor

        mode = fake_tensor.FakeTensorMode()
        fakes: list[tuple[Shape, Tensor]] = []

        def fake(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if not isinstance(value, Shape):
                return mode.from_tensor(value)
            fakes.append((value, fake_tensor.FakeTensor(mode, value.meta, CPU)))
            return fakes[-1][1]

        def known(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            own = next((shape for shape, fake in fakes if fake is value), None)
            if own is not None:
                return own
            new = Shape(_as_meta(value))
            storage = value.untyped_storage()._cdata
            if storage not in storages:
                storages.add(storage)
                self.made(new)
            return new

        arguments = tree_map(fake, (args, kwargs))
        try:
            with mode:
                result = func(*arguments[0], **arguments[1])
        except (fake_tensor.DataDependentOutputException, fake_tensor.DynamicOutputShapeException) as error:
            raise UserError(f"{func} needs the data of a tensor: a training forward must not read values on the "
                            "host nor make shapes that depend on them") from error
        except fake_tensor.UnsupportedOperatorException as error:
            raise UserError(f"{func} has no rule for the shapes of its results: give it one with "
                            "torch.library.register_fake") from error
        storages = {fake.untyped_storage()._cdata for _, fake in fakes}
        for shape, fake in fakes:
            if (fake.shape, fake.stride(), fake.storage_offset()) != (shape.shape, shape.stride(),
                                                                      shape.storage_offset()):
                _become(shape, _as_meta(fake))
                self.changed(shape)
        return tree_map(known, result)


def _as_meta(fake: Tensor) -> Tensor:
    """A tensor on the meta device in a fake tensor's memory."""
    meta = torch.empty(0, dtype=fake.dtype, device=META)
    return meta.set_(fake.untyped_storage(), fake.storage_offset(), fake.shape, fake.stride())


def _run(func: Any, args: tuple, kwargs: dict) -> Any:
    flat = [[_meta(x) for x in a] if isinstance(a, list | tuple) else _meta(a) for a in args]
    named = {k: _meta(v) for k, v in kwargs.items()}
    return result_of(func, flat, named)
