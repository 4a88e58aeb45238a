"""What a component owes as a part of a model: its plan, its checkpoints, and the same training on several ranks.

Shapes: B batch, T time, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tryplicity.components import IGNORE, Parallelism
from tryplicity.model import Model, assemble, initialise
from tryplicity.parts import Component
from tryplicity.testing.promises import LAYERS, MODULES, Broken, NotAsked, promised
from tryplicity.testing.trial import CONTEXT, VOCABULARY, Trial
from tryplicity.world import World

BATCH = 4
RATES = 0.1  # of plain gradient descent: what it makes of a gradient is the gradient


def batch() -> Any:
    """Rows of documents of several lengths."""
    from tryplicity.data.packing import Batch

    ids_BT = torch.randint(0, VOCABULARY, (BATCH, CONTEXT), generator=torch.Generator().manual_seed(1))
    docs_BT = (torch.arange(CONTEXT) >= torch.tensor([30, 3, CONTEXT, 47])[:, None]).int()
    targets_BT = ids_BT.roll(-1, 1)
    targets_BT[:, -1] = IGNORE
    targets_BT[:, :-1][docs_BT[:, 1:] != docs_BT[:, :-1]] = IGNORE
    return Batch(ids_BT, targets_BT, docs_BT, 0)


def _stepped(model: nn.Module, optimizer: torch.optim.Optimizer, strategy: Parallelism, world: World, rows: Any,
             step: int) -> float:
    """The loss, in nats a token."""
    from tryplicity.training.step import training_step

    said = training_step(model, optimizer, strategy, rows, step=step, micro_batch=1, precision="fp32", max_norm=1e9,
                         learning_rate_factor=1.0, world=world)
    return float(said.loss.value)


def _plain(model: nn.Module) -> torch.optim.Optimizer:
    from tryplicity.training.step import decay_groups

    return torch.optim.SGD([{"params": params, "lr": RATES, "initial_lr": RATES} for params in decay_groups(model)
                            if params])


@promised(*MODULES, "optimizer", "schedule", "brain", "parallelism", read="planning")
def planned(trial: Trial) -> None:
    """`build` can plan it: what is counted is what is there, and memory, FLOPs and money follow."""
    from tryplicity.hardware import load_hardware
    from tryplicity.planner import plan
    from tryplicity.planner.stages import measure_stages
    from tryplicity.promises import check_promises

    model, hardware = assemble(trial.spec), load_hardware("cpu", trial.registry)
    if trial.family == "parallelism":
        hardware = _for_strategy(trial, hardware)
    said = plan(model, hardware, trial.registry)
    check_promises(model, trial.spec)
    there = initialise(assemble(trial.spec), "cpu", 0)
    real = sum(parameter.numel() for parameter in there.parameters())
    if said.counts.total != real:
        raise Broken(f"{said.counts.total:,} parameters are counted and {real:,} are there")
    if not (said.speed.flops_per_token > 0 and said.nearest.memory.total > 0):
        raise Broken("it plans with no FLOPs or no memory")
    if trial.family in LAYERS:
        for cost in measure_stages(model, hardware, "fp32", True)[1:-1]:
            if cost.flops_forward <= 0 and any(p.ndim > 1 for p in model.layers[0].parameters()):
                raise Broken("no FLOPs are seen in it: a kernel of its own says them in extra_flops")


def _for_strategy(trial: Trial, hardware: Any) -> Any:
    """The machine, with one device or two, whichever the strategy takes, which is then the one asked for."""
    strategy = trial.part.build()
    counts = [count for count in (2, 1) if strategy.refuses(replace(hardware, count=count)) is None]
    if not counts:
        raise NotAsked(f"on a CPU: {strategy.refuses(hardware)}")
    return replace(hardware, count=counts[0], strategy={"type": trial.component.name, **trial.options})


@promised(*MODULES, "optimizer", "schedule", "brain", read="saving")
def goes_on(trial: Trial) -> None:
    """A training that is saved and resumed takes the same next step."""
    from tryplicity.training.step import decay_groups

    def begun(seed: int) -> tuple[Model, torch.optim.Optimizer]:
        model = initialise(assemble(trial.spec), "cpu", seed).train()
        optimizer = trial.spec.training.optimizer.build().build(*decay_groups(model))
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        return model, optimizer

    alone, strategy, rows = World(), Parallelism(), batch()
    model, optimizer = begun(0)
    for step in range(2):
        _stepped(model, optimizer, strategy, alone, rows, step)
    saved = _kept(strategy.state(model, optimizer))
    other, its_optimizer = begun(1)
    strategy.load(other, its_optimizer, saved)
    for step in (2, 3):
        wanted = _stepped(model, optimizer, strategy, alone, rows, step)
        found = _stepped(other, its_optimizer, strategy, alone, rows, step)
        if not abs(found - wanted) <= 1e-5 * abs(wanted):
            raise Broken(f"step {step}: a loss of {found:.6f} after a resume, {wanted:.6f} without")


def _kept(value: Any) -> Any:
    """A copy, as a checkpoint has it."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, Mapping):
        return {key: _kept(inner) for key, inner in value.items()}
    return [_kept(inner) for inner in value] if isinstance(value, list) else value


@promised(*MODULES, "parallelism", read="several-ranks", several_ranks=True)
def ranks(trial: Trial) -> None:
    """Two ranks take the step that one takes, under every strategy."""
    from tryplicity.hardware import load_hardware
    from tryplicity.testing.ranks import together

    hardware = replace(load_hardware("cpu", trial.registry), count=2, strategy="auto")
    own = trial.family == "parallelism"
    names = [trial.component.name] if own else trial.registry.names("parallelism")
    values = [{"type": name, **(trial.options if own else {})} for name in names]
    refusals = [trial.registry.part("parallelism", value).build().refuses(hardware) for value in values]
    values = [value for value, refusal in zip(values, refusals, strict=True) if refusal is None]
    if not values:
        raise NotAsked("; ".join(f"{name}: {why}" for name, why in zip(names, refusals, strict=True)))
    model = initialise(assemble(trial.spec), "cpu", 0).train()
    before = {name: tensor.clone() for name, tensor in Parallelism().weights(model).items()}
    losses = [_stepped(model, optimizer, Parallelism(), World(), batch(), step)
              for optimizer in [_plain(model)] for step in range(2)]
    wanted = Parallelism().weights(model)
    for value, found in zip(values, together(2, on_a_rank, _question(trial), values)[0], strict=True):
        name, (theirs, their_losses) = value["type"], found
        for step, (one, two) in enumerate(zip(losses, their_losses, strict=True)):
            if not abs(one - two) <= 1e-3 * abs(one):
                raise Broken(f"{name}: a loss of {two:.6f} in step {step} on two ranks, {one:.6f} on one")
        if theirs.keys() != wanted.keys():
            raise Broken(f"{name}: weights gives other names than the model's: "
                         f"{sorted(theirs.keys() ^ wanted.keys())[:3]}")
        for tensor, due in wanted.items():
            # what two steps made of it, beside what rounding leaves
            change, their_change = (after.double() - before[tensor].double() for after in (due, theirs[tensor]))
            near = 1e-6 * before[tensor].double().norm() + 1e-9
            if not (change - their_change).norm() <= 0.02 * change.norm() + near:
                raise Broken(f"{name}: {tensor} after two steps is another on two ranks than on one")


def _question(trial: Trial) -> tuple[Any, ...]:
    """The trial, as another process is told of it."""
    from tryplicity.plugins import load_plugins

    known = trial.component in load_plugins(trial.files).registry.components()
    named = (trial.family, trial.component.name) if known else trial.component
    return named, dict(trial.options), trial.files


def on_a_rank(world: World, question: tuple[Any, ...], strategies: list[Any]) -> list[tuple[dict[str, Tensor], list]]:
    """Under each strategy: the weights after two steps on this rank's rows, and the losses."""
    from tryplicity.data.packing import rows_of
    from tryplicity.plugins import load_plugins

    named, options, files = question
    component: type[Component] = named if isinstance(named, type) else load_plugins(files).registry.get(*named)
    trial, found = Trial(component, options, files), []
    for value in strategies:
        strategy = trial.registry.part("parallelism", value).build()
        model = strategy.place(assemble(trial.spec), world, 0).train()
        optimizer, rows = _plain(model), rows_of(batch(), world.part(BATCH))
        losses = [_stepped(model, optimizer, strategy, world, rows, step) for step in range(2)]
        weights = strategy.weights(model)
        found.append(({name: tensor.clone() for name, tensor in weights.items()}, losses))
    return found
