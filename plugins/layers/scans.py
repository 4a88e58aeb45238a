"""Which scan is run, chosen here alone: Triton's on a card where it has shown that it is right, else PyTorch's.

TRYPLICITY_SCAN=torch keeps to PyTorch, TRYPLICITY_SCAN=triton refuses whatever Triton cannot do, and auto, the default,
asks `why_not`. Shapes: as in `ssd`.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from functools import cache

import torch
from torch import Tensor

from tryplicity import UserError, kernels
from tryplicity_plugins.layers import ssd

CHOICES = ("auto", "torch", "triton")
#: largest error of a value or gradient in the self-test, as a norm, of that of what is right
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 1e-2}
TOKENS = 300  # of the self-test: more than a chunk, and no multiple of it


def scan(x_BTHP: Tensor, dt_BTH: Tensor, A_H: Tensor, B_BTGN: Tensor, C_BTGN: Tensor, *, chunk: int = 64,
         start_BHPN: Tensor | None = None, runs_BT: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`ssd.scan`, by whatever does it here. chunk: of PyTorch's; Triton's has its own."""
    if _triton_is_chosen(x_BTHP.device.type, x_BTHP.device.index, x_BTHP.dtype, x_BTHP.shape[-1], B_BTGN.shape[-1]):
        from tryplicity_plugins.layers import triton_ssd

        return triton_ssd.scan(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, start_BHPN=start_BHPN, runs_BT=runs_BT)
    return ssd.scan(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, chunk=chunk, start_BHPN=start_BHPN, runs_BT=runs_BT)


def path(device: torch.device, head_dim: int, state_size: int) -> str | None:
    """What is to be said of a scan that Triton does, in what a card trains in; None where PyTorch does it."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if not _triton_is_chosen(device.type, device.index, dtype, head_dim, state_size):
        return None
    from tryplicity_plugins.layers import triton_ssd

    return f"the scan in Triton, in chunks of {triton_ssd.CHUNK}, with kernels of its own for the gradients"


@kernels.constant
def _triton_is_chosen(device_type: str, index: int | None, dtype: torch.dtype, head_dim: int, state_size: int) -> bool:
    wanted = os.environ.get("TRYPLICITY_SCAN") or "auto"
    if wanted not in CHOICES:
        raise UserError(f"TRYPLICITY_SCAN={wanted}: it can be {', '.join(CHOICES)}")
    if device_type == "meta" or wanted == "torch" or (wanted == "auto" and device_type != "cuda"):
        return False
    reason = why_not(device_type, index, dtype, head_dim, state_size)
    if reason and wanted == "triton":
        raise UserError(f"TRYPLICITY_SCAN=triton: {reason}; auto runs PyTorch's scan instead")
    return reason is None


@cache
def why_not(device_type: str, index: int | None, dtype: torch.dtype, head_dim: int, state_size: int) -> str | None:
    """Why the Triton scan is not run there on tensors of these kinds, in one line; None if it is. It is tried once,
    against PyTorch's scan in fp64, on the sizes that it is to be used with; if it fails, a warning says so."""
    if device_type == "cuda" and not torch.cuda.is_available():
        return "there is no card"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    from tryplicity_plugins.layers import triton_ssd

    if device_type != "cuda" and not triton_ssd.interpreted():
        return f"it runs on a card, not on {device_type}"
    if not triton_ssd.fits(dtype, head_dim, state_size):
        return f"it cannot do heads of {head_dim} with states of {state_size} in {str(dtype).removeprefix('torch.')}"
    device = torch.device(device_type, index)
    problem = kernels.tried(lambda device: _compared(device, dtype, head_dim, state_size), device)
    if problem:
        warnings.warn(f"the Triton scan is left out, PyTorch's runs instead: {problem}", stacklevel=2)
    return problem


def _compared(device: torch.device, dtype: torch.dtype, head_dim: int, state_size: int) -> str | None:
    from tryplicity_plugins.layers import triton_ssd

    heads, tokens = 2, TOKENS if device.type == "cuda" else 2 * triton_ssd.TILE
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    x, B, C = (draw(1, tokens, *shape).to(dtype) for shape in ((heads, head_dim), (1, state_size), (1, state_size)))
    dt, A, start = draw(1, tokens, heads).sigmoid(), -draw(heads).exp(), draw(1, heads, head_dim, state_size)
    weights, names = (draw(*x.shape), draw(*start.shape)), ("x", "dt", "A", "B", "C", "the first state")
    runs = (torch.arange(tokens, device=device) % (tokens // 3) == tokens // 4).cumsum(0)[None]

    def values_and_gradients(function, cast) -> dict[str, Tensor]:
        inputs = [cast(t).requires_grad_() for t in (x, dt, A, B, C, start)]
        outputs = function(*inputs[:5], start_BHPN=inputs[5], runs_BT=runs)
        loss = sum((out.double() * weight).sum() for out, weight in zip(outputs, weights, strict=True))
        found = zip(names, torch.autograd.grad(loss, inputs), strict=True)
        values = {"y": outputs[0].detach(), "the last state": outputs[1].detach()}
        return values | {f"the gradient of {name}": gradient for name, gradient in found}

    right = values_and_gradients(ssd.scan, lambda t: t.double())
    for name, value in values_and_gradients(triton_ssd.scan, lambda t: t.clone()).items():
        error = float((value.double() - right[name]).norm() / right[name].norm())
        if not error <= TOLERANCE[dtype]:
            return f"it got {name} wrong by {error:.1e} of its size on {device}"
    return None
