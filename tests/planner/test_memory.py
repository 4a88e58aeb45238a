"""The walk through a step and the choice of a strategy, by hand."""

import functools

import pytest
from planning_tools import CPU, DENSE, GPUS, like, make_model

from tryplicity.planner import plan
from tryplicity.planner.measure import Cost
from tryplicity.planner.memory import PARTS, MemoryPlan, ModelStage, finish_plan, moments, overhead

STAGES = [ModelStage("the embedding", 100), ModelStage("layer 0", 200), ModelStage("the losses", 50)]
COSTS = [Cost(kept=10, forward=11, backward=5, made=400, made_at_peak=0, flops_forward=0, flops_backward=0),
         Cost(kept=20, forward=30, backward=70, made=800, made_at_peak=300, flops_forward=0, flops_backward=0),
         Cost(kept=3, forward=40, backward=8, made=200, made_at_peak=200, flops_forward=0, flops_backward=0)]


def test_a_step_walks_the_stages_forward_and_back():
    walked = [(m.name, m.activations, m.workspace, m.gradients, m.finished) for m in moments(STAGES, COSTS)]
    assert walked == [
        ("forward of the embedding", 0, 11, 0, 0),
        ("forward of layer 0", 10, 30, 0, 0),
        ("forward of the losses", 30, 40, 0, 0),
        ("backward of the losses", 30, 8, 200, 50),
        ("backward of layer 0", 10, 70, 200 + 300, 250),
        ("backward of the embedding", 0, 5, 200 + 800, 350),
    ]


def test_the_largest_moment_is_the_plan_and_its_parts_add_up():
    chosen = finish_plan(CPU, iter([("early", {"weights": 10**9, "workspace": 10**8}),
                                    ("late", {"weights": 10**9, "activations": 3 * 10**8})]))
    assert chosen.moment == "late" and list(chosen.parts) == list(PARTS)
    assert chosen.parts["overhead"] == 5 * 10**8 + 10**9 + 0.1 * (10**9 + 3 * 10**8)  # a checkpoint's copy, and waste
    assert chosen.total == sum(chosen.parts.values()) == 10**9 + 3 * 10**8 + chosen.parts["overhead"]
    assert chosen.fits(chosen.total) and not chosen.fits(chosen.total - 1)


def test_overhead_is_a_context_communication_and_a_share_of_what_moves():
    assert overhead(GPUS, 10**10) == 1e9 + 1e9 + 4e8
    assert overhead(like(GPUS, count=1), 10**10) == 1e9 + 4e8
    assert overhead(like(GPUS, expandable_segments=False), 10**10) == 1e9 + 1e9 + 1e9


def test_what_shards_send_within_machines_and_between_them(dense, registry):
    """S parameters on two machines of four, bf16, one micro-batch: gathered twice (2 + 2 bytes) and reduced (4) by a
    ring of shards, whose gradients (4, there and back) are summed over the copies by one ring a shard."""
    two = like(GPUS, count=4, nodes=2, accumulation=1)
    size = plan(dense, two, registry).counts.total

    def sent(**strategy):
        memory = plan(dense, like(two, strategy={"type": "fsdp", **strategy}), registry).nearest.memory
        return memory.sent_per_step / size, memory.sent_between_nodes / size

    close = functools.partial(pytest.approx, rel=1e-3)
    assert sent() == sent(shards=4) == (close(8 * 3 / 4 + 8 / 4 / 2), close(4 * 8 / 4 / 2))
    assert sent(shards=8) == (close(8 * 7 / 8), close(8 * 7 / 8))
    assert sent(shards=2) == (close(8 / 2 + 8 / 2 * 3 / 4), close(2 * 8 / 2 * 3 / 4))
    four = like(two, nodes=4, strategy={"type": "fsdp", "shards": 8})  # a copy on each two machines
    over = plan(dense, four, registry).nearest.memory
    assert over.sent_between_nodes / size == close(8 * 7 / 8 + 4 * 8 / 8 / 2)
    copies = plan(dense, like(two, strategy="ddp"), registry).nearest.memory
    assert copies.sent_per_step / size == close(8 * 7 / 8) and copies.sent_between_nodes is None


def test_a_plan_says_zero_for_parts_it_does_not_have():
    assert MemoryPlan({"weights": 7}, "now").parts == {name: 7 if name == "weights" else 0 for name in PARTS}


@pytest.fixture(scope="module")
def dense(registry):
    return make_model(registry, DENSE)


def test_auto_takes_the_first_that_fits(dense, registry):
    on_one = plan(dense, like(GPUS, count=1), registry)
    assert on_one.chosen.name == "single"
    reasons = {o.name: o.reason for o in on_one.rejected}
    assert reasons == dict.fromkeys(("ddp", "fsdp"), "it needs more than one device")

    roomy = plan(dense, GPUS, registry)
    assert roomy.chosen.name == "ddp" and roomy.fits
    reasons = {o.name: o.reason for o in roomy.rejected}
    assert reasons == {"single": "it uses one device and the profile has 8", "fsdp": "ddp is the first that fits"}

    needs = {o.name: o.memory.total for o in [roomy.chosen, *roomy.rejected]}
    assert needs["fsdp"] < needs["ddp"]
    between = plan(dense, like(GPUS, memory_gb=(needs["fsdp"] + needs["ddp"]) / 2e9), registry)
    assert between.chosen.name == "fsdp"
    assert next(o for o in between.rejected if o.name == "ddp").reason.endswith(f"> {between.hardware.memory_gb:g} GB")

    tight = plan(dense, like(GPUS, memory_gb=needs["fsdp"] / 2e9), registry)
    assert tight.chosen is None and not tight.fits
    assert tight.nearest.name == "fsdp" and len(tight.rejected) == 3
    assert tight.as_dict()["memory"]["headroom_gb"] < 0


def test_a_profile_that_names_a_strategy_gets_that_one_or_none(dense, registry):
    named = plan(dense, like(GPUS, strategy="fsdp"), registry)
    assert named.chosen.name == "fsdp"
    assert {o.name: o.reason for o in named.rejected}["ddp"] == "the profile asks for fsdp"
    need = named.chosen.memory.total
    too_small = plan(dense, like(GPUS, strategy="ddp", memory_gb=need / 1e9), registry)
    assert too_small.chosen is None and too_small.nearest.name == "ddp"


def test_the_object_that_build_prints(dense, registry):
    said = plan(dense, GPUS, registry).as_dict()
    assert list(said) == ["name", "fits", "parameters", "packed_bytes_per_token", "memory", "strategy", "throughput",
                          "cost", "saving", "layers"]
    memory = said["memory"]
    assert memory["total_gb"] == pytest.approx(sum(memory["parts"].values()))
    assert memory["budget_gb"] == pytest.approx(memory["total_gb"] + memory["headroom_gb"]) == 100
    assert {"total", "active", "by_component"} <= said["parameters"].keys()
    assert [r["name"] for r in said["strategy"]["rejected"]] == ["single", "fsdp"]
    assert said["cost"]["per_hour"] == 24
    assert said["layers"][0] == {"index": 0, "mixer": "gqa", "feed_forward": "gated_mlp", "parameters": 43136}


def test_what_checkpoints_take(dense, registry):
    """By hand: weights, and the two moments of AdamW; a machine's memory takes its ranks' part of one."""
    planned = plan(dense, like(GPUS, nodes=2), registry)
    size, saving = planned.counts.total, planned.saving
    weights = 4 * size + sum(buffer.nbytes for buffer in dense.buffers())
    assert (saving.checkpoint, saving.most, saving.weights) == (weights + 8 * size, 3, weights)
    assert saving.disk == 3 * (weights + 8 * size) + weights
    assert planned.as_dict()["saving"]["machine_memory_gb"] == (weights + 8 * size) / 2 / 1e9


def test_more_tokens_more_memory_and_checkpointing_less(dense, registry):
    def need(**changes):
        return plan(dense, like(GPUS, **changes), registry).nearest.memory.total

    assert need(batch=4) > need(batch=2)
    assert need(activation_checkpointing=False) > need()
