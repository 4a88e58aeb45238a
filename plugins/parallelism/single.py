"""One device holds everything."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

from tryplicity import Facts, MemoryPlan, Parallelism, UserError, finish_plan, initialise, moments
from tryplicity_plugins.parallelism.exact import ExactSums


class SingleDevice(Parallelism):
    """The whole model, its gradients and its optimizer state on one device: 16 bytes a parameter with AdamW."""

    name = "single"
    order = 10

    @dataclass(frozen=True)
    class Config:
        exact: bool = False
        """One row at a time and gradients summed in fp64: the same rows make the same step to the last bits, however
        ranks and micro-batches divide them. To compare trainings, not for speed; 8 bytes a parameter for gradients."""

    def __init__(self, config: Config) -> None:
        self.config, self.row_by_row = config, config.exact
        self.sums: ExactSums | None = None

    def place(self, model, world, seed, precision="fp32"):
        if world.size > 1:
            raise UserError(f"single: uses one device, and there are {world.size} ranks; ddp or fsdp uses them all")
        model = initialise(model, world.device, seed)
        if self.config.exact:
            self.sums = ExactSums(model, world)
        return model

    def micro_batch(self, model, last):
        return nullcontext() if self.sums is None else self.sums.micro_batch(last)

    def refuses(self, hardware) -> str | None:
        if hardware.count > 1:
            return f"it uses one device and the profile has {hardware.count}"
        return None

    def memory(self, facts: Facts, hardware) -> MemoryPlan:
        """With accumulation all gradients exist throughout; without, they appear as the backward pass goes on."""
        size, accumulates = facts.parameters, hardware.accumulation > 1
        summed = 8 if self.config.exact else 4
        costs = facts.measured("fp32", accumulates)

        def candidates():
            static = {"weights": 4 * size, "optimizer": facts.optimizer_state_bytes * size,
                      "buffers": facts.buffer_bytes}
            for moment in moments(facts.stages, costs):
                gradients = summed * size if accumulates or self.config.exact else moment.gradients
                yield moment.name, {**static, "gradients": gradients, "activations": moment.activations,
                                    "workspace": moment.workspace}
            yield "optimizer step", {**static, "gradients": 4 * size,
                                     "optimizer": (facts.optimizer_state_bytes + facts.optimizer_step_bytes) * size}

        return finish_plan(hardware, candidates())
