"""Tokens per second and money, by hand."""

from dataclasses import replace

import pytest
from planning_tools import GPUS, like

from tryplicity.planner.memory import MemoryPlan
from tryplicity.planner.speed import estimate_cost, estimate_speed

HELD = MemoryPlan({"weights": 4e9, "optimizer": 8e9, "gradients": 4e9}, "a moment", sent_per_step=10**12)


def test_a_step_is_products_or_communication_and_then_the_optimizer():
    # 1e10 FLOPs * 4 * 1000 tokens / (1e15 * 0.5) = 0.08 s; 1e12 B / 5e11 = 2 s; 28e9 B / 4e12 = 0.007 s
    slow_link = estimate_speed(1e10, 1000, HELD, GPUS)
    assert slow_link.tokens_per_second == pytest.approx(8 * 4000 / (2 + 0.007))
    assert "communication-bound" in slow_link.basis and "50%" in slow_link.basis
    fast_link = estimate_speed(1e10, 1000, HELD, like(GPUS, link_bandwidth_gbs=50_000))
    assert fast_link.tokens_per_second == pytest.approx(8 * 4000 / (0.08 + 0.007))
    assert "compute-bound" in fast_link.basis


def test_between_machines_it_goes_at_the_speed_of_the_machines_network():
    """What one device sends at most passes between machines once, in a ring; a strategy may say otherwise."""
    two = like(GPUS, count=4, nodes=2, interconnect_bandwidth_gbs=50)
    assert two.devices == 8 and two.sequences_per_step() == 64 and two.machine_price_per_hour == 24
    # 1e12 B / 5e10 = 20 s, which is longer than 2 s over the links
    assert estimate_speed(1e10, 1000, HELD, two).tokens_per_second == pytest.approx(8 * 4000 / (20 + 0.007))
    inside = replace(HELD, sent_between_nodes=10**10)  # 0.2 s
    assert estimate_speed(1e10, 1000, inside, two).tokens_per_second == pytest.approx(8 * 4000 / (2 + 0.007))
    apart = like(two, count=1, nodes=8, link_bandwidth_gbs=0)
    assert estimate_speed(1e10, 1000, inside, apart).tokens_per_second == pytest.approx(8 * 4000 / (0.2 + 0.007))


def test_money_is_of_the_whole_machine():
    speed = estimate_speed(1e10, 1000, HELD, GPUS)
    money = estimate_cost(speed, GPUS)
    assert money.per_hour == 24.0
    assert money.per_billion_tokens == pytest.approx(24 / 3600 * 1e9 / speed.tokens_per_second)
