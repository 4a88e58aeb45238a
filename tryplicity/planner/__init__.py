"""What a model needs on a machine: parameters, FLOPs, memory, time, money. No accelerator is needed."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tryplicity.errors import PluginFault, UserError
from tryplicity.guard import guarded
from tryplicity.planner.memory import GB, Facts, MemoryPlan, ModelStage, Saving
from tryplicity.planner.speed import Money, Speed, estimate_cost, estimate_speed

if TYPE_CHECKING:
    from tryplicity.hardware import Hardware
    from tryplicity.model import Model
    from tryplicity.planner.count import Counts
    from tryplicity.planner.measure import Cost
    from tryplicity.planner.stages import Blocks
    from tryplicity.registry import Registry


@dataclass(frozen=True)
class Option:
    """A strategy and what became of it."""

    name: str
    memory: MemoryPlan | None
    """None where the strategy failed at planning."""
    reason: str | None
    """Why it was not chosen; None for the chosen one."""


@dataclass(frozen=True)
class Plan:
    """Everything `build` says of a model on a machine."""

    name: str
    hardware: Hardware
    counts: Counts
    chosen: Option | None
    """None where nothing fits."""
    rejected: list[Option]
    nearest: Option
    """The chosen strategy, or the one that misses by least."""
    speed: Speed
    cost: Money
    saving: Saving
    blocks: Blocks = "eager"
    """Whose memory was planned: of blocks as eager PyTorch runs them, as the compiler cuts them, or what is larger."""
    compiled: MemoryPlan | None = None
    """Where eager blocks were planned and compiled ones will run: what these take at most, with the same strategy."""

    @property
    def fits(self) -> bool:
        return self.chosen is not None

    def as_dict(self) -> dict[str, Any]:
        """The object `build --json` prints."""
        from tryplicity.planner.count import as_dict, layers_as_dicts

        memory, budget = self.nearest.memory, self.hardware.memory_bytes
        return {
            "name": self.name,
            "fits": self.fits,
            "parameters": as_dict(self.counts),
            "packed_bytes_per_token": self.counts.packed_bytes_per_token,
            "memory": {
                "budget_gb": budget / GB, "total_gb": memory.total / GB,
                "headroom_gb": (budget - memory.total) / GB,
                "moment": memory.moment, "parts": {name: size / GB for name, size in memory.parts.items()},
                "blocks": self.blocks, "compiled_at_most_gb": self.compiled and self.compiled.total / GB,
            },
            "strategy": {
                "chosen": self.chosen.name if self.chosen else None,
                "rejected": [{"name": o.name, "total_gb": o.memory and o.memory.total / GB, "reason": o.reason}
                             for o in self.rejected],
            },
            "throughput": {"flops_per_token": self.speed.flops_per_token,
                           "tokens_per_second": self.speed.tokens_per_second, "basis": self.speed.basis},
            "cost": {"per_hour": self.cost.per_hour, "per_billion_tokens": self.cost.per_billion_tokens},
            "saving": {"checkpoint_gb": self.saving.checkpoint / GB, "checkpoints_at_most": self.saving.most,
                       "weights_gb": self.saving.weights / GB, "disk_gb": self.saving.disk / GB,
                       "machine_memory_gb": self.saving.checkpoint / self.hardware.nodes / GB},
            "layers": layers_as_dicts(self.counts),
        }


def plan(model: Model, hardware: Hardware, registry: Registry) -> Plan:
    """model: assembled on the meta device. Strategies are tried by their `order`, equal ones by name; a profile that
    names one gets that one, fitting or not.
    """
    from tryplicity.planner.count import count

    counts, mode = count(model), model.spec.training.compile
    blocks: Blocks = "compiled" if mode == "on" else "eager"
    facts = gather_facts(model, hardware, counts, blocks)
    # a layer's fault is no strategy's
    costs = facts.measured("fp32", hardware.accumulation > 1 or hardware.devices > 1)
    options, chosen, nearest = _decide(model, facts, hardware, registry, blocks)
    compiled = None
    if mode == "auto" and hardware.device != "cpu" and chosen is not None:
        most = gather_facts(model, hardware, counts, "at most")
        ((bound,), _) = plan_strategies(model, most, hardware, registry, "at most", chosen.name)
        compiled = bound.memory
        if not compiled.fits(hardware.memory_bytes):
            blocks, compiled = "larger", None
            facts = gather_facts(model, hardware, counts, blocks)
            with _told("compiled blocks might not fit: torch's compiler is asked, half a minute for each kind of them"):
                options, chosen, nearest = _decide(model, facts, hardware, registry, blocks)
    unasked = (f"{chosen.name} is the first that fits" if hardware.strategy_name == "auto" and chosen else
               f"the profile asks for {hardware.strategy_name}")
    rejected = [replace(o, reason=o.reason or unasked) for o in options if o is not chosen]

    speed = estimate_speed(flops_of_a_token(costs, facts), facts.tokens, nearest.memory, hardware)
    cost = estimate_cost(speed, hardware)
    training = model.spec.training
    weights = 4 * counts.total + counts.buffer_bytes
    saving = Saving(weights + training.optimizer.component.state_bytes * counts.total, training.keep_checkpoints + 1,
                    weights)
    return Plan(model.spec.name, hardware, counts, chosen, rejected, nearest, speed, cost, saving, blocks,
                compiled)


def _decide(model: Model, facts: Facts, hardware: Hardware, registry: Registry,
            blocks: Blocks) -> tuple[list[Option], Option | None, Option]:
    """All strategies, the chosen one (None where nothing fits), and it or the one that misses by least."""
    options, refused = plan_strategies(model, facts, hardware, registry, blocks)
    asked = [o for o in options if o.memory is not None and hardware.strategy_name in ("auto", o.name)]
    if not asked:
        raise PluginFault("no parallelism strategy can plan: " + "; ".join(f"{o.name}: {o.reason}" for o in options))
    chosen = next((o for o in asked if o.reason is None), None)
    return options, chosen, chosen or min([o for o in asked if o.name not in refused] or asked,
                                          key=lambda o: o.memory.total)


@contextmanager
def _told(what: str) -> Iterator[None]:
    started = time.monotonic()
    print(f"note: {what}", file=sys.stderr, flush=True)
    yield
    print(f"note: the compiler took {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)


def plan_strategies(model: Model, facts: Facts, hardware: Hardware, registry: Registry, blocks: Blocks = "eager",
                    only: str | None = None) -> tuple[list[Option], set[str]]:
    """What becomes of each strategy, or of one, in the order in which they are tried, and the names of those that
    cannot be used on this hardware at all. facts: of this model on this hardware, with such blocks."""
    from tryplicity.planner.count import count
    from tryplicity.promises import check_memory

    names = sorted([only] if only else registry.names("parallelism"),
                   key=lambda name: (registry.get("parallelism", name).order, name))
    options, refused = [], set()
    for name in names:
        try:
            with guarded(registry.get("parallelism", name)):
                strategy = registry.part("parallelism", hardware.options_of(name)).build()
                own, passes = facts, hardware
                if strategy.row_by_row:
                    passes = replace(hardware, batch=1, accumulation=hardware.batch * hardware.accumulation)
                    own = gather_facts(model, passes, count(model), blocks)
                reason, memory = strategy.refuses(hardware), check_memory(strategy, strategy.memory(own, passes))
        except (PluginFault, UserError) as fault:  # a strategy that nobody asked for must not end the plan
            if hardware.strategy_name == name:
                raise
            options.append(Option(name, None, str(fault)))
            continue
        if reason is not None:
            refused.add(name)
        elif not memory.fits(hardware.memory_bytes):
            reason = f"{memory.total / GB:.1f} GB > {hardware.memory_gb:g} GB"
        options.append(Option(name, memory, reason))
    return options, refused


def flops_of_a_token(costs: Sequence[Cost], facts: Facts) -> float:
    return sum(c.flops_forward + c.flops_backward for c in costs) / facts.tokens


def gather_facts(model: Model, hardware: Hardware, counts: Counts, blocks: Blocks = "eager") -> Facts:
    """What strategies plan with. Stages are measured when a strategy first asks for them."""
    from tryplicity.planner.count import parameters_of
    from tryplicity.planner.stages import bytes_of_a_row, measure_stages

    spec = model.spec
    layers = []
    for i, block in enumerate(model.layers):
        size = parameters_of(block)
        own = (size, None) if model.layers.first[i] == i else (0, size)
        layers.append(ModelStage(f"layer {i}", *own))
    table = model.embedding.weight.numel()
    rest = counts.total - table - sum(b.parameters for b in layers)
    tokens = hardware.batch * spec.context_length

    @functools.cache
    def measured(weights: str, gradients_exist: bool) -> Sequence[Cost]:
        return measure_stages(model, hardware, weights, gradients_exist, blocks)

    return Facts(
        stages=[ModelStage("the embedding", table), *layers, ModelStage("the losses", rest)],
        buffer_bytes=counts.buffer_bytes + bytes_of_a_row(model) * hardware.batch * hardware.accumulation,
        tokens=tokens,
        optimizer_state_bytes=spec.training.optimizer.component.state_bytes,
        optimizer_step_bytes=spec.training.optimizer.component.step_bytes,
        measured=measured,
    )
