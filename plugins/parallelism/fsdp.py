"""Every device holds a share of everything; a block's weights are gathered while it works."""

from __future__ import annotations

from tryplicity import Facts, MemoryPlan, Parallelism, finish_plan, moments


class FullyShardedData(Parallelism):
    """torch's `fully_shard` (FSDP2), each block its own unit, resharded after its forward pass.

    In bf16: fp32 shards, bf16 gathered weights and gradients, fp32 reduction, and a reduce-scatter after every
    micro-batch (keeping whole gradients until the last would cost 4 bytes a parameter).
    """

    name = "fsdp"
    order = 30
    cannot_train = "fsdp plans memory only so far: training with it is not built yet"

    def __init__(self, config) -> None:
        self.config = config

    def refuses(self, hardware) -> str | None:
        return "it needs more than one device" if hardware.count == 1 else None

    def memory(self, facts: Facts, hardware) -> MemoryPlan:
        """With c bytes a gathered weight, p the largest block and r what lies outside the blocks: at work are the
        block's weights, those of the next one already gathered, the buffer they arrive in (3 p c), and r, which stays
        gathered (r c). The backward pass adds the block's gradients and the fp32 buffer they are reduced from
        (p c + 4 p), and the gradients of r (r c).
        """
        size, n, accumulates = facts.parameters, hardware.count, hardware.accumulation > 1
        shard = -(-size // n)
        c = 2 if hardware.precision == "bf16" else 4
        block, root = facts.largest_block, facts.root_parameters
        static = {"weights": 4 * shard, "optimizer": facts.optimizer_state_bytes * shard, "buffers": facts.buffer_bytes}

        def candidates():
            for moment in moments(facts.stages, facts.measured("bf16" if c == 2 else "fp32", False)):
                gradients = 4 * (shard if accumulates else -(-moment.finished // n))
                buckets = c * block + 4 * block + c * root if moment.backward else 0
                yield moment.name, {**static, "gradients": gradients, "activations": moment.activations,
                                    "workspace": moment.workspace, "gathered": 3 * c * block + c * root,
                                    "buckets": buckets}
            yield "optimizer step", {**static, "gradients": 4 * shard, "optimizer":
                                     (facts.optimizer_state_bytes + facts.optimizer_step_bytes) * shard}

        # each micro-batch: weights gathered for the forward and again for the backward pass, fp32 gradients reduced
        sent = hardware.accumulation * (2 * c + 4) * size * (n - 1) // n
        return finish_plan(hardware, candidates(), sent_per_step=sent)
