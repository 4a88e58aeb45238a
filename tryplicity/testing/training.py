"""What every module of a model owes in training: gradients, precision, no waiting, nothing kept on the side.

Shapes: B batch, T time, D hidden.
"""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tryplicity.components import Linear, tensors
from tryplicity.testing.promises import LAYERS, MODULES, Broken, NotAsked, promised
from tryplicity.testing.trial import (
    BORDERS,
    ROWS,
    TIME,
    Trial,
    ids,
    in_chunks,
    made,
    needs,
    packing_linears,
    run,
    same,
    tokens,
)


def _training_loss(trial: Trial, module: nn.Module, x_BTD: Tensor, ids_BT: Tensor) -> Tensor:
    given = trial.called(module, x_BTD, ids_BT)
    return sum(one.float().square().mean() if one.ndim else one.float() for one in given)


def _learns(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


# --- assembled without memory ---

class _Draws(TorchDispatchMode):
    """Sees what draws random numbers outside of a reset_parameters (torch's own modules call theirs when made)."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            frame, inside = sys._getframe(1), False
            while frame is not None and not inside:
                inside, frame = frame.f_code.co_name == "reset_parameters", frame.f_back
            if not inside:
                self.seen.append(str(func).removeprefix("aten.").partition(".")[0])
        return func(*args, **(kwargs or {}))


@promised(*MODULES, read="initialisation")
def nothing_drawn(trial: Trial) -> None:
    """Its constructor draws no random numbers and takes no memory."""
    generators = {"torch": lambda: torch.get_rng_state().sum().item(), "numpy": lambda: numpy.random.get_state()[2],
                  "random": lambda: hash(random.getstate())}
    trial.spec  # noqa: B018 - whatever is loaded for it may draw
    before = {name: state() for name, state in generators.items()}
    with torch.device("meta"), _Draws() as draws:
        module = trial.build()
    used = draws.seen or [name for name, state in generators.items() if state() != before[name]]
    if used:
        raise Broken(f"it draws random numbers ({used[0]}) while it is assembled on the meta device, where they are "
                     "lost; draw them in reset_parameters")
    own = dict(module.named_parameters()) | dict(module.named_buffers())
    for name, tensor in own.items():
        if tensor.device.type != "meta":
            raise Broken(f"{name} lies on {tensor.device} while it is assembled on the meta device; make it without "
                         "naming a device")


# --- gradients ---

@promised(*MODULES, read="gradients")
def gradients(trial: Trial) -> None:
    """Every parameter gets a finite gradient, the same when the forward is run again for it."""
    layer, x_BTD, ids_BT = made(trial.build), tokens(trial.hidden_size), ids(BORDERS[1])
    if trial.family == "objective":
        needs(layer.reads_blocks(), "it weighs tokens: its weights carry no gradient")
    layer.train()
    found = []
    for again in (False, True):
        layer.zero_grad()

        def loss(x_BTD: Tensor) -> Tensor:
            return _training_loss(trial, layer, x_BTD, ids_BT)

        x = x_BTD.clone().requires_grad_()
        (checkpoint(loss, x, use_reentrant=False, preserve_rng_state=False) if again else loss(x)).backward()
        own = dict(layer.named_parameters()) | {"its input": x}
        for name, tensor in own.items():
            if tensor.requires_grad and (tensor.grad is None or tensor.grad.dtype != tensor.dtype):
                raise Broken(f"{name} gets none")
            if tensor.requires_grad and not tensor.grad.isfinite().all():
                raise Broken(f"that of {name} is not finite")
        found.append({name: tensor.grad.clone() for name, tensor in own.items() if tensor.requires_grad})
    for name, grad in found[0].items():
        if grad.abs().sum() > 0:
            same(found[1][name], grad, f"{name}, with activation checkpointing")


@promised(*MODULES, read="nothing-on-the-side")
def nothing_kept(trial: Trial) -> None:
    """A forward pass keeps nothing: no tensor on the module, and no buffer changed."""
    module, ids_BT = made(trial.build).train(), ids(BORDERS[0])
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    before = _attributes(module)
    _training_loss(trial, module, tokens(trial.hidden_size).requires_grad_(), ids_BT)
    for where, held in _attributes(module).items():
        for tensor in tensors(held):
            if not any(tensor is one for one in tensors(before.get(where))):
                raise Broken(f"forward keeps a tensor {list(tensor.shape)} on itself, as {where}; return it in a "
                             "Report, or hold it in a buffer that after_step changes")
    for name, buffer in module.named_buffers():
        if not torch.equal(buffer, buffers[name]):
            raise Broken(f"forward changes the buffer {name}, which activation checkpointing does twice; change it "
                         "in after_step, from what the Report says")


def _attributes(module: nn.Module) -> dict[str, Any]:
    """By path: what modules hold beside parameters, buffers and modules."""
    return {f"{path}.{name}".lstrip("."): copy.copy(value) if isinstance(value, list | dict) else value
            for path, inner in module.named_modules() for name, value in vars(inner).items()
            if name not in ("_parameters", "_buffers", "_modules")}


# --- precision ---

@promised(*MODULES, read="precision")
def half(trial: Trial) -> None:
    """It runs in bf16, and in fp32 under autocast to bf16."""
    ids_BT = ids(BORDERS[0])
    for dtype, autocast in ((torch.bfloat16, False), (torch.float32, True)):
        module = made(trial.build, dtype).train()
        where = "fp32 under autocast" if autocast else "bf16"
        x_BTD = tokens(trial.hidden_size, dtype=dtype).requires_grad_()
        try:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                given = trial.called(module, x_BTD, ids_BT)
            loss = sum(one.float().square().mean() for one in given)
            if loss.requires_grad:
                loss.backward()
            if trial.family not in ("head", "objective"):
                with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    given = [*given, in_chunks(module.eval(), x_BTD.detach(), [4, 1, 4])]
        except RuntimeError as error:
            raise Broken(f"in {where}: {error}") from error
        if not all(one.isfinite().all() for one in given):
            raise Broken(f"the output is not finite in {where}")
        for name, parameter in module.named_parameters():
            if loss.requires_grad and (parameter.grad is None or not parameter.grad.isfinite().all()):
                raise Broken(f"the gradient of {name} is {'missing' if parameter.grad is None else 'not finite'} in "
                             f"{where}")
        if trial.family not in ("head", "objective") and given[0].dtype not in (dtype, torch.bfloat16):
            raise Broken(f"the output is {given[0].dtype} in {where}")


# --- the device is not waited for ---

class _Fetches(TorchFunctionMode):
    """Refuses what copies a tensor to the host."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.cpu, Tensor.numpy, Tensor.tolist) or (
                func is Tensor.to and "cpu" in (*map(str, args[1:]), str((kwargs or {}).get("device")))):
            raise Broken(f"Tensor.{func.__name__} reads it")
        return func(*args, **(kwargs or {}))


@promised(*MODULES, read="no-waiting-for-the-device")
def on_the_device(trial: Trial) -> None:
    """Nothing is read from the device while gradients are on."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

    trial.spec  # noqa: B018 - read with tensors of its own
    with FakeTensorMode():
        module = trial.build().train()
        x_BTD = torch.empty(ROWS, TIME, trial.hidden_size, requires_grad=True)
        ids_BT = torch.zeros(ROWS, TIME, dtype=torch.long)
        try:
            with _Fetches():
                loss = _training_loss(trial, module, x_BTD, ids_BT)
            if loss.requires_grad:
                loss.backward()
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise Broken(f"{error} reads it") from error


# --- torch's compiler ---

@contextmanager
def _counting() -> Iterator[Any]:
    from torch import _dynamo
    from torch._dynamo.testing import CompileCounter

    _dynamo.reset()
    try:
        yield CompileCounter()
    finally:
        _dynamo.reset()


@promised(*LAYERS, read="compiling")
def compiled_once(trial: Trial) -> None:
    """torch's compiler takes it whole, and once for a shape."""
    from torch import _dynamo

    module, ids_BT = made(trial.build).train(), ids(BORDERS[0])
    with _counting() as counter:
        code = torch.compile(lambda x_BTD: trial.called(module, x_BTD, ids_BT), fullgraph=True, dynamic=False,
                             backend=counter)
        seen = []
        for step in range(6):
            for inner in module.modules():
                if hasattr(inner, "before_step"):
                    inner.before_step(step)
            x_BTD = tokens(trial.hidden_size, seed=step).requires_grad_()
            try:
                outputs = code(x_BTD)
            except _dynamo.exc.TorchDynamoException as error:
                raise Broken(f"it cannot be taken whole: {str(error).strip().splitlines()[0]}") from error
            sum(one.float().square().mean() for one in outputs).backward()
            seen.append(counter.frame_count)
    if seen[-1] > seen[2]:  # what before_step decides may come in two kinds
        raise Broken(f"it is compiled again at each step ({seen[-1]} times in {len(seen)} steps of one shape): a "
                     "number on the module that changes with each call is part of the code")


# --- saving and packing ---

@promised(*MODULES, read="saving")
@torch.no_grad()
def resumed(trial: Trial) -> None:
    """What a checkpoint holds of it is all that it goes on from."""
    x_BTD, ids_BT = tokens(trial.hidden_size), ids(BORDERS[0])
    module, other = made(trial.build, seed=0), made(trial.build, seed=1)
    with torch.enable_grad():  # it has been in training for a while
        for _ in range(2):
            trial.called(module.train(), x_BTD.clone().requires_grad_(), ids_BT)
    module.eval()
    saved = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    other.load_state_dict(saved)
    for one, two in zip(trial.called(module, x_BTD, ids_BT), trial.called(other, x_BTD, ids_BT), strict=True):
        same(two, one, "another instance that loads what this one saved gives something else; a buffer with "
                       "persistent=False, or a number on the module, is not in it")


@promised(*LAYERS, "router", "activation", "norm", read="packing")
@torch.no_grad()
def packed(trial: Trial) -> None:
    """With linears that pack, it gives the same packed and unpacked."""
    names = packing_linears(trial.registry)
    needs(names, "no installed linear packs")
    x_BTD, found = tokens(trial.hidden_size), 0
    for name in names:
        spec = trial.spec_with(linear=name)
        module = made(lambda spec=spec: trial.build(spec))
        twin = copy.deepcopy(module)
        for linear in twin.modules():
            if isinstance(linear, Linear) and linear.packed_like():
                linear.adopt({part: tensor.clone() for part, tensor in linear.pack().items()})
                found += 1
        # one digit of an int8 activation may fall otherwise
        same(run(twin, x_BTD), run(module, x_BTD), f"with {name}, packed", 0.02)
        same(in_chunks(twin, x_BTD, [4, 1, 4]), run(module, x_BTD), f"with {name}, packed, in chunks", 0.02)
    if not found:
        raise NotAsked("it has no linear made by site.linear")
