"""The products in plain PyTorch, on any device: what they are, where there is no compiler, and what C++ must equal.

Whole numbers in fp32 are exact below 2^24, so the sums here are the integers they should be. Digits are unpacked in
slices: memory stays bounded whatever the matrix.

Shapes: N tokens, O out, D in, E experts, S pairs of a token and an expert, G groups of 4 rows, B blocks of 128.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

COLUMNS, ROWS, LANE = 128, 4, 32  # of a block of planes: columns, rows side by side, bytes of a row
NORM_EPS = 1e-6
INPUT_FLOOR = 1e-5
SLICE = 1 << 22  # digits unpacked at a time
EXACT = 1 << 24  # whole numbers below are exact in fp32


def quantise(x_ND: Tensor, padded: int) -> tuple[Tensor, Tensor, Tensor]:
    """(q int8 [N, padded], step fp32 [N], sum of q int32 [N])."""
    x_ND = x_ND.float()
    rstd_N = (x_ND.double().square().mean(-1).float() + NORM_EPS).double().rsqrt().float()
    step_N = (x_ND.abs().amax(-1) * rstd_N).clamp(min=INPUT_FLOOR) / 127
    q_ND = (x_ND * (rstd_N / step_N)[:, None]).round().to(torch.int8)
    q_ND = torch.nn.functional.pad(q_ND, (0, padded - q_ND.shape[-1]))
    return q_ND, step_N, q_ND.sum(-1, dtype=torch.int32)


def planes(digits_EOD: Tensor) -> Tensor:
    """uint8 [E, G, B, 4, 32]: two bits a digit, four columns 32 apart to a byte, the first in the lowest bits."""
    experts, out, columns = digits_EOD.shape
    groups, blocks = -(-out // ROWS), -(-columns // COLUMNS)
    made = digits_EOD.new_zeros((experts, groups, blocks, ROWS, LANE), dtype=torch.uint8)
    for expert in range(experts):
        for first, last in _slices(groups, blocks * COLUMNS * ROWS):
            digits_OD = digits_EOD[expert, first * ROWS : last * ROWS].to(torch.int8)
            spare = (0, blocks * COLUMNS - columns, 0, (last - first) * ROWS - len(digits_OD))
            bits = torch.nn.functional.pad(digits_OD + 1, spare).to(torch.uint8)
            bits = bits.view(last - first, ROWS, blocks, 4, LANE)
            byte = bits[:, :, :, 0] | bits[:, :, :, 1] << 2 | bits[:, :, :, 2] << 4 | bits[:, :, :, 3] << 6
            made[expert, first:last] = byte.transpose(1, 2)
    return made


def planes_of_packed(packed_EOP: Tensor, columns: int) -> Tensor:
    experts, out = packed_EOP.shape[:2]
    groups, blocks = -(-out // ROWS), -(-columns // COLUMNS)
    made = packed_EOP.new_empty((experts, groups, blocks, ROWS, LANE))
    for expert in range(experts):
        for first, last in _slices(groups, blocks * COLUMNS * ROWS):
            rows = packed_EOP[expert, first * ROWS : last * ROWS]
            made[expert, first:last] = planes(unpack(rows, columns)[None])[0]
    return made


def digits(planes_GB: Tensor) -> Tensor:
    """int8 [rows, padded] of the planes [G, B, 4, 32] of one matrix."""
    shift = torch.arange(0, 8, 2, device=planes_GB.device, dtype=torch.uint8)[:, None]
    bits = (planes_GB.unsqueeze(-2) >> shift & 3).to(torch.int8) - 1  # [G, B, row, plane, byte]
    return bits.transpose(1, 2).reshape(len(planes_GB) * ROWS, -1)


def product(q_ND: Tensor, planes_GB: Tensor, out: int) -> Tensor:
    """Whole numbers, as fp32 nearest to them, [N, out]."""
    padded = q_ND.shape[-1]
    dtype = torch.float32 if padded * 127 < EXACT else torch.float64
    y_NO = q_ND.new_empty((len(q_ND), len(planes_GB) * ROWS), dtype=torch.float32)
    q_ND = q_ND.to(dtype)
    for first, last in _slices(len(planes_GB), padded * ROWS):
        y_NO[:, first * ROWS : last * ROWS] = q_ND @ digits(planes_GB[first:last]).to(dtype).mT
    return y_NO[:, :out]


def linear(x_ND: Tensor, planes_EGB: Tensor, scale_E: Tensor, out: int, bias: Tensor | None) -> Tensor:
    q_ND, step_N, _ = quantise(x_ND, planes_EGB.shape[2] * COLUMNS)
    y_NO = product(q_ND, planes_EGB[0], out) * (step_N * scale_E[0])[:, None]
    return y_NO if bias is None else y_NO + bias


def experts(x_ND: Tensor, planes_EGB: Tensor, scale_E: Tensor, out: int, row_S: Tensor, expert_S: Tensor) -> Tensor:
    q_ND, step_N, _ = quantise(x_ND, planes_EGB.shape[2] * COLUMNS)
    if torch.compiler.is_compiling():
        return _gathered(q_ND, step_N, planes_EGB, scale_E, out, row_S, expert_S)
    y_SO = x_ND.new_zeros((len(expert_S), out), dtype=torch.float32)
    for expert in expert_S[expert_S < len(planes_EGB)].unique().tolist():
        pairs = (expert_S == expert).nonzero().squeeze(-1)
        rows = row_S[pairs]
        y_SO[pairs] = product(q_ND[rows], planes_EGB[expert], out) * (step_N[rows] * scale_E[expert])[:, None]
    return y_SO


def _gathered(q_ND: Tensor, step_N: Tensor, planes_EGB: Tensor, scale_E: Tensor, out: int, row_S: Tensor,
              expert_S: Tensor) -> Tensor:
    """The same without looking at what is chosen, each pair with digits of its own."""
    there_S, own_S = expert_S < len(planes_EGB), expert_S.clamp(max=len(planes_EGB) - 1)
    dtype = torch.float32 if q_ND.shape[-1] * 127 < EXACT else torch.float64
    digits_SOD = digits(planes_EGB[own_S].flatten(0, 1)).view(len(own_S), -1, q_ND.shape[-1])[:, :out]
    y_SO = (digits_SOD.to(dtype) @ q_ND[row_S].to(dtype)[..., None])[..., 0].float()
    return (y_SO * (step_N[row_S] * scale_E[own_S])[:, None]).where(there_S[:, None], 0)


def pack(digits_RD: Tensor) -> Tensor:
    """uint8 [R, ceil(D / 5)], the first of five columns in the byte's lowest base-3 digit."""
    rows, columns = digits_RD.shape
    width = -(-columns // 5)
    packed = digits_RD.new_empty((rows, width), dtype=torch.uint8)
    power = torch.tensor([1, 3, 9, 27, 81], dtype=torch.int16, device=digits_RD.device)
    for first, last in _slices(rows, columns):
        part = torch.nn.functional.pad(digits_RD[first:last].to(torch.int16), (0, width * 5 - columns))
        packed[first:last] = ((part.view(-1, width, 5) + 1) * power).sum(-1).to(torch.uint8)
    return packed


def unpack(packed_RP: Tensor, columns: int) -> Tensor:
    """int8 [R, columns]."""
    power = torch.tensor([1, 3, 9, 27, 81], device=packed_RP.device)
    table = (torch.arange(243, device=packed_RP.device)[:, None] // power % 3 - 1).to(torch.int8)
    found = packed_RP.new_empty((len(packed_RP), columns), dtype=torch.int8)
    for first, last in _slices(len(packed_RP), columns):
        found[first:last] = table[packed_RP[first:last].int()].flatten(-2)[:, :columns]
    return found


def rows_linear(x_ND: Tensor, table_VD: Tensor, scale_V: Tensor | None) -> Tensor:
    y_NV = x_ND.new_empty((len(x_ND), len(table_VD)), dtype=torch.float32)
    for first, last in _slices(len(table_VD), table_VD.shape[-1]):
        y_NV[:, first:last] = x_ND @ table_VD[first:last].to(x_ND.dtype).mT
    return y_NV if scale_V is None else y_NV * scale_V


def weight_of_rows(rows: Tensor, scale: Tensor | None) -> Tensor:
    """fp32 [..., O, D] of rows, each times its scale [..., O]."""
    return rows.float() if scale is None else rows.float().mul_(scale[..., None])


def _slices(count: int, size: int) -> Iterator[tuple[int, int]]:
    """Ranges of items of `size` digits each, some at a time."""
    step = max(1, SLICE // max(1, size))
    return ((first, min(first + step, count)) for first in range(0, count, step))
