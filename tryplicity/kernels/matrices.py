"""Matrices as inference keeps them: ternary, or rows in fewer bytes than they were trained in.

Shapes: O out, D in, E experts, P = ceil(D / 5).
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from tryplicity.errors import UserError
from tryplicity.kernels import cards, plain
from tryplicity.kernels.library import huge, native

_TERNARY = 0  # matrix.h's kinds
KINDS = {torch.float32: 1, torch.bfloat16: 2, torch.int8: 3}


class _Shape(ctypes.Structure):
    """What C++ knows of a matrix."""

    _fields_ = [(name, ctypes.c_int64) for name in ("kind", "experts", "out", "in", "groups", "blocks")]
    _fields_ += [("scale", ctypes.c_void_p), ("data", ctypes.c_void_p)]


class PackedMatrix:
    """A matrix [O, D], or several [E, O, D], that `packed_linear` and `packed_experts` multiply by.

    data: whatever its kind keeps, a tensor with the experts first, 1 of a single matrix. scale: fp32, likewise, or
    None. experts: None for a single matrix.
    """

    def __init__(self, kind: int, data: Tensor, scale: Tensor | None, out_features: int, in_features: int,
                 experts: int | None, blocks: tuple[int, int] = (0, 0)) -> None:
        self.data, self.scale = data, scale
        self.out_features, self.in_features, self.experts = out_features, in_features, experts
        self._library = native(data)
        if self._library is not None:
            self._shape = _Shape(kind, len(data), out_features, in_features, *blocks,
                                 None if scale is None else scale.data_ptr(), data.data_ptr())
            self._address = ctypes.addressof(self._shape)

    @property
    def address(self) -> int | None:
        """Of the struct that C++ knows it by, which lives as long as this object; None where C++ cannot reach it."""
        return None if self._library is None else self._address

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def weight(self, expert: int | None = None) -> Tensor:
        """What it stands for in fp32: [O, D], of one expert if it is named, or [E, O, D]."""
        raise NotImplementedError

    def to(self, device: torch.device | str) -> PackedMatrix:
        raise NotImplementedError

    def linear(self, x_ND: Tensor, bias: Tensor | None) -> Tensor:
        """`packed_linear` where C++ cannot do it: [N, O] of fp32 tokens on the matrix's device."""
        raise NotImplementedError

    def chosen(self, x_ND: Tensor, row_S: Tensor | None, expert_S: Tensor) -> Tensor:
        """`packed_experts` of a stack likewise, without weights: [S, O]."""
        raise NotImplementedError

    def __repr__(self) -> str:
        stack = "" if self.experts is None else f"experts={self.experts}, "
        return f"{type(self).__name__}({stack}out={self.out_features}, in={self.in_features}, {self.nbytes} bytes)"


class TernaryMatrix(PackedMatrix):
    """Digits -1, 0, 1 [O, D], or [E, O, D] of several experts, times one scale a matrix; 2 bits a digit, padded.

    scale_E: fp32 [E], [1] for a single one. planes: uint8 [E or 1, ceil(O/4), ceil(D/128), 4, 32]; a byte holds four
    columns 32 apart, two bits each (digit + 1). Tokens are quantised to int8 before the product.
    """

    def __init__(self, planes: Tensor, scale_E: Tensor, out_features: int, in_features: int,
                 experts: int | None) -> None:
        super().__init__(_TERNARY, planes, scale_E, out_features, in_features, experts, planes.shape[1:3])

    @property
    def planes(self) -> Tensor:
        return self.data

    @property
    def scale_E(self) -> Tensor:
        return self.scale

    @classmethod
    def from_digits(cls, digits: Tensor, scale: Tensor | float) -> TernaryMatrix:
        """digits -1, 0, 1 of any dtype [O, D] or [E, O, D]; scale one number a matrix, in any shape."""
        digits_EOD = _stack(digits).to(torch.int8).contiguous()
        library = native(digits_EOD)
        if library is None:
            planes = plain.planes(digits_EOD)
        else:
            planes = _planes(library, digits_EOD.data_ptr(), None, *digits_EOD.shape)
        return cls(planes, _scales(scale, digits_EOD), *digits.shape[-2:], _experts(digits))

    @classmethod
    def from_packed(cls, packed: Tensor, scale: Tensor | float, in_features: int) -> TernaryMatrix:
        """packed uint8 [O, P] or [E, O, P] as `pack` makes it; may lie in a mapped file, read once, front to back."""
        if packed.dtype != torch.uint8 or packed.shape[-1] != -(-in_features // 5):
            raise UserError(f"{in_features} columns pack into {-(-in_features // 5)} bytes (torch.uint8), not "
                            f"{packed.shape[-1]} ({packed.dtype}): another model's file?")
        packed_EOP = _stack(packed).contiguous()
        library = native(packed_EOP)
        if library is None:
            if packed_EOP.numel() and packed_EOP.amax() > 242:
                raise _damaged()
            planes = plain.planes_of_packed(packed_EOP, in_features)
        else:
            planes = _planes(library, None, packed_EOP.data_ptr(), *packed_EOP.shape[:2], in_features)
        return cls(planes, _scales(scale, packed_EOP), packed.shape[-2], in_features, _experts(packed))

    def digits(self, expert: int | None = None) -> Tensor:
        """int8 [O, D], of one expert if it is named, or [E, O, D]."""
        if expert is not None:
            return plain.digits(self.planes[expert])[: self.out_features, : self.in_features]
        digits_EOD = torch.stack([plain.digits(planes)[: self.out_features, : self.in_features]
                                  for planes in self.planes])
        return digits_EOD[0] if self.experts is None else digits_EOD

    def weight(self, expert: int | None = None) -> Tensor:
        if expert is not None:
            return self.digits(expert).float().mul_(self.scale_E[expert])
        found = [self.digits(i).float().mul_(self.scale_E[i]) for i in range(len(self.planes))]
        return found[0] if self.experts is None else torch.stack(found)

    def to(self, device: torch.device | str) -> TernaryMatrix:
        return TernaryMatrix(self.planes.to(device), self.scale_E.to(device), self.out_features, self.in_features,
                             self.experts)

    @property
    def padded(self) -> int:
        """Columns with what pads them to whole blocks."""
        return self.planes.shape[2] * plain.COLUMNS

    def linear(self, x_ND: Tensor, bias: Tensor | None) -> Tensor:
        products = cards.products(x_ND, len(x_ND), cards.FEW_TOKENS)
        return (products or plain).linear(x_ND, self.planes, self.scale_E, self.out_features, bias)

    def chosen(self, x_ND: Tensor, row_S: Tensor | None, expert_S: Tensor) -> Tensor:
        products = cards.products(x_ND, len(expert_S), cards.FEW_PAIRS)
        return (products or plain).experts(x_ND, self.planes, self.scale_E, self.out_features, row_S, expert_S)

    def __reduce__(self):
        return TernaryMatrix, (self.planes, self.scale_E, self.out_features, self.in_features, self.experts)


class RowsMatrix(PackedMatrix):
    """Rows of fp32, bf16 or int8, each times a scale of its own; the tokens stay fp32.

    rows: [E or 1, O, D]. scale_EO: fp32 [E or 1, O], or None: 1 everywhere.
    """

    def __init__(self, rows_EOD: Tensor, scale_EO: Tensor | None, experts: int | None) -> None:
        super().__init__(KINDS[rows_EOD.dtype], rows_EOD, scale_EO, *rows_EOD.shape[1:], experts)

    @classmethod
    def from_rows(cls, rows: Tensor, scale: Tensor | None = None) -> RowsMatrix:
        """rows [O, D] or [E, O, D] in one of the dtypes, which may lie in a mapped file and are copied from there;
        scale [O] or [E, O]."""
        rows_EOD = _stack(rows)
        if scale is not None:
            scale = scale.to(rows.device, torch.float32).reshape(rows_EOD.shape[:2]).clone()
        if rows.is_cpu and rows.numel():
            kept = huge((rows.numel() * rows.element_size(),)).view(rows.dtype).view(rows_EOD.shape)
            rows_EOD = kept.copy_(rows_EOD)
        return cls(rows_EOD.contiguous(), scale, _experts(rows))

    def weight(self, expert: int | None = None) -> Tensor:
        if expert is not None:
            return plain.weight_of_rows(self.data[expert], None if self.scale is None else self.scale[expert])
        weight_EOD = plain.weight_of_rows(self.data, self.scale)
        return weight_EOD[0] if self.experts is None else weight_EOD

    def to(self, device: torch.device | str) -> RowsMatrix:
        return RowsMatrix(self.data.to(device), None if self.scale is None else self.scale.to(device), self.experts)

    def linear(self, x_ND: Tensor, bias: Tensor | None) -> Tensor:
        y_NO = plain.rows_linear(x_ND, self.data[0], None if self.scale is None else self.scale[0])
        return y_NO if bias is None else y_NO + bias

    def chosen(self, x_ND: Tensor, row_S: Tensor | None, expert_S: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # which is not to look at what is chosen
            own_S = expert_S.clamp(max=len(self.data) - 1)
            y_SO = (self.data[own_S].float() @ (x_ND if row_S is None else x_ND[row_S])[..., None])[..., 0]
            y_SO = y_SO if self.scale is None else y_SO * self.scale[own_S]
            return y_SO.where((expert_S < len(self.data))[:, None], 0)
        y_SO = x_ND.new_zeros((len(expert_S), self.out_features), dtype=torch.float32)
        for expert in expert_S[expert_S < len(self.data)].unique().tolist():
            pairs = (expert_S == expert).nonzero().squeeze(-1)
            scale = None if self.scale is None else self.scale[expert]
            y_SO[pairs] = plain.rows_linear(x_ND[pairs if row_S is None else row_S[pairs]], self.data[expert], scale)
        return y_SO

    def __reduce__(self):
        return RowsMatrix, (self.data, self.scale, self.experts)


def int8_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(rows int8, scale fp32 [...]) of a weight [..., D]: each row in 127 steps either way up to its absmax."""
    scale = weight.float().abs().amax(-1).clamp_(min=1e-12).div_(127)
    return (weight / scale[..., None]).round_().to(torch.int8), scale


def _stack(x: Tensor) -> Tensor:
    if x.dim() not in (2, 3):
        raise ValueError(f"a matrix [O, D] or a stack [E, O, D], not {list(x.shape)}")
    return x if x.dim() == 3 else x[None]


def _experts(x: Tensor) -> int | None:
    return len(x) if x.dim() == 3 else None


def _scales(scale: Tensor | float, stack: Tensor) -> Tensor:
    scale_E = torch.as_tensor(scale, dtype=torch.float32, device=stack.device).reshape(-1).clone()
    if len(scale_E) != len(stack):
        raise UserError(f"{len(scale_E)} scales for {len(stack)} matrices: another model's file?")
    return scale_E


def _planes(library: ctypes.CDLL, digits: int | None, packed: int | None, experts: int, out: int,
            columns: int) -> Tensor:
    groups, blocks = -(-out // plain.ROWS), -(-columns // plain.COLUMNS)
    planes = huge((experts, groups, blocks, plain.ROWS, plain.LANE))
    problem = library.tryplicity_planes(digits, packed, experts, out, columns, groups, blocks, planes.data_ptr(),
                                        torch.get_num_threads())
    if problem == 1:
        raise MemoryError("no memory to unpack a row of weights")
    if problem:
        raise _damaged()
    return planes


def _damaged() -> UserError:
    return UserError("packed weights hold a byte above 242, which five ternary digits never make: the file is damaged; "
                     "export it again")
