"""The stages of a model, measured one by one: its embedding, each kind of block, its losses.

A block is measured as eager PyTorch runs it, or as torch's compiler would have it (`Blocks`).
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from tryplicity.components import Layer, Report, Router
from tryplicity.functional import grouped_product_works
from tryplicity.model import last_hidden, next_token_loss
from tryplicity.planner.measure import Cost, measure, without_data
from tryplicity.planner.shapes import Shape, ShapeMode, shape_like
from tryplicity.promises import check_mean

if TYPE_CHECKING:
    from tryplicity.hardware import Hardware
    from tryplicity.model import Block, Model

#: eager: as eager PyTorch runs them. compiled: as the compiler cuts them into their two passes, which takes it half a
#: minute a kind. larger: what is larger of the two, since what cannot be compiled stays eager. at most: without asking
#: the compiler, the larger of eager and of the forms it is given, when nothing of them is worked out again: it keeps
#: what it must and no more.
Blocks = Literal["eager", "compiled", "larger", "at most"]

#: tokens of a micro-batch up to which it is measured as it is
DIRECT = 2**15


def bytes_of_a_row(model: Model) -> int:
    """What a training step holds of each of its sequences from its beginning to its end: tokens, documents, the
    targets of each objective, and the loss of each token in fp32."""
    ids_BT = Shape(torch.empty(1, model.spec.context_length, dtype=torch.int64, device="meta"))
    doc_ids_BT, next_BT = shape_like(ids_BT), shape_like(ids_BT)
    with ShapeMode():
        targets = model.targets(ids_BT, next_BT, doc_ids_BT)
    held = {id(t): t for t in (ids_BT, doc_ids_BT, next_BT, *targets.values())}
    return sum(t.numel() * t.element_size() for t in held.values()) + 4 * ids_BT.numel()


def measure_stages(model: Model, hardware: Hardware, weights: str, gradients_exist: bool,
                   blocks: Blocks = "eager") -> list[Cost]:
    """The embedding, each block, and the losses of one micro-batch, in order; alike blocks are measured once.

    weights: "fp32" or "bf16", as in `Facts.measured`. A micro-batch of many sequences is extrapolated from two
    small ones: all costs are a constant and a share for each sequence.
    """
    collecting = gc.isenabled()
    gc.disable()  # a layer's circular garbage would be gone whenever the collector happens to run
    try:
        return _measure(model, hardware, weights, gradients_exist, blocks)
    finally:
        if collecting:
            gc.enable()


def _measure(model: Model, hardware: Hardware, weights: str, gradients_exist: bool, blocks: Blocks) -> list[Cost]:
    context, batch = model.spec.context_length, hardware.batch
    if batch <= 4 or batch * context <= DIRECT:
        return _measure_batch(model, hardware, batch, weights, gradients_exist, blocks)
    small = max(2, DIRECT // 2 // context)
    few, more = (_measure_batch(model, hardware, n, weights, gradients_exist, blocks) for n in (small, 2 * small))
    share = (batch - small) / small
    return [Cost(*(round(x + (y - x) * share) for x, y in zip(astuple(a), astuple(b), strict=True)))
            for a, b in zip(few, more, strict=True)]


def _measure_batch(model: Model, hardware: Hardware, batch: int, weights: str, gradients_exist: bool,
                   blocks: Blocks) -> list[Cost]:
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
            given = _Given(streams, embedding_BTD, doc_ids_BT, dtype, autocast, gradients_exist,
                           hardware.activation_checkpointing)
            known[kind] = _measure_block_as(blocks, model.layers[layer], given)
        cost, streams = known[kind]
        # the gradients of a shared block are made at the last of its layers, and added to at the others
        again = model.layers.first[layer] in model.layers.first[layer + 1:]
        costs.append(replace(cost, made=0) if again else cost)
    last, _ = measure(losses, [_leaf(streams)], parameters, autocast=autocast,
                      gradients_exist=gradients_exist)
    if gradients_exist and model.unembedding is None:
        last = replace(last, left=embedding.weight.numel() * embedding.weight.element_size())
    return [*costs, last]


@dataclass(frozen=True)
class _Given:
    """What a block is measured with."""

    streams: Shape
    embedding_BTD: Shape
    doc_ids_BT: Tensor
    dtype: torch.dtype | None
    """Of the parameters; None keeps theirs."""
    autocast: torch.dtype | None
    gradients_exist: bool
    checkpointing: bool


def _measure_block_as(blocks: Blocks, block: Block, given: _Given) -> tuple[Cost, Shape]:
    cost, out = _measure_block(block, given)
    if blocks == "at most":
        try:
            with _as_a_compiler_sees_it():
                return _larger(cost, _measure_block(block, given)[0]), out
        except Exception:  # what cannot be traced cannot be compiled either, and stays eager
            return cost, out
    if blocks in ("compiled", "larger"):
        from tryplicity.planner.compiled import passes_of, with_compiler  # which import the compiler

        passes = passes_of(block, given.dtype, given.streams.shape, given.streams.dtype, given.doc_ids_BT.shape,
                           given.autocast)
        if passes is not None:
            own = with_compiler(cost, passes, given.gradients_exist, given.checkpointing)
            return own if blocks == "compiled" else _larger(cost, own), out
    return cost, out


def _larger(a: Cost, b: Cost) -> Cost:
    """FLOPs and gradients are a's."""
    most = {name: max(getattr(a, name), getattr(b, name)) for name in ("kept", "forward", "backward", "made_at_peak")}
    return replace(a, **most)


@contextmanager
def _as_a_compiler_sees_it() -> Iterator[None]:
    """Layers take the forms that they have for torch's compiler, here in eager PyTorch."""
    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = True
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before


def _leaf(like: Shape) -> Tensor:
    return shape_like(like).requires_grad_()


def _measure_block(block: Block, given: _Given) -> tuple[Cost, Shape]:
    block = without_data(block, given.dtype)
    routers = [m for m in block.modules() if isinstance(m, Router)]
    padded_share = sum(r.mean_k / r.max_k for r in routers) / len(routers) if routers else 1.0

    more = block.also_given(_leaf(given.embedding_BTD), 0)

    def run(streams: Tensor, *embedding: Tensor) -> list[Tensor]:
        out, report = block(streams, None, given.doc_ids_BT, *embedding, *more[1:])
        return [out, *report.losses.values()]

    cost, (out, *_) = measure(run, [_leaf(given.streams), *more[:1]], list(block.parameters()),
                              autocast=given.autocast, gradients_exist=given.gradients_exist,
                              checkpointing=given.checkpointing, padded_share=padded_share)
    extra = sum(m.extra_flops(given.doc_ids_BT.numel()) for m in block.modules() if isinstance(m, Layer))
    return replace(cost, flops_forward=cost.flops_forward + extra,
                   flops_backward=cost.flops_backward + (3 if given.checkpointing else 2) * extra), out
