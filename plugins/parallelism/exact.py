"""Gradients whose sums do not depend on how a batch is cut."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from tryplicity import Parallelism, World, initialise


class ExactSums:
    """Gradients of a step summed in fp64: over the micro-batches as they come, then over the ranks.

    fp32 sums differ with their order in the last bit, and what rounds or chooses (ternary weights, thresholds, the best
    experts) makes of that bit another training within a few steps. In fp64 the order shows in one of some 10^8 values
    only. It takes 8 bytes a parameter.
    """

    def __init__(self, model: nn.Module, world: World) -> None:
        self.world = world
        self.sums: dict[nn.Parameter, Tensor] = {}
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in self.parameters:
            parameter.register_post_accumulate_grad_hook(self._take)

    def _take(self, parameter: nn.Parameter) -> None:
        if parameter in self.sums:
            self.sums[parameter] += parameter.grad
        else:
            self.sums[parameter] = parameter.grad.double()
        parameter.grad = None

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """As a strategy's own."""
        yield
        if last:
            for parameter in self.parameters:  # those without a gradient have none on any rank
                if parameter in self.sums:
                    total, = self.world.total([self.sums.pop(parameter)])
                    parameter.grad = total.to(parameter.dtype)


class WholeModel(Parallelism):
    """What strategies share whose ranks hold the whole model: the option, and the sums where it is chosen."""

    @dataclass(frozen=True)
    class Config:
        exact: bool = False
        """One row at a time and gradients summed in fp64: the same rows make the same step to the last bits, however
        ranks and micro-batches divide them. To compare trainings, not for speed; 8 bytes a parameter for gradients."""

    def __init__(self, config: Config) -> None:
        self.config, self.row_by_row = config, config.exact
        self.sums: ExactSums | None = None

    def initialised(self, model: nn.Module, world: World, seed: int) -> nn.Module:
        """The model on this rank's device with its initial values, its sums ready."""
        model, self.world = initialise(model, world.device, seed), world
        if self.config.exact:
            self.sums = ExactSums(model, world)
        return model
