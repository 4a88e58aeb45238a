"""What one stage of a model costs, measured: its forward and backward pass run on tensors without data.

Every operation runs with real shapes and dtypes but touches no memory, so a block of any size is measured in
a fraction of a second on any machine. A dispatch mode sees each tensor come and go (bytes) and each product
(FLOPs). Kernels' inner scratch memory is not seen, but for those of which it is known (`_SCRATCH`).
"""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from tryplicity.planner.flops import FORMULAS, GROUPED
from tryplicity.planner.shapes import Shape, ShapeMode, shape_like

aten = torch.ops.aten
BLOCK = 512  # torch's allocators hand out memory in multiples of this
#: a number for each storage: its address is soon another's
_SERIALS = itertools.count()


@dataclass(frozen=True)
class Cost:
    """One stage in one micro-batch. Bytes, beside weights, gradients and what other stages hold."""

    kept: int
    """Held from its forward pass to its backward pass, its output included."""
    forward: int
    """Peak of its forward pass, what it keeps included; with checkpointing what it keeps alone."""
    backward: int
    """Peak of its backward pass, the gradient of its output and what it kept included."""
    made: int
    """Gradients of parameters that its backward pass makes."""
    made_at_peak: int
    """Those of them that are there when the backward pass peaks; not in `backward`."""
    flops_forward: int
    flops_backward: int
    """Recomputation included."""
    left: int = 0
    """Held from its backward pass to the step's last: the gradient of a tied table from the losses waits for that of
    the embedding before both are added to what there is."""


# --- bytes ---

def _lstm_scratch(x, w_FI, w_FH, *_) -> int:
    """The gates of all steps, and the weights in oneDNN's own order."""
    return x.element_size() * (x.shape[0] * x.shape[1] * w_FI.shape[0] + w_FI.numel() + w_FH.numel())


#: bytes that a kernel takes and gives back
_SCRATCH: dict[Any, Callable[..., int]] = {
    aten.mkldnn_rnn_layer.default: _lstm_scratch,
    aten.mkldnn_rnn_layer_backward.default: _lstm_scratch,
}


class Tracker(ShapeMode):
    """Sums the bytes of all storages made under it that are alive, remembers their peak, and counts FLOPs.

    padded_share: the share of the rows of grouped products that hold a token (a router with a varying number
        of experts fills the rest with rows that kernels skip).
    """

    def __init__(self, padded_share: float = 1.0) -> None:
        super().__init__()
        self.padded_share = padded_share
        self.live = self.peak = 0
        self.flops = 0.0
        self._alive: dict[int, int] = {}
        self._at_peak: dict[int, int] | None = None

    def start_phase(self) -> None:
        """Forget the peak and the FLOPs so far."""
        self.peak, self.flops, self._at_peak = self.live, 0.0, None

    def sizes(self, tensors: Iterable[Tensor]) -> tuple[int, int]:
        """Bytes of tensors made under this mode, and of those that were there at the peak."""
        keys = {getattr(t.meta.untyped_storage(), "serial", None) for t in tensors} & self._alive.keys()
        return sum(self._alive[k] for k in keys), sum(self._alive[k] for k in keys & (self._at_peak or {}).keys())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(func, types, args, kwargs)
        formula = FORMULAS.get(func)
        if formula is not None:
            share = self.padded_share if func._overloadpacket in GROUPED else 1.0
            self.flops += share * formula(*args, **(kwargs or {}), out_val=out)
        if func in _SCRATCH and (reached := self.live + _SCRATCH[func](*args)) > self.peak:
            self.peak, self._at_peak = reached, dict(self._alive)
        return out

    def made(self, tensor: Shape) -> None:
        storage = tensor.meta.untyped_storage()
        storage.serial = serial = next(_SERIALS)
        self._alive[serial] = 0
        weakref.finalize(storage, self._hold, serial, None)
        self._hold(serial, storage.nbytes())

    def changed(self, tensor: Shape) -> None:
        storage = tensor.meta.untyped_storage()
        if not hasattr(storage, "serial"):
            self.made(tensor)
        elif storage.serial in self._alive:
            self._hold(storage.serial, storage.nbytes())

    def _hold(self, serial: int, size: int | None) -> None:
        """A storage has this many bytes from now on; None: it is gone."""
        more = -self._alive[serial] if size is None else -(-size // BLOCK) * BLOCK - self._alive[serial]
        if more < 0 and self._at_peak is None and self.live == self.peak:
            self._at_peak = dict(self._alive)  # the peak is over: what made it up
        self.live += more
        self._alive[serial] += more
        if size is None:
            del self._alive[serial]
        if self.live > self.peak:
            self.peak, self._at_peak = self.live, None


class _GradientsArrive(torch.autograd.Function):
    """Stands for all that follows a stage: its backward hands over the gradients of the outputs."""

    @staticmethod
    def forward(ctx, gradients, *outputs):
        ctx.gradients = gradients
        return outputs[0].new_empty(())

    @staticmethod
    def backward(ctx, _):
        gradients, ctx.gradients = tuple(ctx.gradients), None
        return (None, *gradients)


class _CudaAutocast(TorchFunctionMode):
    """Autocast on a CPU leaves in bf16 some operations that it does in fp32 on a GPU; this does them so."""

    _CAST = ("exp", "log", "pow", "rsqrt", "softplus", "layer_norm", "rms_norm", "norm")
    _DTYPE = ("softmax", "log_softmax", "sum", "cumsum")

    def __init__(self) -> None:
        super().__init__()
        homes = (torch, Tensor, F)
        self._cast = {getattr(h, n) for n in self._CAST for h in homes if hasattr(h, n)}
        self._dtype = {getattr(h, n) for n in self._DTYPE for h in homes if hasattr(h, n)}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in self._cast or func in self._dtype:
            half = [isinstance(a, Tensor) and a.dtype == torch.bfloat16 for a in args[:1]]
            if any(half) and torch.is_autocast_enabled("cpu"):
                if func in self._cast:
                    args = (args[0].float(), *args[1:])
                elif kwargs.get("dtype") is None:
                    kwargs = {**kwargs, "dtype": torch.float32}
        return func(*args, **kwargs)


def without_data(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy of a module whose parameters and buffers are tensors without data.

    dtype: of the parameters; None keeps theirs.
    """
    replaced: dict[int, Any] = {id(b): shape_like(b) for b in module.buffers()}
    for p in module.parameters():
        replaced[id(p)] = shape_like(p, dtype).requires_grad_(p.requires_grad)
        replaced[id(p)]._is_param = True  # what isinstance(..., nn.Parameter) looks at
    return copy.deepcopy(module, replaced)


def measure(stage: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], parameters: Sequence[Tensor], *,
            autocast: torch.dtype | None = None, gradients_exist: bool = True, checkpointing: bool = False,
            padded_share: float = 1.0) -> tuple[Cost, list[Shape]]:
    """Run a stage forward and backward and give its cost and tensors like its outputs.

    stage: from inputs to the tensors through which gradients come back (what the next stage reads first).
    inputs: leaves; those that require a gradient get one, as the stage before would.
    gradients_exist: every parameter has a gradient already, to which this pass adds (accumulation); else the
        pass makes them, and their bytes are told apart in the cost.
    checkpointing: keep only the outputs, and run forward again before the backward pass.
    """
    for p in parameters:
        p.grad = shape_like(p) if gradients_exist else None
    tracker = Tracker(padded_share)

    def forward() -> list[Tensor]:
        if autocast is None:
            return list(stage(*inputs))
        with torch.autocast("cpu", dtype=autocast, cache_enabled=False), _CudaAutocast():
            return list(stage(*inputs))

    with tracker:
        outputs = forward()
        like = [(o.shape, o.dtype) for o in outputs]
        kept, forward_peak, forward_flops = tracker.live, tracker.peak, tracker.flops
        kept_outputs, _ = tracker.sizes(outputs)
        arriving = [torch.empty(shape, dtype=dtype) for shape, dtype in like]
        tracker.start_phase()
        end = _GradientsArrive.apply(arriving, *outputs)
        del outputs, arriving
        end.backward()
        gradients = () if gradients_exist else [p.grad for p in parameters if p.grad is not None]
        made, made_at_peak = tracker.sizes(gradients)
    for p in parameters:
        p.grad = None
    backward_peak, backward_flops = tracker.peak - made_at_peak, tracker.flops
    if checkpointing:
        # the first run keeps its outputs alone; the second is as large as the run above, with the gradient that
        # has arrived by then beside it (no less than the first, so that one's peak decides nothing)
        again = forward_peak + kept_outputs
        if again > tracker.peak:
            backward_peak, made_at_peak = again, 0
        kept = forward_peak = kept_outputs
        backward_flops += forward_flops
    cost = Cost(kept, forward_peak, backward_peak, made, made_at_peak, int(forward_flops), int(backward_flops))
    return cost, [Shape(torch.empty(shape, dtype=dtype, device="meta")) for shape, dtype in like]
