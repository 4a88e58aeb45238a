"""How a model is laid over the ranks of a world."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from tryplicity.functional import sum_of_squares
from tryplicity.parts import Component

if TYPE_CHECKING:
    from tryplicity.world import World


class Parallelism(Component):
    """A strategy: how a model is laid over the ranks of a `World`. `Class(config)`; one instance for one training.

    What is here does for one rank; a strategy for several overrides what is different for it. Every method of a
    training is called on all ranks alike.
    """

    family = "parallelism"
    #: where a profile says `auto` the first that fits is taken, tried by this, the lowest first; the project's own are
    #: at 10 (one device), 20 (copies) and 30 (shards)
    order: ClassVar[float] = 100
    #: True: a forward pass takes one row, whatever the profile's batch; products of several round otherwise
    row_by_row: bool = False

    def memory(self, facts, hardware):
        """The peak memory of one device, part by part: `planner.memory.MemoryPlan`."""
        raise NotImplementedError

    def refuses(self, hardware) -> str | None:
        """Why this strategy cannot be used on this hardware at all, or None."""
        return None

    def ranks(self, hardware) -> int:
        """How many processes it wants, of one device each, over all machines."""
        return hardware.devices

    def place(self, model: nn.Module, world: World, seed: int, precision: str = "fp32") -> nn.Module:
        """Lay out a model assembled on the meta device: transform, materialise on `world.device`, initialise, tie
        again. The initial values are the same whatever the world. What the methods below need of it, it keeps.

        precision: "bf16" where the steps compute in bfloat16 (they are under autocast in any case).
        Raises UserError for a world that it cannot use.
        """
        raise NotImplementedError

    def forward(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The forward pass of a micro-batch in training: of the model, or of what the strategy wrapped it in."""
        return model(*args, **kwargs)

    def micro_batch(self, model: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Around the forward and backward pass of one micro-batch. After that of a step's last one every gradient is
        the sum (not the mean) over all ranks, or this rank's share of it."""
        return nullcontext()

    def clip_gradients(self, model: nn.Module, max_norm: float) -> Tensor:
        """Scale the gradients so that the norm of all of them together is at most `max_norm`; returns the norm before,
        a plain tensor, the same on every rank."""
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = sum_of_squares(gradients).sqrt().float()
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm)
        return norm

    def whole(self, module: nn.Module, write: bool = False) -> AbstractContextManager[Any]:
        """Inside, every parameter of the model or of a part of it is whole on every rank: to sample (each rank may call
        the model alone), to look at, or, with `write`, to change, which all ranks do alike, in full precision and
        without calling the model. Outside it the model is called by all ranks together."""
        return nullcontext()

    def forget(self, optimizer: torch.optim.Optimizer, parameter: Tensor, rows: Tensor) -> None:
        """Zero what the optimizer holds of these rows, a bool mask over dim 0, of a parameter of the model (outside
        `whole`)."""
        for value in optimizer.state.get(parameter, {}).values():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                value[rows.to(value.device)] = 0

    def state(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """What a checkpoint keeps, under the names of the plain model, so that any strategy and any world can go on
        from it: {"model": {name: tensor}, "optimizer": {"state": {parameter: {...}}, "groups": [{...}]}}, where a
        group's "params" are names; DTensors where a rank holds a share. It shares the memory of what it is the state
        of. Of a parameter that the optimizer has made no step with yet there is no state."""
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        groups = [{**group, "params": [names[id(p)] for p in group["params"]]} for group in optimizer.param_groups]
        held = {names[id(p)]: dict(state) for p, state in optimizer.state.items()}
        return {"model": dict(model.state_dict()), "optimizer": {"state": held, "groups": groups}}

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Put back what `state` gave, filled from a checkpoint: tensors that lie as this strategy's own do. Raises
        ValueError for an optimizer whose groups hold other parameters."""
        model.load_state_dict(state["model"])
        named = dict(model.named_parameters())
        number = {name: i for i, name in enumerate(n for g in state["optimizer"]["groups"] for n in g["params"])}
        own = [[named[name] for name in group["params"]] for group in state["optimizer"]["groups"]]
        if [[id(p) for p in group["params"]] for group in optimizer.param_groups] != [[id(p) for p in g] for g in own]:
            raise ValueError("its groups hold other parameters")
        optimizer.load_state_dict({
            "state": {number[name]: held for name, held in state["optimizer"]["state"].items()},
            "param_groups": [{**group, "params": [number[name] for name in group["params"]]}
                             for group in state["optimizer"]["groups"]]})

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """Weights and buffers, whole, in CPU memory, by name: on rank 0; what other ranks give, nobody looks at. They
        may be the model's own memory."""
        return {name: tensor.detach().contiguous().cpu() for name, tensor in model.state_dict().items()}
