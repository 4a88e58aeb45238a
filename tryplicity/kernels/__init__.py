"""Products with ternary matrices kept in 2 bits a weight, and the packing in 1.6 bits that a file has.

On the CPU own C++ does the work, compiled when first used; on a card Triton does that of few tokens (cards.py
chooses). Plain PyTorch (plain.py) does the rest, and all where there is no compiler or TRYPLICITY_KERNELS=0 says so,
with the same numbers. The result of a row has the same bits whatever other rows it comes with and however many threads
there are.

Shapes: N tokens, O out, D in, E experts, S pairs of a token and an expert, V rows of a table, P = ceil(D / 5).
"""

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

from tryplicity.errors import UserError
from tryplicity.kernels import cards, compiling, plain
from tryplicity.kernels.compiling import compile_library
from tryplicity.kernels.trying import constant, on_its_device, tried

__all__ = ["TernaryMatrix", "compile_library", "constant", "entry", "on_its_device", "pack", "quantise", "rows_linear",
           "ternary_experts", "ternary_linear", "tried", "unpack", "why_not"]

_SOURCES = [Path(__file__).with_name(name) for name in ("ternary.cpp", "parallel.cpp")]
HUGE_PAGE, BLOCK = 1 << 21, 1 << 25
_block, _allocating = torch.empty(0, dtype=torch.uint8), threading.Lock()
_TABLES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}


@functools.cache
def _library() -> ctypes.CDLL | None:
    library = compile_library(*_SOURCES)
    if library is None:
        return None
    p, n, i = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    for name, result, arguments in [
        ("quantise", None, [p, n, n, n, p, p, p, i]),
        ("linear", i, [p, p, n, p, p, i]),
        ("experts", i, [p, p, n, p, p, n, p, p, p, p, n, i]),
        ("planes", i, [p, p, n, n, n, n, n, p, i]),
        ("pack", None, [p, n, n, p, i]),
        ("unpack", None, [p, n, n, p, i]),
        ("rows", None, [i, p, p, p, n, n, n, p, i]),
    ]:
        function = getattr(library, f"tryplicity_{name}")
        function.restype, function.argtypes = result, arguments
    return library


def why_not() -> str | None:
    """Why plain PyTorch does the work here or in another library that was asked for, in one line for whoever waits for
    it to read; None if it does not."""
    _library()
    return compiling.why_not()


def _native(*tensors: Tensor | None) -> ctypes.CDLL | None:
    """The library, if the tensors are where it can reach them."""
    return _library() if all(t is None or t.is_cpu for t in tensors) else None


def entry(name: str) -> int | None:
    """The address of `tryplicity_<name>` in the C++ here, for C++ elsewhere to call; None without a library."""
    library = _library()
    return None if library is None else ctypes.cast(getattr(library, f"tryplicity_{name}"), ctypes.c_void_p).value


class _Shape(ctypes.Structure):
    """What C++ knows of a matrix."""

    _fields_ = [(name, ctypes.c_int64) for name in ("experts", "out", "in", "groups", "blocks")]
    _fields_ += [("scale", ctypes.c_void_p), ("planes", ctypes.c_void_p)]


class TernaryMatrix:
    """Digits -1, 0, 1 [O, D], or [E, O, D] of several experts, times one scale a matrix; 2 bits a digit, padded.

    experts: None for a single matrix. scale_E: fp32 [E], [1] for a single one. planes: uint8 [E or 1, ceil(O/4),
    ceil(D/128), 4, 32]; a byte holds four columns 32 apart, two bits each (digit + 1).
    """

    def __init__(self, planes: Tensor, scale_E: Tensor, out_features: int, in_features: int,
                 experts: int | None) -> None:
        self.planes, self.scale_E = planes, scale_E
        self.out_features, self.in_features, self.experts = out_features, in_features, experts
        self._library = _native(planes)
        if self._library is not None:
            count, groups, blocks = planes.shape[:3]
            self._shape = _Shape(count, out_features, in_features, groups, blocks, scale_E.data_ptr(),
                                 planes.data_ptr())
            self._address = ctypes.addressof(self._shape)

    @classmethod
    def from_digits(cls, digits: Tensor, scale: Tensor | float) -> TernaryMatrix:
        """digits -1, 0, 1 of any dtype [O, D] or [E, O, D]; scale one number a matrix, in any shape."""
        digits_EOD = _stack(digits).to(torch.int8).contiguous()
        library = _native(digits_EOD)
        if library is None:
            planes = plain.planes(digits_EOD)
        else:
            planes = _planes(library, digits_EOD.data_ptr(), None, *digits_EOD.shape)
        return cls(planes, _scales(scale, digits_EOD), *digits.shape[-2:], *_experts(digits))

    @classmethod
    def from_packed(cls, packed: Tensor, scale: Tensor | float, in_features: int) -> TernaryMatrix:
        """packed uint8 [O, P] or [E, O, P] as `pack` makes it; may lie in a mapped file, read once, front to back."""
        if packed.dtype != torch.uint8 or packed.shape[-1] != -(-in_features // 5):
            raise UserError(f"{in_features} columns pack into {-(-in_features // 5)} bytes (torch.uint8), not "
                            f"{packed.shape[-1]} ({packed.dtype}): another model's file?")
        packed_EOP = _stack(packed).contiguous()
        library = _native(packed_EOP)
        if library is None:
            if packed_EOP.numel() and packed_EOP.amax() > 242:
                raise _damaged()
            planes = plain.planes_of_packed(packed_EOP, in_features)
        else:
            planes = _planes(library, None, packed_EOP.data_ptr(), *packed_EOP.shape[:2], in_features)
        return cls(planes, _scales(scale, packed_EOP), packed.shape[-2], in_features, *_experts(packed))

    def digits(self, expert: int | None = None) -> Tensor:
        """int8 [O, D], of one expert if it is named, or [E, O, D]."""
        if expert is not None:
            return plain.digits(self.planes[expert])[: self.out_features, : self.in_features]
        digits_EOD = torch.stack([plain.digits(planes)[: self.out_features, : self.in_features]
                                  for planes in self.planes])
        return digits_EOD[0] if self.experts is None else digits_EOD

    def to(self, device: torch.device | str) -> TernaryMatrix:
        return TernaryMatrix(self.planes.to(device), self.scale_E.to(device), self.out_features, self.in_features,
                             self.experts)

    @property
    def address(self) -> int | None:
        """Of the struct that C++ knows it by, which lives as long as this object; None where C++ cannot reach it."""
        return None if self._library is None else self._address

    @property
    def nbytes(self) -> int:
        return self.planes.nbytes + self.scale_E.nbytes

    @property
    def padded(self) -> int:
        """Columns with what pads them to whole blocks."""
        return self.planes.shape[2] * plain.COLUMNS

    def __reduce__(self):
        return TernaryMatrix, (self.planes, self.scale_E, self.out_features, self.in_features, self.experts)

    def __repr__(self) -> str:
        stack = "" if self.experts is None else f"experts={self.experts}, "
        return f"TernaryMatrix({stack}out={self.out_features}, in={self.in_features}, {self.nbytes} bytes)"


def pack(digits: Tensor) -> Tensor:
    """uint8 [..., O, ceil(D/5)] of digits -1, 0, 1 of any dtype [..., O, D]: five base-3 digits to a byte."""
    rows = digits.reshape(-1, digits.shape[-1]).to(torch.int8).contiguous()
    library = _native(rows)
    if library is None:
        packed = plain.pack(rows)
    else:
        packed = torch.empty((len(rows), -(-rows.shape[1] // 5)), dtype=torch.uint8)
        library.tryplicity_pack(rows.data_ptr(), *rows.shape, packed.data_ptr(), torch.get_num_threads())
    return packed.view(*digits.shape[:-1], packed.shape[-1])


def unpack(packed: Tensor, in_features: int) -> Tensor:
    """int8 digits [..., O, D] of what `pack` made."""
    rows = packed.reshape(-1, packed.shape[-1]).contiguous()
    library = _native(rows)
    if library is None:
        digits = plain.unpack(rows, in_features)
    else:
        digits = torch.empty((len(rows), in_features), dtype=torch.int8)
        library.tryplicity_unpack(rows.data_ptr(), *digits.shape, digits.data_ptr(), torch.get_num_threads())
    return digits.view(*packed.shape[:-1], in_features)


def quantise(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(q int8 [N, D padded to 128], step fp32 [N], sum of q int32 [N]) of x [..., D].

    Each token divided by its rms, then in 127 steps either way up to its absmax: x ~ q * step * rms.
    """
    x_ND = _rows(x)
    padded = -(-x.shape[-1] // plain.COLUMNS) * plain.COLUMNS
    library = _native(x_ND)
    if library is None:
        return plain.quantise(x_ND, padded)
    q_ND = torch.empty((len(x_ND), padded), dtype=torch.int8)
    step_N = torch.empty(len(x_ND))
    sum_N = torch.empty(len(x_ND), dtype=torch.int32)
    library.tryplicity_quantise(x_ND.data_ptr(), *x_ND.shape, padded, q_ND.data_ptr(), step_N.data_ptr(),
                                sum_N.data_ptr(), torch.get_num_threads())
    return q_ND, step_N, sum_N


def ternary_linear(x: Tensor, matrix: TernaryMatrix, bias: Tensor | None = None) -> Tensor:
    """[..., O] of x [..., D]: the quantised tokens times the matrix, and the bias [O]."""
    shape = x.shape
    if shape[-1] != matrix.in_features:
        raise ValueError(f"tokens of {shape[-1]} features for a matrix of {matrix.in_features}")
    library = matrix._library
    if library is None or not x.is_cpu:
        products = cards.products(x, x.numel() // shape[-1], cards.FEW_TOKENS)
        y_NO = (products or plain).linear(_rows(x), matrix.planes, matrix.scale_E, matrix.out_features, bias)
        return y_NO.view(*shape[:-1], matrix.out_features).to(x.dtype)
    if x.dtype != torch.float32 or not x.is_contiguous():
        return ternary_linear(x.float().contiguous(), matrix, bias).to(x.dtype)
    y = torch.empty((*shape[:-1], matrix.out_features))
    if library.tryplicity_linear(matrix._address, x.data_ptr(), x.numel() // shape[-1],
                                 None if bias is None else bias.data_ptr(), y.data_ptr(), torch.get_num_threads()):
        raise MemoryError("no memory for the tokens of a ternary product")
    return y


def ternary_experts(x_ND: Tensor, matrix: TernaryMatrix, row_S: Tensor | None, expert_S: Tensor,
                    weight_S: Tensor | None = None, out: Tensor | None = None,
                    into_S: Tensor | None = None) -> Tensor:
    """y [S, O]: token row_S[s] (None: s itself) of x [N, D] by expert expert_S[s], int64; only those are read.

    With weight_S fp32 the weighted sum instead: out[into_S[s]] += weight_S[s] * y[s], in the order of s; into_S is
    row_S unless given, out zeros [N, O] unless given. A pair of a token or an expert that does not exist is an
    IndexError; on a card, where nobody waits to look, one of few pairs gives zeros and adds nothing.
    """
    if x_ND.shape[-1] != matrix.in_features:
        raise ValueError(f"tokens of {x_ND.shape[-1]} features for experts of {matrix.in_features}")
    library, pairs, columns = matrix._library, len(expert_S), matrix.out_features
    if weight_S is not None and out is None:
        out = x_ND.new_zeros((len(x_ND), columns), dtype=torch.float32)
    if library is None or not x_ND.is_cpu:
        products = cards.products(x_ND, pairs, cards.FEW_PAIRS)
        if row_S is None and (products is None or into_S is None):
            row_S = torch.arange(pairs, device=x_ND.device)
        y_SO = (products or plain).experts(_rows(x_ND), matrix.planes, matrix.scale_E, columns, row_S, expert_S)
        if weight_S is None:
            return y_SO
        into_S = row_S if into_S is None else into_S
        if products is None or out.dtype != torch.float32 or not out.is_contiguous():
            return out.index_add_(0, into_S, y_SO.mul_(weight_S[:, None]))
        products.add_weighted_rows(out, y_SO, _plain_float(weight_S), into_S)
        return out
    x_ND, expert_S = _plain_float(x_ND), _plain_int(expert_S)
    row_S = None if row_S is None else _plain_int(row_S)
    into_S = None if into_S is None else _plain_int(into_S)
    y_SO = torch.empty((pairs, columns))
    weights = sums = None
    if weight_S is not None:
        weight_S = _plain_float(weight_S)
        if out.dtype != torch.float32 or not out.is_contiguous():
            raise ValueError("out must be contiguous fp32")
        weights, sums = weight_S.data_ptr(), out.data_ptr()
    problem = library.tryplicity_experts(
        matrix._address, x_ND.data_ptr(), len(x_ND), None if row_S is None else row_S.data_ptr(), expert_S.data_ptr(),
        pairs, y_SO.data_ptr(), weights, None if into_S is None else into_S.data_ptr(), sums,
        0 if out is None else len(out), torch.get_num_threads())
    if problem == 1:
        raise MemoryError("no memory for the tokens of a ternary product")
    if problem:
        raise IndexError(f"a pair names a token, an expert or a sum that does not exist ({len(x_ND)} tokens, "
                         f"{matrix.experts or 1} experts)")
    return y_SO if weight_S is None else out


def rows_linear(x: Tensor, table_VD: Tensor, scale_V: Tensor | None = None) -> Tensor:
    """[..., V] fp32 of x fp32 [..., D] and a table fp32, bf16 or int8 [V, D], each row times scale_V fp32; the table
    may lie in a mapped file."""
    shape = x.shape
    if shape[-1] != table_VD.shape[-1]:
        raise ValueError(f"tokens of {shape[-1]} features for rows of {table_VD.shape[-1]}")
    kind = _TABLES.get(table_VD.dtype)
    library = _native(x, table_VD)
    if library is None or kind is None or not table_VD.is_contiguous():
        return plain.rows_linear(_rows(x), table_VD, scale_V).view(*shape[:-1], len(table_VD))
    x = _plain_float(x)
    y = torch.empty((*shape[:-1], len(table_VD)))
    library.tryplicity_rows(kind, table_VD.data_ptr(), None if scale_V is None else scale_V.data_ptr(), x.data_ptr(),
                            x.numel() // shape[-1], shape[-1], len(table_VD), y.data_ptr(), torch.get_num_threads())
    return y


def _plain_float(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float32 and x.is_contiguous() else x.float().contiguous()


def _plain_int(x: Tensor) -> Tensor:
    return x if x.dtype == torch.int64 and x.is_contiguous() else x.long().contiguous()


def _rows(x: Tensor) -> Tensor:
    return _plain_float(x).view(-1, x.shape[-1])


def _stack(x: Tensor) -> Tensor:
    if x.dim() not in (2, 3):
        raise ValueError(f"a matrix [O, D] or a stack [E, O, D], not {list(x.shape)}")
    return x if x.dim() == 3 else x[None]


def _experts(x: Tensor) -> tuple[int | None]:
    return (len(x) if x.dim() == 3 else None,)


def _scales(scale: Tensor | float, stack: Tensor) -> Tensor:
    scale_E = torch.as_tensor(scale, dtype=torch.float32, device=stack.device).reshape(-1).clone()
    if len(scale_E) != len(stack):
        raise UserError(f"{len(scale_E)} scales for {len(stack)} matrices: another model's file?")
    return scale_E


def _planes(library: ctypes.CDLL, digits: int | None, packed: int | None, experts: int, out: int,
            columns: int) -> Tensor:
    groups, blocks = -(-out // plain.ROWS), -(-columns // plain.COLUMNS)
    planes = _huge((experts, groups, blocks, plain.ROWS, plain.LANE))
    problem = library.tryplicity_planes(digits, packed, experts, out, columns, groups, blocks, planes.data_ptr(),
                                        torch.get_num_threads())
    if problem == 1:
        raise MemoryError("no memory to unpack a row of weights")
    if problem:
        raise _damaged()
    return planes


def _huge(shape: tuple[int, ...]) -> Tensor:
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


def _damaged() -> UserError:
    return UserError("packed weights hold a byte above 242, which five ternary digits never make: the file is damaged; "
                     "export it again")
