"""What C is told of a layer as a whole: a struct made once, not for every token."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from tryplicity import Linear, kernels
from tryplicity_plugins.layers import native

#: a struct for C, the tensors whose addresses it holds, and the linears whose packed matrices it names, if they are
Description = tuple[ctypes.Structure, Sequence[Tensor], Sequence[Linear]]


class Products(ctypes.Structure):
    """products.h"""

    _fields_ = [("linear", ctypes.c_void_p), ("experts", ctypes.c_void_p)]


class KeptStruct:
    """A struct and where it lies."""

    def __init__(self, module: nn.Module, struct: ctypes.Structure, tensors: Sequence[Tensor],
                 linears: Sequence[Linear]) -> None:
        self.struct, self.address = struct, ctypes.addressof(struct)
        self.tensors, self.pointers = tensors, [tensor.data_ptr() for tensor in tensors]
        self.linears, self.matrices = linears, [getattr(linear, "matrix", None) for linear in linears]
        self.places = _places(module, tensors)

    def holds(self) -> bool:
        """Whether all that the struct tells of is still the module's own, and lies where it did."""
        return ([tensor.data_ptr() for tensor in self.tensors] == self.pointers
                and all(held.get(name) is thing for held, name, thing in self.places)
                and all(getattr(linear, "matrix", None) is matrix
                        for linear, matrix in zip(self.linears, self.matrices, strict=True)))

    def __reduce__(self):
        return type(None), ()  # a copy of the module tells C of itself


def _places(module: nn.Module, tensors: Sequence[Tensor]) -> list[tuple[dict, str, Tensor | nn.Module]]:
    """Where the module and those inside it hold these tensors, and each other: another in its place is to be told."""
    told = {id(tensor) for tensor in tensors}
    return [(held, name, thing) for owner in module.modules()
            for held in (owner._parameters, owner._buffers, owner._modules)
            for name, thing in held.items() if id(thing) in told or held is owner._modules]


def kept_struct(module: nn.Module, tell: Callable[[], Description | None]) -> KeptStruct | None:
    """What `tell` told of the module, asked again when something has moved or another is in its place; None where C
    cannot do it."""
    kept = module.__dict__.get("_c_struct")
    if kept is not None and kept.holds():
        return kept
    told = tell() if native.library() is not None else None
    kept = None if told is None or not native.plain(*told[1]) else KeptStruct(module, *told)
    module.__dict__["_c_struct"] = kept
    return kept


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def matrix_of(linear: nn.Module) -> kernels.PackedMatrix | None:
    """What the core's products can multiply by, if the linear is packed so; a stranger's may call anything `matrix`."""
    found = getattr(linear, "matrix", None)
    return found if isinstance(found, kernels.PackedMatrix) else None


def packed(*linears: Linear) -> list[int] | None:
    """The addresses of their matrices, if all are packed and C can multiply by them."""
    matrices = [matrix_of(linear) for linear in linears]
    if any(matrix is None or matrix.address is None for matrix in matrices):
        return None
    return None if any(linear.bias is not None for linear in linears) else [matrix.address for matrix in matrices]


def products() -> Products:
    return Products(kernels.entry("linear"), kernels.entry("experts"))


def describes(component: object, tells: tuple[str, ...], methods: tuple[str, ...]) -> bool:
    """Whether what C is told is said by a class that also has the last word on what is done: a subclass that
    overrides a method, and tells C nothing of it, is done in Python."""
    classes = type(component).__mro__

    def level(name: str) -> int:
        return next((i for i, cls in enumerate(classes) if name in vars(cls)), len(classes))

    return min(map(level, tells)) <= min(map(level, methods))
