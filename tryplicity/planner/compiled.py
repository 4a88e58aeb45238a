"""What a compiled block holds in memory, as torch's compiler decides it: traced and cut into its two passes, on tensors
without data, and not compiled. Half a minute for each kind of block: it is asked where a spec says `compile: on`, and
where the answer hangs on it.

What is held from the forward pass to the backward pass is exact; what comes and goes inside a pass is counted as if
each operation made its result, where the compiler makes one pass of many. Importing this module imports the compiler.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from types import FunctionType

import torch
from torch import Tensor, fx
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.compile_fx import compile_fx
from torch._subclasses.fake_tensor import FakeTensorMode

from tryplicity.model import Block
from tryplicity.planner.measure import BLOCK, Cost


@dataclass(frozen=True)
class Passes:
    """Bytes of one compiled block's passes, beside its weights and its input."""

    output: int
    kept: int
    """From the forward pass to the backward pass, the output included."""
    forward: int
    """Peak, what is kept included."""
    backward: int
    """Peak, what was kept and the gradient of the output included; without the gradients of parameters."""
    gradients_at_peak: int
    """Of parameters, at that peak."""


@functools.lru_cache(maxsize=64)
def passes_of(block: Block, weights: torch.dtype | None, shape: torch.Size, dtype: torch.dtype,
              doc_ids_shape: torch.Size, autocast: torch.dtype | None) -> Passes | None:
    """None where the compiler cannot take the block, which then stays eager. weights: the dtype of the parameters,
    which are on the meta device; None keeps theirs. shape, dtype: of the residual streams that the block reads."""
    graphs: list[fx.GraphModule] = []

    def keep(graph: fx.GraphModule, inputs: object, **options: object) -> Callable:
        graphs.append(graph)

        def run(given: list) -> object:
            return graph(*given)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    forward = type(block).forward  # as code of its own: Dynamo has a list for each code, which is not to grow
    own = FunctionType(forward.__code__.replace(), forward.__globals__, forward.__name__, forward.__defaults__,
                       forward.__closure__)
    run = torch.compile(own, fullgraph=True, dynamic=False,
                        backend=lambda graph, inputs: compile_fx(graph, inputs, inner_compile=keep))
    block = copy.deepcopy(block)
    with FakeTensorMode(allow_non_fake_inputs=True):
        block.to_empty(device="cpu").train()
        for parameter in block.parameters():
            parameter.data = parameter.data.to(weights or parameter.dtype)
        streams = torch.empty(shape, dtype=dtype, requires_grad=True)
        embedding_BTD = torch.empty(*doc_ids_shape, shape[-1], dtype=dtype, requires_grad=True)
        more = block.also_given(embedding_BTD, 0)
        with torch.autocast("cpu", autocast) if autocast else nullcontext():
            try:
                out, report = run(block, streams, None, torch.zeros(doc_ids_shape, dtype=torch.int64), *more)
            except TorchDynamoException:
                return None
        (out.sum() + sum(report.losses.values())).backward()
    forward, backward = graphs
    return _passes(forward, backward, [streams, embedding_BTD], out)


def with_compiler(cost: Cost, passes: Passes, gradients_exist: bool, checkpointing: bool) -> Cost:
    """The cost of a stage with what the compiler makes of it; FLOPs are the eager one's."""
    kept, forward, backward = passes.kept, passes.forward, passes.backward
    if checkpointing:  # see `measure`
        backward = max(backward, forward + passes.output)
        kept = forward = passes.output
    at_peak = 0 if gradients_exist else passes.gradients_at_peak
    return replace(cost, kept=kept, forward=forward, backward=backward + passes.gradients_at_peak - at_peak,
                   made_at_peak=min(at_peak, cost.made))


def _passes(forward: fx.GraphModule, backward: fx.GraphModule, inputs: list[Tensor], out: Tensor) -> Passes:
    output = _rounded(out)
    kept, (peak, _) = _made(forward.graph), _peak(forward.graph)
    peak_back, alive = _peak(backward.graph)
    to_inputs = {(x.shape, x.dtype) for x in inputs}
    (results,) = backward.graph.output_node().args
    # of everything that has a gradient, these are no parameters
    gradients = {_storage(t): _rounded(t) for node in results if node is not None
                 for t in _tensors(node) if (t.shape, t.dtype) not in to_inputs}
    at_peak = sum(size for storage, size in gradients.items() if storage in alive)
    return Passes(output, kept, max(peak, kept), peak_back - at_peak, at_peak)


def _made(graph: fx.Graph) -> int:
    """Bytes that a graph gives out and was not given."""
    given = {_storage(t) for node in graph.find_nodes(op="placeholder") for t in _tensors(node)}
    results = {_storage(t): _rounded(t) for node in graph.output_node().all_input_nodes for t in _tensors(node)}
    return sum(size for storage, size in results.items() if storage not in given)


def _peak(graph: fx.Graph) -> tuple[int, set[int]]:
    """The most bytes that are there at once, and what they are, if every operation makes its result and what is not
    used any more is gone. What a backward pass is given counts, but for what was given to the forward pass already."""
    nodes = list(graph.nodes)
    last: dict[int, int] = {}
    for place, node in enumerate(nodes):
        for used in (node, *node.all_input_nodes):
            last.update({_storage(t): place for t in _tensors(used)})
    live: dict[int, int] = {}
    peak, at_peak = 0, set()
    foreign = {_storage(t) for node in nodes if node.op == "placeholder" and node.name.startswith("primals")
               for t in _tensors(node)}
    for place, node in enumerate(nodes):
        if node.op != "output":
            live.update({_storage(t): _rounded(t) for t in _tensors(node) if _storage(t) not in foreign})
        if (now := sum(live.values())) > peak:
            peak, at_peak = now, set(live)
        for storage in [storage for storage in live if last[storage] <= place]:
            del live[storage]
    return peak, at_peak


def _tensors(node: fx.Node) -> Iterator[Tensor]:
    found = node.meta.get("val")
    for value in found if isinstance(found, list | tuple) else (found,):
        if isinstance(value, Tensor):
            yield value


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _rounded(tensor: Tensor) -> int:
    return -(-tensor.untyped_storage().nbytes() // BLOCK) * BLOCK
