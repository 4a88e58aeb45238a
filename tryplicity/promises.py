"""What a plugin's parts promise and nobody would notice if it were broken: checked where that is cheap, on the host.

`check_promises` runs when a model is built, on the meta device, so that nothing is found out after hours. The rest is
called where the work is done. All raise PluginFault naming the part. Shapes: B batch, T time.
"""

from __future__ import annotations

import json
import math
import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tryplicity.components import Brain, Mean, Schedule, Stage
from tryplicity.guard import broken

if TYPE_CHECKING:
    from tryplicity.model import Model
    from tryplicity.parts import Part
    from tryplicity.planner.memory import MemoryPlan
    from tryplicity.spec import Spec

_SEEN: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # routers whose choice was looked at once

MOMENTS = 50  # of a run, at which schedules and curricula are asked


def check_promises(model: Model, spec: Spec) -> None:
    """Ask optimizer, schedules and brain modules what they will be asked in training."""
    part = spec.training.optimizer
    stand_ins = {name: nn.Parameter(torch.empty((1,) * p.ndim, device="cpu")) for name, p in model.named_parameters()}
    decayed, undecayed = ([p for p in stand_ins.values() if (p.ndim > 1) == many] for many in (True, False))
    with _compiler_left_out():
        made = part.build().build(decayed, undecayed)
    check_optimizer(part, made, stand_ins)
    for schedule in {id(p): p for p in (spec.training.schedule, *(s.schedule for s in spec.phases)) if p}.values():
        made = schedule.build()
        for moment in range(MOMENTS + 1):
            check_factor(made, made.factor(moment / MOMENTS, 100 * moment))
    for part in spec.brain:
        if issubclass(part.component, Brain):
            made = part.build()
            check_state(made, made.state())
            for moment in range(MOMENTS):
                check_stage(made, made.stage(moment / MOMENTS, spec.context_length), spec.context_length)


@contextmanager
def _compiler_left_out() -> Iterator[None]:
    """A torch optimizer, when made, imports torch's compiler so as to be left alone by it: half of the time of `build`.
    This gives it what it would get where nothing is compiled."""
    wrapped = getattr(torch.optim.Optimizer.add_param_group, "__wrapped__", None)
    if wrapped is None or "torch._dynamo" in sys.modules or hasattr(wrapped, "__dynamo_disable"):
        yield
        return
    wrapped.__dynamo_disable = wrapped
    try:
        yield
    finally:
        del wrapped.__dynamo_disable


def check_optimizer(part: Part, optimizer: Any, parameters: Mapping[str, nn.Parameter]) -> None:
    """Every trainable parameter, by its name, is in exactly one group, and each group has its learning rate."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise broken(part.component, f"build gave {_kind(optimizer)}, not a torch.optim.Optimizer")
    count: dict[int, int] = {}
    for group in optimizer.param_groups:
        rate = group.get("lr")
        if not (isinstance(rate, float | int) and math.isfinite(rate) and rate >= 0):
            raise broken(part.component, f"build gave a group whose lr is {rate!r}, not a number of at least 0")
        for parameter in group["params"]:
            count[id(parameter)] = count.get(id(parameter), 0) + 1
    names = {id(p): name for name, p in parameters.items() if p.requires_grad}
    for wrong, found in (("forgets", [n for i, n in names.items() if i not in count]),
                         ("steps more than once", [n for i, n in names.items() if count.get(i, 0) > 1])):
        if found:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            raise broken(part.component, f"build {wrong} parameters that it was given: {found[0]}{more}")


def check_factor(schedule: Schedule, factor: Any) -> float:
    if not (isinstance(factor, float | int) and math.isfinite(factor) and factor >= 0):
        raise broken(schedule, f"factor gave {factor!r}, not a number of at least 0")
    return float(factor)


def check_memory(strategy: Any, memory: MemoryPlan) -> MemoryPlan:
    from tryplicity.planner.memory import MemoryPlan

    if not isinstance(memory, MemoryPlan):
        raise broken(strategy, f"memory gave {_kind(memory)}, not a MemoryPlan")
    for name, size in memory.parts.items():
        if size < 0:
            raise broken(strategy, f"memory gave {size:,} bytes of {name}; no part is less than nothing")
    return memory


def check_output(layer: nn.Module, x_BTD: Tensor, y_BTD: Any) -> None:
    if not isinstance(y_BTD, Tensor) or y_BTD.shape != x_BTD.shape:
        raise broken(layer, f"forward gave {_kind(y_BTD)} for {_kind(x_BTD)}; the shape must stay")


def check_weights(objective: nn.Module, weights_BT: Any, nll_BT: Tensor) -> None:
    if not isinstance(weights_BT, Tensor) or weights_BT.shape != nll_BT.shape:
        raise broken(objective, f"token_weights gave {_kind(weights_BT)} for {_kind(nll_BT)}; each token has a weight")


def check_mean(head: nn.Module, loss: Any) -> Mean:
    if not isinstance(loss, Mean) or loss.total.ndim:
        raise broken(head, f"forward gave {_kind(loss)}, not a Mean of a summed loss and its number of targets")
    return loss


def check_state(brain: Brain, state: Any) -> dict[str, Any]:
    """What a checkpoint holds of a brain module, as JSON gives it back."""
    try:
        if isinstance(state, Mapping):
            return json.loads(json.dumps(state))
        why = f"it is {_kind(state)}"
    except (TypeError, ValueError) as error:
        why = str(error)
    raise broken(brain, f"state must be a dict that JSON can hold: {why}")


def check_stage(brain: Brain, stage: Any, context_length: int) -> None:
    if stage is None:
        return
    if not isinstance(stage, Stage):
        raise broken(brain, f"stage gave {_kind(stage)}, not a Stage or None")
    numbers = {"learning_rate_factor": stage.learning_rate_factor, **dict(stage.factors)}
    wrong = [f"{name} {value!r}" for name, value in numbers.items()
             if not (isinstance(value, float | int) and math.isfinite(value) and value >= 0)]
    if not (isinstance(stage.context_length, int) and 1 <= stage.context_length <= context_length):
        wrong.append(f"context_length {stage.context_length!r}")
    if stage.tokens_per_step is not None and not stage.tokens_per_step >= 1:
        wrong.append(f"tokens_per_step {stage.tokens_per_step!r}")
    if wrong:
        raise broken(brain, f"stage {stage.name!r} has {', '.join(wrong)}")


def check_routing(router: nn.Module, routing: Any, tokens: int, experts: int) -> None:
    """Shapes always; the numbers of the experts where the host need not wait for a device to see them, else once."""
    ids, weights = routing.experts_NK, routing.weights_NK
    if ids.shape != weights.shape or ids.ndim != 2 or len(ids) != tokens or ids.dtype != torch.int64:
        raise broken(router, f"forward gave as experts {_kind(ids)} and as weights {_kind(weights)}; both are [N, K], "
                             f"here of {tokens} tokens, and the experts int64")
    if torch.compiler.is_compiling() or type(ids) is not Tensor or ids.device.type == "meta" or not ids.numel():
        return
    if ids.device.type == "cpu" or router not in _SEEN:
        _SEEN.add(router)
        check_experts(router, (int(ids.min()), int(ids.max())), experts)


def check_experts(router: nn.Module, ids: Iterable[int], experts: int) -> None:
    wrong = [one for one in ids if not 0 <= one <= experts]
    if wrong:
        raise broken(router, f"chose expert {wrong[0]} of {experts}: they are numbered from 0, {experts} means none")


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    return "None" if value is None else f"a {type(value).__name__}"
