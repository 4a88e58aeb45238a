"""Which ternary products run on a card in Triton, chosen here alone; the others are plain PyTorch."""

from __future__ import annotations

import importlib.util
import warnings
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from tryplicity.kernels import compiling, plain
from tryplicity.kernels.trying import constant, tried

#: up to so many tokens it pays to read the weights as they are packed; of more, PyTorch's products of whole tiles are
#: faster. Of chosen experts as many pairs as decoding has: PyTorch's wait for the host.
FEW_TOKENS, FEW_PAIRS = 16, 1024


def products(x: Tensor, rows: int, most: int) -> ModuleType | None:
    """Triton's products, for so many rows of tokens on x's device; None where plain PyTorch is to do them."""
    if x.device.type != "cuda" or not 0 < rows <= most or not _works(x.device.index):
        return None
    from tryplicity.kernels import triton_ternary

    return triton_ternary


@constant
def _works(index: int | None) -> bool:
    return compiling.enabled() and why_not("cuda", index) is None


@cache
def why_not(device_type: str, index: int | None) -> str | None:
    """Why Triton does not do the products there, in one line; None if it does. It is tried once, against plain
    PyTorch, to the last bit; if it fails, a warning says so."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    problem = tried(_compared, torch.device(device_type, index))
    if problem:
        warnings.warn(f"Triton's ternary products are left out, plain PyTorch does them: {problem}", stacklevel=2)
    return problem


def _compared(device: torch.device) -> str | None:
    from tryplicity.kernels import triton_ternary

    generator = torch.Generator().manual_seed(0)
    digits_EOD = torch.randint(-1, 2, (3, 40, 300), generator=generator)
    planes, scale_E = plain.planes(digits_EOD).to(device), torch.tensor([0.3, 0.07, 1.9], device=device)
    x_ND, bias_O = (torch.randn(shape, generator=generator).to(device) for shape in ((5, 300), (40,)))
    row_S, expert_S = (torch.tensor(ids, device=device) for ids in ([0, 4, 0, 2], [2, 0, 1, 2]))
    for count in (1, 5):
        asked = x_ND[:count], planes[:1], scale_E[:1], 40, bias_O
        if not torch.equal(triton_ternary.linear(*asked), plain.linear(*asked)):
            return f"a product of {count} tokens is wrong on {device}"
    asked = x_ND, planes, scale_E, 40, row_S, expert_S
    right_SO, sums_NO, weight_S = plain.experts(*asked), torch.zeros(5, 40, device=device), scale_E[expert_S] * 0.7
    if not torch.equal(triton_ternary.experts(*asked), right_SO):
        return f"products of chosen experts are wrong on {device}"
    triton_ternary.add_weighted_rows(sums_NO, right_SO, weight_S, row_S)
    for s, row in enumerate(row_S.tolist()):
        sums_NO[row] -= weight_S[s] * right_SO[s]
    return f"weighted sums are wrong on {device}" if sums_NO.abs().max() > 1e-4 * right_SO.abs().max() else None
