"""Every device holds everything; gradients are summed over all."""

from __future__ import annotations

import warnings

from tryplicity import Facts, MemoryPlan, UserError, finish_plan, moments
from tryplicity_plugins.parallelism.buckets import Buckets
from tryplicity_plugins.parallelism.exact import WholeModel


class DistributedData(WholeModel):
    """torch's DistributedDataParallel with gradients that are views of its buckets (`gradient_as_bucket_view`)."""

    name = "ddp"
    order = 20

    def place(self, model, world, seed, precision="fp32"):
        from torch.nn.parallel import DistributedDataParallel

        if world.size == 1:
            raise UserError("ddp: this process is alone; it needs several ranks: a launcher starts them, or use single")
        model = self.initialised(model, world, seed)
        if self.sums:
            return model
        # buffers are changed by what all ranks summed, alike: there is nothing to send
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 calls it otherwise, older ones know no other
            self.wrapped = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
        self.buckets = Buckets(self.wrapped)
        return model

    def forward(self, model, *args, **kwargs):
        return (model if self.sums else self.wrapped)(*args, **kwargs)

    def micro_batch(self, model, last):
        return (self.sums or self.buckets).micro_batch(last)

    def weights(self, model):
        return super().weights(model) if self.world.first_rank else {}

    def refuses(self, hardware) -> str | None:
        return "it needs more than one device" if hardware.devices == 1 else None

    def memory(self, facts: Facts, hardware) -> MemoryPlan:
        """The buckets are the gradients and live from the first step on, so all of them are there at every moment.

        One all-reduce a step; in a ring each device sends each byte 2 (n-1)/n times.
        """
        size, n = facts.parameters, hardware.devices
        summed = 8 if self.config.exact else 4
        static = {"weights": 4 * size, "gradients": summed * size, "buffers": facts.buffer_bytes,
                  "optimizer": facts.optimizer_state_bytes * size}

        def candidates():
            for moment in moments(facts.stages, facts.measured("fp32", True)):
                yield moment.name, {**static, "activations": moment.activations, "workspace": moment.workspace}
            yield "optimizer step", {**static, "optimizer":
                                     (facts.optimizer_state_bytes + facts.optimizer_step_bytes) * size}

        return finish_plan(hardware, candidates(), sent_per_step=2 * summed * size * (n - 1) // n)
