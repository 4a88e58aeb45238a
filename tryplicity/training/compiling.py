"""Blocks compiled by torch's compiler: when, and only where it computes what eager PyTorch does.

A block is compiled whole, once for each kind of block and shape of its input, when it is first met: blocks of one
kind share the code, and what differs between them (weights, buffers) is its input. Before that code is used, one
forward and backward pass of it is compared with eager PyTorch's on the very tensors of that step. Where it cannot be
compiled or differs, all blocks of its kind go on in eager PyTorch, and one line says so.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from tryplicity.guard import cause, lacks_memory
from tryplicity.model import Block, Model
from tryplicity.parts import config_as_dict
from tryplicity.training.process import say

NEGLIGIBLE = 1e-7  # of the largest norm of a parameter's gradient: a gradient below is rounding, and compared with none
LOST = 0.1  # a gradient of less than this share of what it should be, or as many times of it, is not rounding


def compile_blocks(model: Model, mode: str, device: torch.device, say: Callable[[str], None] = say,
                   backend: str = "inductor") -> str | None:
    """Have the blocks of a placed model compiled as `training.compile` says; a line about it, None if they are not.

    Between activation checkpointing, which may go around it, and sharding, whose hooks stay outside of it. Without
    gradients a CPU goes on in eager PyTorch, where the layers have C of their own; so does decoding everywhere.
    """
    if not wanted(mode, device):
        return None
    kinds = [Kind(layers, say, backend) for layers in kinds_of(model)]
    for kind in kinds:
        for number in kind.layers:
            model.layers[number].forward = Compiled(model.layers[number], kind)
    return (f"{len(kinds)} {'kinds' if len(kinds) > 1 else 'kind'} of block will be compiled, each when first met, and "
            f"again for another length; the code is kept in {cache_folder()}")


def kinds_of(model: Model) -> list[list[int]]:
    """The numbers of the layers that are alike, kind by kind."""
    kinds: dict[str, list[int]] = {}
    for number, block in enumerate(model.spec.layers):
        kinds.setdefault(json.dumps(config_as_dict(block), sort_keys=True), []).append(number)
    return list(kinds.values())


def wanted(mode: str, device: torch.device) -> bool:
    """auto: on a CPU the layers' own eager forms are as fast, without the minute that compiling takes."""
    return mode == "on" or (mode == "auto" and device.type == "cuda")


def cache_folder() -> str:
    """Where the compiler keeps its code from one run to the next; TORCHINDUCTOR_CACHE_DIR names another."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return cache_dir()


class Kind:
    """Blocks that are alike, and their common code by what they are called with."""

    def __init__(self, layers: list[int], say: Callable[[str], None], backend: str) -> None:
        self.layers, self.say, self.backend = layers, say, backend
        self.code: dict[tuple, Callable] = {}
        self.refused: str | None = None  # why eager PyTorch does it

    def refuse(self, why: str) -> None:
        self.refused, self.code = why, {}
        layers = ", ".join(map(str, self.layers))
        self.say(f"warning: layers {layers} go on uncompiled: {why}")


class Compiled:
    """The forward of one block."""

    def __init__(self, block: Block, kind: Kind) -> None:
        self.block, self.kind, self.eager = block, kind, type(block).forward

    def __call__(self, streams: Tensor, state: list | None = None, doc_ids_BT: Tensor | None = None) -> Any:
        block, kind, learning = self.block, self.kind, torch.is_grad_enabled()
        if kind.refused or state is not None or (streams.is_cpu and not learning):
            return self.eager(block, streams, state, doc_ids_BT)
        key = (streams.shape, streams.dtype, streams.requires_grad, doc_ids_BT is None, block.training, learning,
               torch.is_autocast_enabled(streams.device.type))
        try:
            run = kind.code.get(key)
            if run is None:
                run = compiled(self.eager, kind.backend)
                if learning and (why := differs(block, self.eager, run, streams, doc_ids_BT)):
                    kind.refuse(f"compiled it differs from eager PyTorch: {why}")
                    return self.eager(block, streams, state, doc_ids_BT)
                kind.code[key] = run
            return run(block, streams, None, doc_ids_BT)
        except Exception as error:
            if lacks_memory(error):
                raise
            kind.refuse(_first_line(error))
        return self.eager(block, streams, state, doc_ids_BT)  # which raises what is not the compiler's fault


def compiled(forward: Callable, backend: str = "inductor") -> Callable:
    """The forward of a class of blocks, to be called with the block first: compiled as a function of its own, since
    one function has one list of variants, which is looked through at each call and is not to grow."""
    code = forward.__code__.replace()
    own = FunctionType(code, forward.__globals__, forward.__name__, forward.__defaults__, forward.__closure__)
    return torch.compile(own, fullgraph=True, dynamic=False, backend=backend)


def differs(block: Block, eager: Callable, fast: Callable, streams: Tensor, doc_ids_BT: Tensor | None,
            ) -> str | None:
    """What is wrong with the output or a gradient of `fast`, in words; None if they are as eager PyTorch's, to
    the rounding of the dtype, which may flip the choice of an expert here and there."""
    device = streams.device.type
    named = [("its input", None), *((name, p) for name, p in block.named_parameters() if p.requires_grad)]
    generator = torch.Generator(streams.device).manual_seed(0)
    weights = torch.randn(streams.shape, generator=generator, device=streams.device)
    low = streams.dtype.itemsize < 4 or torch.is_autocast_enabled(device)
    found = []
    with saved_tensors_hooks(lambda x: x, lambda x: x):  # else activation checkpointing around it would take these
        for run in (eager, fast):
            x = streams.detach().requires_grad_()
            out, report = run(block, x, None, doc_ids_BT)
            with torch.autocast(device, enabled=False):
                loss = (out * weights).sum() / out.numel() ** 0.5 + sum(report.losses.values())
                gradients = torch.autograd.grad(loss, [x, *(p for _, p in named[1:])], allow_unused=True)
            found.append([out.detach(), *gradients])
            del out, report, loss, gradients
    (out, *expected), (got, *actual) = found
    if not _near(got, out, 0.1 if low else 0.02):
        return "its output"
    norms = [0.0 if g is None else _norm(g) for g in expected]
    for (name, _), norm, wanted_gradient, gradient in zip(named, norms, expected, actual, strict=True):
        own = 0.0 if gradient is None else _norm(gradient)
        if max(norm, own) <= NEGLIGIBLE * max(norms):
            continue
        if not LOST * norm <= own <= norm / LOST:
            return f"the gradient of {name} has the norm {own:.3g}, not {norm:.3g}"
        if gradient.ndim > 1 and not _near(gradient, wanted_gradient, 0.5 if low else 0.1):
            return f"the gradient of {name}"
    return None


def _near(x: Tensor, wanted: Tensor, tolerance: float) -> bool:
    """Whether the whole of it is: single numbers may differ."""
    return _norm(x - wanted) <= tolerance * _norm(wanted)


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32)))


def _first_line(error: Exception) -> str:
    """What a compiler said, without the pages it says it on."""
    text = " ".join(cause(error).split())
    return text if len(text) < 300 else f"{text[:297]}..."
