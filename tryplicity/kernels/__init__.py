"""Products with matrices as inference keeps them: ternary, in 2 bits a weight, and rows of int8, bf16 or fp32; and
the packing in 1.6 bits that a file has.

On the CPU own C++ does the work, compiled when first used; on a card Triton does that of few tokens with ternary ones
(cards.py chooses). Plain PyTorch (plain.py) does the rest, and all where there is no compiler or TRYPLICITY_KERNELS=0
says so, ternary ones with the same numbers, rows to rounding. The result of a row has the same bits whatever other rows
it comes with and however many threads there are.

Shapes: N tokens, O out, D in, E experts, S pairs of a token and an expert, V rows of a table, P = ceil(D / 5).
"""

from __future__ import annotations

import torch
from torch import Tensor

from tryplicity.kernels import cards, plain
from tryplicity.kernels.cards import FEW_PAIRS
from tryplicity.kernels.compiling import compile_library
from tryplicity.kernels.library import entry, native, why_not
from tryplicity.kernels.matrices import KINDS, PackedMatrix, RowsMatrix, TernaryMatrix, int8_rows
from tryplicity.kernels.trying import constant, on_its_device, tried

__all__ = ["FEW_PAIRS", "PackedMatrix", "RowsMatrix", "TernaryMatrix", "compile_library", "constant", "entry",
           "int8_rows", "on_its_device", "pack", "packed_experts", "packed_linear", "quantise", "rows_linear", "tried",
           "unpack", "why_not"]


def pack(digits: Tensor) -> Tensor:
    """uint8 [..., O, ceil(D/5)] of digits -1, 0, 1 of any dtype [..., O, D]: five base-3 digits to a byte."""
    rows = digits.reshape(-1, digits.shape[-1]).to(torch.int8).contiguous()
    library = native(rows)
    if library is None:
        packed = plain.pack(rows)
    else:
        packed = torch.empty((len(rows), -(-rows.shape[1] // 5)), dtype=torch.uint8)
        library.tryplicity_pack(rows.data_ptr(), *rows.shape, packed.data_ptr(), torch.get_num_threads())
    return packed.view(*digits.shape[:-1], packed.shape[-1])


def unpack(packed: Tensor, in_features: int) -> Tensor:
    """int8 digits [..., O, D] of what `pack` made."""
    rows = packed.reshape(-1, packed.shape[-1]).contiguous()
    library = native(rows)
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
    library = native(x_ND)
    if library is None:
        return plain.quantise(x_ND, padded)
    q_ND = torch.empty((len(x_ND), padded), dtype=torch.int8)
    step_N = torch.empty(len(x_ND))
    sum_N = torch.empty(len(x_ND), dtype=torch.int32)
    library.tryplicity_quantise(x_ND.data_ptr(), *x_ND.shape, padded, q_ND.data_ptr(), step_N.data_ptr(),
                                sum_N.data_ptr(), torch.get_num_threads())
    return q_ND, step_N, sum_N


def packed_linear(x: Tensor, matrix: PackedMatrix, bias: Tensor | None = None) -> Tensor:
    """[..., O] of x [..., D]: the tokens times the matrix, and the bias [O]."""
    shape = x.shape
    if shape[-1] != matrix.in_features:
        raise ValueError(f"tokens of {shape[-1]} features for a matrix of {matrix.in_features}")
    library = None if torch.compiler.is_compiling() else matrix._library
    if library is None or not x.is_cpu:
        return matrix.linear(_rows(x), bias).view(*shape[:-1], matrix.out_features).to(x.dtype)
    if x.dtype != torch.float32 or not x.is_contiguous():
        return packed_linear(x.float().contiguous(), matrix, bias).to(x.dtype)
    y = torch.empty((*shape[:-1], matrix.out_features))
    if library.tryplicity_linear(matrix._address, x.data_ptr(), x.numel() // shape[-1],
                                 None if bias is None else bias.data_ptr(), y.data_ptr(), torch.get_num_threads()):
        raise MemoryError("no memory for the tokens of a product")
    return y


def packed_experts(x_ND: Tensor, matrix: PackedMatrix, row_S: Tensor | None, expert_S: Tensor,
                   weight_S: Tensor | None = None, out: Tensor | None = None,
                   into_S: Tensor | None = None) -> Tensor:
    """y [S, O]: token row_S[s] (None: s itself) of x [N, D] by expert expert_S[s], int64; only those are read.

    With weight_S fp32 the weighted sum instead: out[into_S[s]] += weight_S[s] * y[s], in the order of s; into_S is
    row_S unless given, out zeros [N, O] unless given. A pair of a token or an expert that does not exist is an
    IndexError; where nobody waits to look, on a card and in compiled code, an expert that does not exist gives zeros.
    """
    if x_ND.shape[-1] != matrix.in_features:
        raise ValueError(f"tokens of {x_ND.shape[-1]} features for experts of {matrix.in_features}")
    library, pairs, columns = matrix._library, len(expert_S), matrix.out_features
    library = None if torch.compiler.is_compiling() else library
    if weight_S is not None and out is None:
        out = x_ND.new_zeros((len(x_ND), columns), dtype=torch.float32)
    if library is None or not x_ND.is_cpu:
        products = cards.products(x_ND, pairs, FEW_PAIRS)
        if row_S is None and (products is None or into_S is None):
            row_S = torch.arange(pairs, device=x_ND.device)
        y_SO = matrix.chosen(_rows(x_ND), row_S, expert_S)
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
        raise MemoryError("no memory for the tokens of a product")
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
    kind = KINDS.get(table_VD.dtype)
    library = native(x, table_VD)
    if library is None or kind is None or not table_VD.is_contiguous():
        return plain.rows_linear(_rows(x), table_VD, scale_V).view(*shape[:-1], len(table_VD))
    x = _plain_float(x)
    y = torch.empty((*shape[:-1], len(table_VD)))
    if library.tryplicity_rows(kind, table_VD.data_ptr(), None if scale_V is None else scale_V.data_ptr(),
                               x.data_ptr(), x.numel() // shape[-1], shape[-1], len(table_VD), y.data_ptr(),
                               torch.get_num_threads()):
        raise MemoryError("no memory for the tokens of a product")
    return y


def _plain_float(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float32 and x.is_contiguous() else x.float().contiguous()


def _plain_int(x: Tensor) -> Tensor:
    return x if x.dtype == torch.int64 and x.is_contiguous() else x.long().contiguous()


def _rows(x: Tensor) -> Tensor:
    return _plain_float(x).view(-1, x.shape[-1])
