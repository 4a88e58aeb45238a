"""One device holds everything."""

from __future__ import annotations

from contextlib import nullcontext

from tryplicity import Facts, MemoryPlan, UserError, finish_plan, moments
from tryplicity_plugins.parallelism.exact import WholeModel


class SingleDevice(WholeModel):
    """The whole model, its gradients and its optimizer state on one device: 16 bytes a parameter with AdamW."""

    name = "single"
    order = 10

    def place(self, model, world, seed, precision="fp32"):
        if world.size > 1:
            raise UserError(f"single: uses one device, and there are {world.size} ranks; ddp or fsdp uses them all")
        return self.initialised(model, world, seed)

    def micro_batch(self, model, last):
        return nullcontext() if self.sums is None else self.sums.micro_batch(last)

    def refuses(self, hardware) -> str | None:
        if hardware.devices > 1:
            return f"it uses one device and the profile has {hardware.devices}"
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
