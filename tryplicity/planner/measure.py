"""What one stage of a model costs, measured: its forward and backward pass run on tensors without data.

Every operation runs with real shapes and dtypes but touches no memory, so a block of any size is measured in
a fraction of a second on any machine. A dispatch mode sees each tensor come and go (bytes) and each product
(FLOPs). Kernels' inner scratch memory is not seen, but for those of which it is known (`_SCRATCH`).
"""

from __future__ import annotations

import copy
import gc
import itertools
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import flop_registry

from tryplicity.components import Layer, Report, Router
from tryplicity.functional import count_grouped_flops, grouped_product_works
from tryplicity.model import last_hidden, next_token_loss
from tryplicity.planner.shapes import Shape, ShapeMode, shape_like
from tryplicity.promises import check_mean

if TYPE_CHECKING:
    from tryplicity.hardware import Hardware
    from tryplicity.model import Block, Model

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


# --- FLOPs ---

def _grouped_flops(a: Tensor, b: Tensor, *_, out_val: Tensor, **__) -> int:
    """[S,I]x[E,I,O], the gradient of its weights [I,S]x[S,O], and stacks: every row meets one matrix."""
    if a.dim() == 2 and b.dim() == 2:
        return 2 * a.shape[0] * a.shape[1] * b.shape[1]
    if a.dim() == 2:
        return 2 * a.shape[0] * a.shape[1] * b.shape[2]
    return 2 * a.shape[1] * a.shape[2] * b.shape[-1] * (a.shape[0] if b.dim() == 3 else 1)


def _convolution_flops(x: Tensor, weight: Tensor, *_, out_val: Tensor, **__) -> int:
    return 2 * out_val.numel() * weight.shape[1:].numel()


def _convolution_backward_flops(grad: Tensor, x: Tensor, weight: Tensor, *args, out_val: Any, **__) -> int:
    """torch's own formula ignores groups in the weight's gradient."""
    output_mask = args[-1]
    return 2 * grad.numel() * weight.shape[1:].numel() * (bool(output_mask[0]) + bool(output_mask[1]))


def _attention_flops(q, k, v, dropout: float = 0.0, causal: bool = False, *_, out_val, **__) -> int:
    """Scores and values for every query head, however few heads keys and values have (torch 2.11's own formula wants
    as many). A causal kernel skips the masked half."""
    (B, H, T, K), S, V = q.shape, k.shape[2], v.shape[3]
    return 2 * B * H * T * S * (K + V) // (2 if causal else 1)


def _attention_backward_flops(grad, q, k, v, out, lse, dropout: float = 0.0, causal: bool = False, *_,
                              out_val, **__) -> int:
    """The scores again, the gradients of queries and keys (K wide), those of values and weights (V wide)."""
    (B, H, T, K), S, V = q.shape, k.shape[2], v.shape[3]
    return 2 * B * H * T * S * (3 * K + 2 * V) // (2 if causal else 1)


def _lstm_flops(x, *weights_and_states, out_val, **__) -> int:
    """x [T,B,I], weights [F,I] and [F,H]."""
    return 2 * x.shape[0] * x.shape[1] * (weights_and_states[0].numel() + weights_and_states[1].numel())


def _lstm_backward_flops(x, *weights_and_states, out_val, **__) -> int:
    return 2 * _lstm_flops(x, *weights_and_states, out_val=out_val)


count_grouped_flops()
_GROUPED = (aten._grouped_mm, torch.ops.tryplicity.grouped_rows, torch.ops.tryplicity.grouped_outer)
_PACKETS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    aten.addmm_: flop_registry[aten.addmm],
    aten.baddbmm_: flop_registry[aten.baddbmm],
    aten._grouped_mm: _grouped_flops,
    aten.convolution: _convolution_flops,
    aten.convolution_backward: _convolution_backward_flops,
    aten.mkldnn_rnn_layer: _lstm_flops,
    aten.mkldnn_rnn_layer_backward: _lstm_backward_flops,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}
_FORMULAS = {getattr(packet, overload): formula for packet, formula in _PACKETS.items()
             if hasattr(packet, "overloads") for overload in packet.overloads()}


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
        formula = _FORMULAS.get(func)
        if formula is not None:
            share = self.padded_share if func._overloadpacket in _GROUPED else 1.0
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


def bytes_of_a_row(model: Model) -> int:
    """What a training step holds of each of its sequences from its beginning to its end: tokens, documents, the
    targets of each objective, and the loss of each token in fp32."""
    ids_BT = Shape(torch.empty(1, model.spec.context_length, dtype=torch.int64, device="meta"))
    doc_ids_BT, next_BT = shape_like(ids_BT), shape_like(ids_BT)
    with ShapeMode():
        targets = model.targets(ids_BT, next_BT, doc_ids_BT)
    held = {id(t): t for t in (ids_BT, doc_ids_BT, next_BT, *targets.values())}
    return sum(t.numel() * t.element_size() for t in held.values()) + 4 * ids_BT.numel()


#: tokens of a micro-batch up to which it is measured as it is
DIRECT = 2**15


def measure_stages(model: Model, hardware: Hardware, weights: str, gradients_exist: bool) -> list[Cost]:
    """The embedding, each block, and the losses of one micro-batch, in order; alike blocks are measured once.

    weights: "fp32" or "bf16", as in `Facts.measured`. A micro-batch of many sequences is extrapolated from two
    small ones: all costs are a constant and a share for each sequence.
    """
    collecting = gc.isenabled()
    gc.disable()  # a layer's circular garbage would be gone whenever the collector happens to run
    try:
        return _measure(model, hardware, weights, gradients_exist)
    finally:
        if collecting:
            gc.enable()


def _measure(model: Model, hardware: Hardware, weights: str, gradients_exist: bool) -> list[Cost]:
    context, batch = model.spec.context_length, hardware.batch
    if batch <= 4 or batch * context <= DIRECT:
        return _measure_batch(model, hardware, batch, weights, gradients_exist)
    small = max(2, DIRECT // 2 // context)
    few, more = (_measure_batch(model, hardware, n, weights, gradients_exist) for n in (small, 2 * small))
    share = (batch - small) / small
    return [Cost(*(round(x + (y - x) * share) for x, y in zip(astuple(a), astuple(b), strict=True)))
            for a, b in zip(few, more, strict=True)]


def _measure_batch(model: Model, hardware: Hardware, batch: int, weights: str, gradients_exist: bool) -> list[Cost]:
    spec = model.spec
    autocast = torch.bfloat16 if weights == "fp32" and hardware.precision == "bf16" else None
    dtype = torch.bfloat16 if weights == "bf16" else None
    for tried in {torch.float32, autocast or dtype or torch.float32}:
        grouped_product_works("cpu", tried)  # decided by trying it, with data
    ids_BT = Shape(torch.empty(batch, spec.context_length, dtype=torch.int64, device="meta"))
    doc_ids_BT = shape_like(ids_BT)
    ends = without_data(nn.ModuleList([
        model.embedding, model.norm, model.layers[0].residual, model.heads,
        model.objectives, *([] if model.unembedding is None else [model.unembedding])]), dtype)
    embedding, norm, residual, heads, objectives = ends[:5]
    parameters = list(ends.parameters())

    def start(ids_BT: Tensor) -> list[Tensor]:
        x_BTD = embedding(ids_BT)
        return [residual.expand(x_BTD if autocast is None else x_BTD.to(autocast))]  # as the model does

    def losses(streams: Tensor) -> list[Tensor]:
        h_BTD = last_hidden(norm(residual.reduce(streams)), spec.logits_multiplier)
        table_VD = embedding.weight if model.unembedding is None else ends[-1].weight
        total, _ = next_token_loss(h_BTD, table_VD, ids_BT, objectives, Report(), spec.logits_softcap)
        return [total, *(check_mean(head, head(h_BTD, head.targets(ids_BT, ids_BT, doc_ids_BT), table_VD)).total
                         for head in heads.values())]

    # a tied table has its gradient from the losses before the embedding's own backward pass
    first, (streams,) = measure(start, [ids_BT], parameters, autocast=autocast,
                                gradients_exist=gradients_exist or model.unembedding is None)
    embedding_BTD = Shape(torch.empty(batch, spec.context_length, spec.hidden_size, dtype=streams.dtype, device="meta"))
    costs: list[Cost] = [first]
    known: dict[Any, tuple[Cost, Shape]] = {}
    for layer, block_spec in enumerate(spec.layers):
        kind = (repr(block_spec), streams.shape, streams.dtype)
        if kind not in known:
            block = without_data(model.layers[layer], dtype)
            cost, out = _measure_block(block, streams, embedding_BTD, doc_ids_BT, autocast, gradients_exist,
                                       hardware.activation_checkpointing)
            if spec.training.compile == "on":
                cost = _as_compiled(cost, model.layers[layer], streams, doc_ids_BT, dtype, autocast, gradients_exist,
                                    hardware.activation_checkpointing)
            known[kind] = cost, out
        cost, streams = known[kind]
        # the gradients of a shared block are made at the last of its layers, and added to at the others
        again = model.layers.first[layer] in model.layers.first[layer + 1:]
        costs.append(replace(cost, made=0) if again else cost)
    last, _ = measure(losses, [_leaf(streams)], parameters, autocast=autocast,
                      gradients_exist=gradients_exist)
    if gradients_exist and model.unembedding is None:
        last = replace(last, left=embedding.weight.numel() * embedding.weight.element_size())
    return [*costs, last]


def _as_compiled(cost: Cost, block: Block, streams: Shape, doc_ids_BT: Tensor, dtype: torch.dtype | None,
                 autocast: torch.dtype | None, gradients_exist: bool, checkpointing: bool) -> Cost:
    from tryplicity.planner.compiled import passes_of, with_compiler  # which import the compiler

    passes = passes_of(block, dtype, streams.shape, streams.dtype, doc_ids_BT.shape, autocast)
    return with_compiler(cost, passes, gradients_exist, checkpointing)


def _leaf(like: Shape) -> Tensor:
    return shape_like(like).requires_grad_()


def _measure_block(block: Block, streams: Shape, embedding_BTD: Shape, doc_ids_BT: Tensor,
                   autocast: torch.dtype | None, gradients_exist: bool, checkpointing: bool) -> tuple[Cost, Shape]:
    routers = [m for m in block.modules() if isinstance(m, Router)]
    padded_share = sum(r.mean_k / r.max_k for r in routers) / len(routers) if routers else 1.0

    more = block.also_given(_leaf(embedding_BTD), 0)

    def run(streams: Tensor, *embedding: Tensor) -> list[Tensor]:
        out, report = block(streams, None, doc_ids_BT, *embedding, *more[1:])
        return [out, *report.losses.values()]

    cost, (out, *_) = measure(run, [_leaf(streams), *more[:1]], list(block.parameters()), autocast=autocast,
                              gradients_exist=gradients_exist, checkpointing=checkpointing,
                              padded_share=padded_share)
    extra = sum(m.extra_flops(doc_ids_BT.numel()) for m in block.modules() if isinstance(m, Layer))
    return replace(cost, flops_forward=cost.flops_forward + extra,
                   flops_backward=cost.flops_backward + (3 if checkpointing else 2) * extra), out
