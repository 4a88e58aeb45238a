"""Figures of a plan that others are made of, each by hand."""

from dataclasses import replace

import pytest
import torch
from planning_tools import CPU, DENSE, GPUS, HYBRID, like, make_model

from tryplicity.planner import Option, gather_facts, plan, stages
from tryplicity.planner import measure as m
from tryplicity.planner.count import count
from tryplicity.planner.memory import Facts, MemoryPlan, ModelStage
from tryplicity.planner.shapes import Shape
from tryplicity.planner.speed import Speed, estimate_cost, estimate_speed


def held(weights=0, optimizer=0, gradients=0, sent=0):
    return MemoryPlan({"weights": weights, "optimizer": optimizer, "gradients": gradients}, "now", sent_per_step=sent)


def test_a_step_that_sends_nothing_takes_as_long_as_its_products_and_its_optimizer():
    # 1e8 FLOPs * 4 * 1000 tokens / (1e15 * 0.5) = 0.8 ms, on each of 8 devices
    speed = estimate_speed(1e8, 1000, held(), GPUS)
    assert speed.tokens_per_second == pytest.approx(8 * 4000 / 0.0008) and speed.flops_per_token == 1e8
    assert "compute-bound" in speed.basis and "0.00 s of communication" in speed.basis
    for part, times in (("weights", 2), ("optimizer", 2), ("gradients", 1)):
        one = estimate_speed(1e8, 1000, held(**{part: 4 * 10**12}), GPUS)     # 4 TB at 4 TB/s: a second
        assert one.tokens_per_second == pytest.approx(8 * 4000 / (0.0008 + times)), part
    even = estimate_speed(1e8, 1000, held(sent=4 * 10**8), GPUS)      # 0.8 ms of either
    assert even.tokens_per_second == pytest.approx(8 * 4000 / 0.0008) and "compute-bound" in even.basis


def test_what_a_billion_tokens_cost():
    speed = Speed(1.0, 2000.0, "")
    money = estimate_cost(speed, like(GPUS, count=2, price_per_hour=3.6))
    assert (money.per_hour, money.per_billion_tokens) == (7.2, pytest.approx(7.2 * 1e9 / 2000 / 3600))


def facts(*parameters):
    stages = [ModelStage(str(n), size) for n, size in enumerate(parameters)]
    return Facts(stages, 0, 0, 8, 0, lambda weights, exist: [])


def test_parameters_of_the_blocks_and_outside_of_them():
    own = facts(100, 7, 30, 20, 5)
    assert (own.parameters, own.largest_block, own.root_parameters) == (162, 30, 105)
    assert facts(100, 5).largest_block == 0


def test_the_facts_of_a_model_by_hand(registry):
    D, V, F, T = 64, 512, 160, 128
    block = D * (4 + 2 * 2) * 16 + 4 * 16 * D + 3 * D * F + 2 * D
    for settings, losses in (((), D), (("tied_embeddings=false",), D + V * D)):
        model = make_model(registry, DENSE, *settings)
        own = gather_facts(model, like(CPU, accumulation=3), count(model))
        assert [s.parameters for s in own.stages] == [V * D, block, block, block, losses]
        assert [s.name for s in own.stages] == ["the embedding", "layer 0", "layer 1", "layer 2", "the losses"]
        assert own.tokens == 4 * T and own.optimizer_state_bytes == 8
        # tokens, documents and targets in 8 bytes each, a loss in 4; and what the model itself keeps
        assert own.buffer_bytes == count(model).buffer_bytes + 12 * T * (3 * 8 + 4)


def test_what_the_parameters_of_a_hybrid_belong_to(registry):
    counts = count(make_model(registry, HYBRID))
    assert set(counts.by_component) == {"embedding", "mixer", "feed_forward", "norm", "heads"}
    D, norms = 128, 2 * 3 + 1
    assert counts.by_component["embedding"] == 1024 * D and counts.by_component["norm"] == norms * D
    assert all(size > 0 for size in counts.by_component.values())
    hyper = count(make_model(registry, HYBRID, "residual={type: hyper_connections, streams: 2}"))
    assert hyper.by_component["residual"] > 0 and hyper.by_component["mixer"] == counts.by_component["mixer"]


def test_products_in_bf16_keep_half_of_what_those_in_fp32_keep(registry):
    model = make_model(registry, DENSE)

    def kept(precision, weights):
        profile = like(GPUS, precision=precision, activation_checkpointing=False)
        costs = stages.measure_stages(model, profile, weights, True)
        return costs[1].kept

    assert kept("bf16", "bf16") < 0.6 * kept("fp32", "fp32") == 0.6 * kept("fp32", "fp32")
    assert kept("bf16", "bf16") < kept("bf16", "fp32") < 0.9 * kept("fp32", "fp32")


@pytest.mark.parametrize("batch, measured", [(4, [4]), (16, [16]), (17, [8, 16]), (64, [8, 16])])
def test_no_more_tokens_are_measured_than_are_said(registry, monkeypatch, batch, measured):
    """Of a micro-batch that is larger, two small ones; the figures are those of the whole."""
    model, seen, direct = make_model(registry, DENSE), [], stages._measure_batch
    monkeypatch.setattr(stages, "DIRECT", 16 * 128)
    monkeypatch.setattr(stages, "_measure_batch", lambda *given: seen.append(given[2]) or direct(*given))
    costs = stages.measure_stages(model, like(CPU, batch=batch), "fp32", True)
    assert seen == measured
    assert costs[1].flops_forward == pytest.approx(batch / 4 * stages.measure_stages(
        model, like(CPU, batch=4), "fp32", True)[1].flops_forward, rel=1e-6)


def test_with_checkpointing_a_stage_keeps_its_output_and_runs_again():
    """A product whose forward pass holds more than its backward pass: by then no gradient of a weight is there."""
    N, D, W = 64, 32, 128
    x = Shape(torch.empty(N, D, device="meta")).requires_grad_()
    up, down = (Shape(torch.empty(*size, device="meta")).requires_grad_() for size in ((W, D), (D, W)))

    def stage(x):
        return [torch.nn.functional.linear(torch.nn.functional.linear(x, up).exp().exp().exp(), down)]

    plain, _ = m.measure(stage, [x], [up, down], gradients_exist=False)
    again, _ = m.measure(stage, [x], [up, down], gradients_exist=False, checkpointing=True)
    out, wide = 4 * N * D, 4 * N * W
    assert plain.kept == 3 * wide + out and again.kept == again.forward == out
    assert plain.forward == 4 * wide or plain.forward == 3 * wide + out
    assert again.flops_backward == plain.flops_backward + plain.flops_forward
    assert again.made == plain.made == 2 * 4 * D * W
    peak = plain.forward + out
    assert again.backward + again.made_at_peak == max(peak, plain.backward + plain.made_at_peak)
    if peak > plain.backward + plain.made_at_peak:
        assert again.made_at_peak == 0


def test_a_forward_pass_that_peaks_higher_than_the_backward_pass_decides():
    """Scratch memory of the forward pass alone, without gradients: run again, its peak is the stage's."""
    N, D = 64, 32
    x = Shape(torch.empty(N, D, device="meta")).requires_grad_()
    weight = Shape(torch.empty(D, D, device="meta")).requires_grad_()

    def stage(x):
        with torch.no_grad():
            scale = torch.cat([x] * 20).sum()
        return [torch.nn.functional.linear(x, weight) * scale]

    cost, _ = m.measure(stage, [x], [weight], gradients_exist=False, checkpointing=True)
    out = 4 * N * D
    assert cost.forward == cost.kept == out
    assert (cost.backward, cost.made_at_peak) == (20 * out + 512 + out, 0)
    assert cost.made == 4 * D * D


def test_the_object_says_what_was_chosen_and_what_was_not(registry):
    model = make_model(registry, DENSE)
    planned = plan(model, GPUS, registry)
    said = planned.as_dict()
    assert said["strategy"]["chosen"] == "ddp"
    assert said["memory"]["headroom_gb"] == pytest.approx((100e9 - planned.nearest.memory.total) / 1e9)
    by_name = {option.name: option for option in planned.rejected}
    for told in said["strategy"]["rejected"]:
        assert told == {"name": told["name"], "reason": by_name[told["name"]].reason,
                        "total_gb": by_name[told["name"]].memory.total / 1e9}
    costs = stages.measure_stages(model, GPUS, "fp32", True)
    flops = sum(c.flops_forward + c.flops_backward for c in costs) / (2 * 128)
    assert said["throughput"]["flops_per_token"] == pytest.approx(flops)
    none = replace(planned, chosen=None, rejected=[Option("mine", None, "it failed")])
    strategy = none.as_dict()["strategy"]
    assert strategy["chosen"] is None
    assert strategy["rejected"] == [{"name": "mine", "total_gb": None, "reason": "it failed"}]
