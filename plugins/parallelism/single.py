"""One device holds everything."""

from __future__ import annotations

from tryplicity import Facts, MemoryPlan, Parallelism, UserError, finish_plan, initialise, moments


class SingleDevice(Parallelism):
    """The whole model, its gradients and its optimizer state on one device: 16 bytes a parameter with AdamW."""

    name = "single"
    order = 10

    def __init__(self, config) -> None:
        self.config = config

    def place(self, model, world, seed, precision="fp32"):
        if world.size > 1:
            raise UserError(f"single: uses one device, and there are {world.size} ranks; ddp or fsdp uses them all")
        return initialise(model, world.device, seed)

    def refuses(self, hardware) -> str | None:
        if hardware.count > 1:
            return f"it uses one device and the profile has {hardware.count}"
        return None

    def memory(self, facts: Facts, hardware) -> MemoryPlan:
        """With accumulation all gradients exist throughout; without, they appear as the backward pass goes on."""
        size, accumulates = facts.parameters, hardware.accumulation > 1
        costs = facts.measured("fp32", accumulates)

        def candidates():
            static = {"weights": 4 * size, "optimizer": facts.optimizer_state_bytes * size,
                      "buffers": facts.buffer_bytes}
            for moment in moments(facts.stages, costs):
                gradients = 4 * size if accumulates else moment.gradients
                yield moment.name, {**static, "gradients": gradients, "activations": moment.activations,
                                    "workspace": moment.workspace}
            yield "optimizer step", {**static, "gradients": 4 * size,
                                     "optimizer": (facts.optimizer_state_bytes + facts.optimizer_step_bytes) * size}

        return finish_plan(hardware, candidates())
