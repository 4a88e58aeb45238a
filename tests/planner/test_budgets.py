"""The specs and profiles that come with the package, held to what they promise."""

import pytest

from tryplicity.builder import build


@pytest.fixture(scope="module")
def plans(registry):
    made = {}

    def plan_of(spec, hardware):
        if (spec, hardware) not in made:
            made[spec, hardware] = build(spec, hardware, registry).plan
        return made[spec, hardware]

    return plan_of


def total_gb(option):
    return option.memory.total / 1e9


def test_full_has_the_parameters_it_expects(plans):
    counts = plans("full", "h200").counts
    assert counts.total == pytest.approx(9.4e9, rel=0.02)
    assert counts.active == pytest.approx(3.0e9, rel=0.05)
    assert len(counts.layers) == 32
    assert [i for i, layer in enumerate(counts.layers) if layer.mixer == "gqa"] == [7, 15, 23, 31]


def test_full_on_h200_is_sharded_because_whole_copies_do_not_fit(plans):
    plan = plans("full", "h200")
    assert plan.chosen.name == "fsdp"
    assert total_gb(plan.chosen) == pytest.approx(41, rel=0.1)
    refused = {o.name: o for o in plan.rejected}
    assert total_gb(refused["ddp"]) > 150.7 and "> 150.7 GB" in refused["ddp"].reason
    parts = plan.chosen.memory.parts
    static = parts["weights"] + parts["gradients"] + parts["optimizer"]
    assert static == pytest.approx(16 * plan.counts.total / 8, rel=0.001)


@pytest.mark.parametrize(("hardware", "about", "offered"), [("b200", 175, 191.5), ("mi300x", 170, 206.1)])
def test_full_on_192_gb_is_copied_whole(plans, hardware, about, offered):
    plan = plans("full", hardware)
    assert plan.chosen.name == "ddp"
    assert 16 * plan.counts.total / 1e9 < total_gb(plan.chosen) < offered
    assert total_gb(plan.chosen) == pytest.approx(about, rel=0.1)


def test_5090_fits_its_card(plans):
    plan = plans("5090", "5090")
    assert 1.0e9 < plan.counts.total < 1.1e9
    assert plan.chosen.name == "single"
    assert 16 * plan.counts.total / 1e9 < total_gb(plan.chosen) < 33.7


def test_tiny_fits_a_laptop(plans):
    plan = plans("tiny", "cpu")
    assert plan.chosen.name == "single"
    assert total_gb(plan.chosen) < 4


def test_flops_of_full_are_about_eight_for_each_active_parameter(plans):
    """Two for the forward pass, two for it again, four for the backward pass; attention and scans come on top."""
    plan = plans("full", "h200")
    assert 8 * plan.counts.active < plan.speed.flops_per_token < 10 * plan.counts.active
