"""The schedule's figures, worked out by hand from its formula."""

import math

import pytest

from tryplicity_plugins.optimization.wsd import WarmupStableDecay


def schedule(**options):
    return WarmupStableDecay(WarmupStableDecay.Config(**options))


@pytest.mark.parametrize(("progress", "step", "factor"), [
    (0.0, 0, 0.1), (0.02, 4, 0.5), (0.04, 9, 1.0), (0.05, 10, 1.0),  # a tenth more a step
    (0.5, 500, 1.0), (0.8, 800, 1.0),                                # the plateau, to its last step
    (0.85, 850, 1 - 0.5), (0.9, 900, 1 - math.sqrt(0.5)),            # a quarter and half of the fall
    (0.95, 950, 1 - math.sqrt(0.75)), (1.0, 1000, 0.0), (1.2, 1200, 0.0)])
def test_rise_plateau_and_fall_by_the_root(progress, step, factor):
    assert schedule(warmup_steps=10, decay=0.2).factor(progress, step) == pytest.approx(factor, abs=1e-9)


def test_the_floor_is_where_the_fall_ends():
    half = schedule(warmup_steps=0, decay=0.5, floor=0.2)
    assert half.factor(0.0, 0) == 1.0 and half.factor(1.0, 9) == pytest.approx(0.2)
    assert half.factor(0.625, 5) == pytest.approx(0.2 + 0.8 * 0.5)


def test_no_fall_and_a_rise_that_is_not_over_when_the_fall_begins():
    assert schedule(decay=0.0, warmup_steps=1).factor(1.0, 5) == 1.0
    assert schedule(decay=1.0, warmup_steps=100).factor(0.25, 24) == pytest.approx(0.25 * 0.5)
