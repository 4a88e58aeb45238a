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
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from tryplicity.components import Head, output_and_report
from tryplicity.guard import cause, lacks_memory
from tryplicity.model import Block, Model
from tryplicity.parts import config_as_dict
from tryplicity.training.process import say

NEGLIGIBLE = 1e-7  # of the largest norm of a parameter's gradient: a gradient below is rounding, and compared with none
LOST = 0.1  # a gradient of less than this share of what it should be, or as many times of it, is not rounding


def compile_blocks(model: Model, mode: str, device: torch.device, say: Callable[[str], None] = say,
                   backend: str = "inductor") -> str | None:
    """Have the blocks of a placed model, and what its heads draft with, compiled as `training.compile` says; a line
    about it, None if they are not.

    Between activation checkpointing, which may go around it, and sharding, whose hooks stay outside of it.
    """
    if not wanted(mode, device):
        return None
    kinds = kinds_of(model)
    for layers in kinds:
        kind = Kind(f"layers {', '.join(map(str, layers))}", say, backend)
        for block in (model.layers[number] for number in layers):
            block.forward = Compiled(block, Block.forward, kind)
    for name, head in model.heads.items():
        if type(head).draft is not Head.draft:
            head.draft = Compiled(head, type(head).draft, Kind(f"head {name}", say, backend))
    return (f"{len(kinds)} {'kinds' if len(kinds) > 1 else 'kind'} of block will be compiled, each when first met, and "
            f"again for another length; the code is kept in {cache_folder()}")


def kinds_of(model: Model) -> list[list[int]]:
    """The numbers of the layers that are alike, kind by kind."""
    kinds: dict[str, list[int]] = {}
    for number, block in enumerate(model.spec.layers):
        kinds.setdefault(json.dumps(config_as_dict(block), sort_keys=True), []).append(number)
    return list(kinds.values())


def wanted(mode: str, device: torch.device) -> bool:
    """auto: on a CPU the layers' own eager forms are as fast, without the minutes that compiling takes."""
    return mode == "on" or (mode == "auto" and device.type == "cuda")


def cache_folder() -> str:
    """Where the compiler keeps its code from one run to the next; TORCHINDUCTOR_CACHE_DIR names another."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return cache_dir()


class Kind:
    """Modules that are alike, and their common code by what they are called with."""

    def __init__(self, name: str, say: Callable[[str], None], backend: str) -> None:
        self.name, self.say, self.backend = name, say, backend
        self.code: dict[tuple, Callable] = {}
        self.shapes: set[torch.Size] = set()  # learnt with
        self.refused: str | None = None  # why eager PyTorch does it

    def refuse(self, why: str) -> None:
        self.refused, self.code = why, {}
        self.say(f"warning: {self.name}: goes on uncompiled: {why}")


class Compiled:
    """A method of one module: of a tensor, and for a block its state and documents."""

    def __init__(self, module: nn.Module, eager: Callable, kind: Kind) -> None:
        self.module, self.kind, self.eager = module, kind, eager

    def __call__(self, x: Tensor, *given: Any) -> Any:
        module, kind, learning = self.module, self.kind, torch.is_grad_enabled()
        if kind.refused or (given and given[0] is not None) or not (learning or self._worth_scoring(x)):
            return self.eager(module, x, *given)
        key = (x.shape, x.dtype, x.requires_grad, *(one if isinstance(one, int) else one is None for one in given),
               module.training, learning, torch.is_autocast_enabled(x.device.type))
        if (run := kind.code.get(key)) is None and (run := self._made(key, learning, x, *given)) is None:
            return self.eager(module, x, *given)  # which raises what is not the compiler's fault
        try:
            return run(module, x, *given)
        except _compiler_errors() as error:  # of something that changes with each step; nothing else is its business
            kind.refuse(_first_line(error))
        return self.eager(module, x, *given)

    def _made(self, key: tuple, learning: bool, x: Tensor, *given: Any) -> Callable | None:
        """The code for such a call, tried; None where it is refused."""
        kind, run = self.kind, compiled(self.eager, self.kind.backend)
        try:
            why = differs(self.module, self.eager, run, x, *given) if learning else None
            if why is not None:
                kind.refuse(f"compiled it differs from eager PyTorch: {why}")
                return None
            if not learning:
                run(self.module, x, *given)
        except Exception as error:
            if lacks_memory(error):
                raise
            kind.refuse(_first_line(error))
            return None
        if learning:
            kind.shapes.add(x.shape)
        kind.code[key] = run
        return run

    def _worth_scoring(self, x: Tensor) -> bool:
        """Without gradients, rows as they are learnt with alone: decoding has a length of its own for each text. On a
        CPU the layers have C of their own for it."""
        return not x.is_cpu and x.shape in self.kind.shapes


def _compiler_errors() -> tuple[type[Exception], ...]:
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    return TorchDynamoException, FailOnRecompileLimitHit


def compiled(forward: Callable, backend: str = "inductor") -> Callable:
    """A method of a class, to be called with the instance first: compiled as a function of its own, since one function
    has one list of variants, which is looked through at each call and is not to grow."""
    code = forward.__code__.replace()
    own = FunctionType(code, forward.__globals__, forward.__name__, forward.__defaults__, forward.__closure__)
    return torch.compile(own, fullgraph=True, dynamic=False, backend=backend)


def differs(module: nn.Module, eager: Callable, fast: Callable, x: Tensor, *given: Any) -> str | None:
    """What is wrong with the output or a gradient of `fast`, in words; None if they are as eager PyTorch's, to the
    rounding of the dtype, which may flip the choice of an expert here and there."""
    device = x.device.type
    named = [("its input", None), *((name, p) for name, p in module.named_parameters() if p.requires_grad)]
    generator = torch.Generator(x.device)
    low = x.dtype.itemsize < 4 or torch.is_autocast_enabled(device)
    found = []
    with saved_tensors_hooks(lambda x: x, lambda x: x):  # else activation checkpointing around it would take these
        for run in (eager, fast):
            own = x.detach().requires_grad_()
            out, report = output_and_report(run(module, own, *given))
            weights = torch.randn(out.shape, generator=generator.manual_seed(0), device=x.device)
            with torch.autocast(device, enabled=False):
                loss = (out * weights).sum() / out.numel() ** 0.5 + sum(report.losses.values())
                gradients = torch.autograd.grad(loss, [own, *(p for _, p in named[1:])], allow_unused=True)
            found.append([out.detach(), *gradients])
            del out, report, loss, gradients
    (out, *expected), (got, *actual) = found
    if not _near(got, out, 0.1 if low else 0.02):
        return "its output"
    norms = [0.0 if g is None else _norm(g) for g in expected]
    for (name, _), norm, wanted_gradient, gradient in zip(named, norms, expected, actual, strict=True):
        got_norm = 0.0 if gradient is None else _norm(gradient)
        if max(norm, got_norm) <= NEGLIGIBLE * max(norms):
            continue
        if not LOST * norm <= got_norm <= norm / LOST:
            return f"the gradient of {name} has the norm {got_norm:.3g}, not {norm:.3g}"
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
