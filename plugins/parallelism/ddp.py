"""Every device holds everything; gradients are averaged."""

from __future__ import annotations

from tryplicity import Facts, MemoryPlan, Parallelism, finish_plan, moments


class DistributedData(Parallelism):
    """torch's DistributedDataParallel with gradients that are views of its buckets (`gradient_as_bucket_view`)."""

    name = "ddp"
    order = 20
    cannot_train = "ddp plans memory only so far: training with it is not built yet"

    def __init__(self, config) -> None:
        self.config = config

    def refuses(self, hardware) -> str | None:
        return "it needs more than one device" if hardware.count == 1 else None

    def memory(self, facts: Facts, hardware) -> MemoryPlan:
        """The buckets are the gradients and live from the first step on, so all of them are there at every moment.

        One all-reduce a step; in a ring each device sends each byte 2 (n-1)/n times.
        """
        size, n = facts.parameters, hardware.count
        static = {"weights": 4 * size, "gradients": 4 * size, "buffers": facts.buffer_bytes,
                  "optimizer": facts.optimizer_state_bytes * size}

        def candidates():
            for moment in moments(facts.stages, facts.measured("fp32", True)):
                yield moment.name, {**static, "activations": moment.activations, "workspace": moment.workspace}
            yield "optimizer step", {**static, "optimizer":
                                     (facts.optimizer_state_bytes + facts.optimizer_step_bytes) * size}

        return finish_plan(hardware, candidates(), sent_per_step=2 * 4 * size * (n - 1) // n)
