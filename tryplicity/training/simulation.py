"""The process of `build --simulate`: `python -m tryplicity.training.simulation < question.json`.

One training step, as `training.step` does it, on fake tensors: forward, backward, checkpointing, the optimizer, and
what the strategy does between devices, in a process group of which the other ranks are not there. Nothing of it has
data, and what an operation wants to know of data ends the simulation with one line.

It prints one JSON object; what it cannot answer is a line on stderr and an exit code as the command line has them.
"""

from __future__ import annotations

import json
import resource
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor

from tryplicity.data.packing import Batch
from tryplicity.errors import PluginFault, Refused, UserError
from tryplicity.guard import cause, guarded, place
from tryplicity.hardware import Hardware, load_hardware
from tryplicity.model import Model, assemble
from tryplicity.planner.fake import autocast_as_on_a_gpu, fake_group
from tryplicity.planner.ledger import Ledger
from tryplicity.planner.stages import bytes_of_a_row
from tryplicity.plugins import load_plugins
from tryplicity.registry import Registry
from tryplicity.spec import Spec, find_file, load_spec
from tryplicity.training.step import decay_groups, training_step
from tryplicity.world import World

#: micro-batches that are run: the first makes the gradients, the second adds to them, and all others are as the second
MICRO_BATCHES = 2


def main() -> int:
    question = json.load(sys.stdin)
    torch.set_num_threads(1)
    try:
        with guarded():
            registry = load_plugins(question["plugins"]).registry
            settings = question["settings"]
            own = [s for s in settings if not s.startswith("hardware.")]
            hardware = load_hardware(question["hardware"], registry,
                                     [s.removeprefix("hardware.") for s in settings if s not in own])
            spec = load_spec(str(find_file(question["spec"], "spec")), registry, own)
            answer = simulate(spec, hardware, registry, question["strategy"])
    except (UserError, Refused, PluginFault) as error:
        if question["traceback"]:
            traceback.print_exception(error, file=sys.stderr)
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1 if isinstance(error, Refused) else 3
    except Exception as error:
        print(f"error: the step cannot be simulated: {cause(error)} ({place(error)})", file=sys.stderr)
        if question["traceback"]:
            traceback.print_exception(error, file=sys.stderr)
        return 3
    json.dump(answer, sys.stdout)
    return 0


def simulate(spec: Spec, hardware: Hardware, registry: Registry, strategy_name: str) -> dict[str, Any]:
    """The peak of one device in a step that is not the first, in bytes by kind, without overhead; when it is reached;
    and what finding it out took."""
    started = time.process_time()
    if hardware.device != "cpu":
        autocast_as_on_a_gpu()
    strategy = registry.part("parallelism", hardware.options_of(strategy_name)).build()
    model = assemble(spec)
    rows = hardware.batch * min(hardware.accumulation, MICRO_BATCHES)
    left_out = hardware.batch * hardware.accumulation - rows
    more = bytes_of_a_row(model) * left_out
    fake = fake_tensor.FakeTensorMode(allow_non_fake_inputs=True)
    ledger = Ledger(fake)
    with ExitStack() as stack:
        world = stack.enter_context(imagined(strategy.ranks(hardware), hardware.count, ledger))
        stack.enter_context(_questions_of_data())
        stack.enter_context(ledger.watching_resizes())
        stack.enter_context(fake)
        stack.enter_context(ledger)
        model = strategy.place(model, world, spec.training.seed, hardware.precision).train()
        model.activation_checkpointing = hardware.activation_checkpointing
        optimizer = spec.training.optimizer.build().build(*decay_groups(model))
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        _make_state(model, optimizer)
        _label(ledger, model, optimizer)
        _follow(ledger, model, optimizer)
        batch = _batch(rows, spec)
        ledger.truth, ledger.phase = True, "between passes"
        ledger.start()
        training_step(model, optimizer, strategy, batch, step=1, micro_batch=hardware.batch,
                      precision=hardware.precision, max_norm=spec.training.gradient_clip, learning_rate_factor=1.0,
                      world=world, rows=rows * world.size)
        parts = ledger.parts()
    parts["buffers"] = parts.get("buffers", 0) + more
    return {"parts": parts, "moment": str(ledger.peak_at), "seconds": time.process_time() - started,
            "resident": _resident()}


@dataclass(frozen=True)
class Imagined(World):
    """A world whose other ranks are not there; each of them has what this one has."""

    begin: Callable[[], object] = field(default=lambda: None)  # its process group

    def total(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return list(tensors) if self.size == 1 else [tensor * self.size for tensor in tensors]

    def any(self, flag: bool) -> bool:
        return flag

    def first(self, value: Any) -> Any:
        return value

    def gathered(self, value: Any) -> list[Any]:
        return [value] * self.size

    def group(self) -> None:
        self.begin()


@contextmanager
def imagined(ranks: int, of_a_machine: int, ledger: Ledger) -> Iterator[World]:
    """The first of so many ranks, so many of which share a machine."""
    with ExitStack() as stack:
        world = Imagined(0, ranks, local_size=min(ranks, of_a_machine),
                         begin=lambda: stack.enter_context(fake_group(ranks, ledger.looking_away)))
        if ranks > 1:
            world.begin()
        yield world


def _batch(rows: int, spec: Spec) -> Batch:
    ids_BT = torch.empty(rows, spec.context_length, dtype=torch.int64)
    return Batch(ids_BT, torch.empty_like(ids_BT), torch.empty_like(ids_BT), ())


def _make_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """What the first step leaves, so that the step that is looked at is one like all others."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _tensors(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))


def _label(ledger: Ledger, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    ledger.label("weights", model.parameters())
    ledger.label("buffers", model.buffers())
    ledger.label("optimizer", _tensors(optimizer))


def _follow(ledger: Ledger, model: Model, optimizer: torch.optim.Optimizer) -> None:
    """Let the ledger know where the step is."""

    def enters(stage: str) -> Callable[..., None]:
        return lambda *_: setattr(ledger, "stage", stage)

    def comes_back(stage: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: tuple[Tensor, Any]) -> None:
            if output[0].requires_grad:
                output[0].register_hook(enters(stage))  # called when its gradient is there

        return hook

    def forward_begins(*_: Any) -> None:
        ledger.phase, ledger.micro_batch = "forward", ledger.micro_batch + 1

    def forward_ends(*_: Any) -> None:
        ledger.phase = "between passes"

    def optimizer_begins(*_: Any) -> None:
        ledger.label("gradients", (p.grad for p in model.parameters() if p.grad is not None))
        ledger.phase, ledger.stage = "optimizer step", ""

    model.register_forward_pre_hook(forward_begins)
    model.register_forward_hook(forward_ends)
    model.embedding.register_forward_pre_hook(enters("the embedding"))
    for i, block in model.layers.named_children():  # a shared one as the first of its layers
        block.register_forward_pre_hook(enters(f"layer {i}"))
        block.register_forward_hook(comes_back(f"layer {i}"))
    model.norm.register_forward_pre_hook(enters("the losses"))
    optimizer.register_step_pre_hook(optimizer_begins)
    optimizer.register_step_post_hook(forward_ends)


@contextmanager
def _questions_of_data() -> Iterator[None]:
    """What has no answer without data is a UserError that says so."""
    try:
        yield
    except (fake_tensor.DataDependentOutputException, fake_tensor.DynamicOutputShapeException) as error:
        raise UserError(f"{error.func} needs the data of a tensor, and the step cannot be simulated: a training step "
                        "must not read values on the host nor make shapes that depend on them") from error
    except fake_tensor.UnsupportedOperatorException as error:
        raise UserError(f"{error.func} has no rule for the shapes of its results, and the step cannot be simulated: "
                        "give it one with torch.library.register_fake") from error


def _resident() -> int:
    """The most memory that this process had, in bytes."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


if __name__ == "__main__":
    sys.exit(main())
