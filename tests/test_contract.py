"""Our own components, and the examples, keep every promise that the conformance kit asks of a stranger's."""

from pathlib import Path

import pytest

from tryplicity import UserError, load_plugins
from tryplicity.testing import check

HERE = Path(__file__).parent / "plugins"
FILES = (str(HERE / "example_plugin.py"), str(HERE / "parallel_plugin.py"))
REGISTRY = load_plugins(FILES).registry
OPTIONS = {"mamba2": {"state_size": 8, "head_dim": 16, "chunk": 4},
           "gqa": {"heads": 4, "kv_heads": 2, "qk_norm": True, "window": 4, "softcap": 2.0, "rotary_fraction": 0.5},
           "moe": {"experts": 4, "inner_size": 16, "router": {"type": "lateral_inhibition"}, "activation": "spike"},
           "gated_mlp": {"inner_size": 16},
           "two_mixers": {"left": {"type": "mamba2", "head_dim": 16}, "right": {"type": "gqa", "heads": 4}},
           "dynamic_sparsity": {"max_experts": 3, "mean_experts": 2, "min_experts": 1}}
#: whose tests have a server, an index, a model or a folder for them
APART = ("source", "judge", "retriever", "architecture")
COMPONENTS = [component for component in REGISTRY.components() if component.family not in APART]


def trials(component):
    """The options that it is tried with: those of `OPTIONS`, else its own."""
    return [OPTIONS[component.name]] if component.name in OPTIONS else component.trials


@pytest.mark.parametrize(("component", "options"), [(c, options) for c in COMPONENTS for options in trials(c)],
                         ids=lambda one: f"{one.family} {one.name}" if isinstance(one, type) else "")
def test_every_component_keeps_every_promise(component, options):
    assert check(component, options, plugins=FILES) == []


@pytest.mark.slow
@pytest.mark.parametrize("component", [c for c in COMPONENTS if c.family in (
    "mixer", "feed_forward", "router", "activation", "residual", "head", "objective", "parallelism")],
    ids=lambda one: f"{one.family} {one.name}")
def test_on_two_ranks_too(component):
    assert check(component, trials(component)[0], plugins=FILES, ranks=True) == []


def test_sources_and_judges_keep_them_too(corpus):
    """Those that need nothing but a folder."""
    assert check(REGISTRY.get("source", "files"), {"path": str(corpus)}) == []
    assert check(REGISTRY.get("judge", "statistical")) == []


def test_options_that_cannot_be_are_the_users():
    with pytest.raises(UserError, match=r"heads.*`trials` of"):
        check(REGISTRY.get("mixer", "gqa"), {"heads": 5})


def test_a_component_whose_file_was_loaded_once_more_since_is_the_same_on_trial():
    from tryplicity import plugins

    shift = REGISTRY.get("mixer", "shift")
    plugins._load.cache_clear()
    assert load_plugins(FILES).registry.get("mixer", "shift") is not shift
    assert check(shift, plugins=FILES, ranks=False) == []
