"""The strategies' memory against sums made by hand from simple facts."""

import dataclasses

import pytest

from tryplicity.hardware import Hardware
from tryplicity.planner.measure import Cost
from tryplicity.planner.memory import Facts, ModelStage

GPUS = Hardware(name="test", device="cuda", accelerator="GPU", memory_gb=100, tflops=1000, memory_bandwidth_gbs=4000,
                count=4, link_bandwidth_gbs=500, batch=1, accumulation=2)
TABLE, BLOCK, REST = 1_000_000, 4_000_000, 1_000
TOTAL = TABLE + 3 * BLOCK + REST
KEPT, WORK = 50_000_000, 400_000_000


def facts(asked=None):
    """Three equal blocks that keep KEPT bytes and work with WORK bytes; the ends cost next to nothing."""
    quiet = Cost(kept=1000, forward=1000, backward=1000, made=0, made_at_peak=0, flops_forward=0, flops_backward=0)

    def measured(weights, gradients_exist):
        if asked is not None:
            asked.append((weights, gradients_exist))
        made = 0 if gradients_exist else 4 * BLOCK
        return [quiet, *[Cost(KEPT, KEPT, WORK, made, made // 2, 0, 0)] * 3, quiet]

    return Facts([ModelStage("the embedding", TABLE), *(ModelStage(f"layer {i}", BLOCK) for i in range(3)),
                  ModelStage("the losses", REST)], buffer_bytes=7, tokens=4096, optimizer_state_bytes=8,
                 optimizer_step_bytes=0, measured=measured)


def planned(registry, name, hardware=GPUS, given=None):
    return registry.part("parallelism", name).build().memory(given or facts(), hardware)


def parts(plan):
    return {name: size for name, size in plan.parts.items() if size and name != "overhead"}


def test_single_with_accumulation_holds_all_gradients(registry):
    asked = []
    plan = planned(registry, "single", dataclasses.replace(GPUS, count=1), facts(asked))
    assert asked == [("fp32", True)]
    assert plan.moment == "backward of layer 2"
    assert parts(plan) == {"weights": 4 * TOTAL, "gradients": 4 * TOTAL, "optimizer": 8 * TOTAL, "buffers": 7,
                           "activations": 1000 + 2 * KEPT, "workspace": WORK}
    assert plan.total == 16 * TOTAL + 7 + 1000 + 2 * KEPT + WORK + plan.parts["overhead"]
    assert plan.sent_per_step == 0


def test_single_without_accumulation_makes_gradients_on_the_way_back(registry):
    asked = []
    plan = planned(registry, "single", dataclasses.replace(GPUS, count=1, accumulation=1), facts(asked))
    assert asked == [("fp32", False)]
    assert plan.moment == "backward of layer 2"
    assert plan.parts["gradients"] == 2 * BLOCK, "half of the block's, none of those before it"


def test_single_s_optimizer_step_can_be_the_peak(registry):
    heavy = dataclasses.replace(facts(), optimizer_step_bytes=100)
    plan = planned(registry, "single", dataclasses.replace(GPUS, count=1), heavy)
    assert plan.moment == "optimizer step"
    assert parts(plan) == {"weights": 4 * TOTAL, "gradients": 4 * TOTAL, "optimizer": 108 * TOTAL, "buffers": 7}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_ddp_holds_everything_and_reduces_once_a_step(registry, accumulation):
    plan = planned(registry, "ddp", dataclasses.replace(GPUS, accumulation=accumulation))
    assert parts(plan) == {"weights": 4 * TOTAL, "gradients": 4 * TOTAL, "optimizer": 8 * TOTAL, "buffers": 7,
                           "activations": 1000 + 2 * KEPT, "workspace": WORK}
    assert plan.sent_per_step == 2 * 4 * TOTAL * 3 / 4


def test_fsdp_holds_a_quarter_and_gathers_blocks(registry):
    asked = []
    plan = planned(registry, "fsdp", given=facts(asked))
    assert asked == [("bf16", False)]
    root = TABLE + REST
    assert parts(plan) == {
        "weights": TOTAL, "gradients": TOTAL, "optimizer": 2 * TOTAL, "buffers": 7,
        "activations": 1000 + 2 * KEPT, "workspace": WORK,
        "gathered": 2 * 2 * BLOCK + 2 * root, "buckets": 4 * BLOCK // 2}
    # two micro-batches: bf16 weights twice and fp32 gradients once, three quarters of each
    assert plan.sent_per_step == 2 * (2 + 2 + 4) * TOTAL * 3 / 4


def test_fsdp_in_fp32_gathers_twice_the_bytes(registry):
    plan = planned(registry, "fsdp", dataclasses.replace(GPUS, precision="fp32"))
    assert plan.parts["gathered"] == 2 * 4 * BLOCK + 4 * (TABLE + REST)


def test_fsdp_reduces_a_block_s_gradients_while_the_one_before_works(registry):
    """Where blocks keep little, the second to go back is the peak."""
    quiet = facts().measured("bf16", False)
    little = [dataclasses.replace(cost, kept=1000) for cost in quiet]
    plan = planned(registry, "fsdp", given=dataclasses.replace(facts(), measured=lambda *_: little))
    assert plan.moment == "backward of layer 1"
    assert plan.parts["buckets"] == 4 * BLOCK // 2 + 4 * BLOCK
    once = dataclasses.replace(GPUS, accumulation=1)
    plan = planned(registry, "fsdp", once, dataclasses.replace(facts(), measured=lambda *_: little))
    assert plan.moment == "backward of layer 1"
    assert plan.parts["gradients"] == 4 * BLOCK // 4, "this rank's share of the last block's"


def test_fsdp_shards_are_rounded_up(registry):
    plan = planned(registry, "fsdp", dataclasses.replace(GPUS, count=7))
    assert plan.parts["weights"] == 4 * -(-TOTAL // 7)


@pytest.mark.parametrize(("name", "count", "refused"), [
    ("single", 1, False), ("single", 2, True), ("ddp", 1, True), ("ddp", 2, False), ("fsdp", 1, True),
    ("fsdp", 2, False)])
def test_strategies_refuse_a_number_of_devices_they_cannot_use(registry, name, count, refused):
    strategy = registry.part("parallelism", name).build()
    assert (strategy.refuses(dataclasses.replace(GPUS, count=count)) is not None) == refused
