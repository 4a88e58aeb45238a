"""What a valid spec becomes: expansion, defaults, overrides, settings, identity."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tryplicity import UserError, load_plugins
from tryplicity.spec import Training, find_file, installed_files, load_spec, parse_yaml
from tryplicity.spec.loader import dump_yaml

SMALLEST = """\
name: smallest
vocab_size: 300
hidden_size: 8
context_length: 16
layers: [{mixer: memory}]
"""


def spec_of(text, registry, *settings):
    return load_spec(parse_yaml(text, "s.yaml"), registry, settings)


def kinds(spec) -> list[str]:
    return [block.mixer.name for block in spec.layers]


def test_defaults_are_resolved_to_any_depth(registry):
    spec = spec_of(SMALLEST, registry)
    assert (spec.linear.name, spec.norm.name, spec.residual.name) == ("linear", "rmsnorm", "add")
    assert spec.layers[0].mixer.config.state_size == 16 and spec.layers[0].feed_forward is None
    assert spec.training.optimizer.config.learning_rate == 1e-3
    plain = dataclasses.replace(spec.training, optimizer=None, schedule=None)
    assert plain == Training(optimizer=None, schedule=None)
    assert spec.heads == () and spec.brain == () and spec.expect is None and spec.tied_embeddings is True
    moe = registry.part("feed_forward", {"type": "moe", "inner_size": 4})
    assert moe.config.router.name == "top_k" and moe.config.activation is None
    assert moe.as_dict() == {"type": "moe", "inner_size": 4, "experts": 8, "activation": None,
                             "router": {"type": "top_k", "temperature": 1.0}}


def test_repeat_and_pattern_expand_in_order(valid, registry):
    assert kinds(spec_of(valid, registry)) == ["memory", "memory", "memory", "attention"] * 2 + [
        "memory", "attention", "memory", "memory"]


def test_overrides_change_only_their_layers(valid, registry):
    spec = spec_of(valid, registry)
    sizes = [block.mixer.config.state_size for block in spec.layers if block.mixer.name == "memory"]
    assert sizes == [8, 4, 4, 8, 8, 8, 8, 8, 16]
    changed, same = spec.layers[1], spec.layers[0]
    assert changed.feed_forward == same.feed_forward  # what is not named stays
    assert [block.feed_forward.config.inner_size for block in spec.layers] == [32] * 11 + [8]


def test_an_override_of_another_type_replaces_the_whole_part(valid, registry):
    text = valid.replace('"1-2": {mixer: {state_size: 4}}',
                         '"0": {mixer: {type: attention}, feed_forward: null}')
    block = spec_of(text, registry).layers[0]
    assert block.mixer.name == "attention" and block.feed_forward is None


def test_an_override_may_give_options_to_a_part_named_only(registry):
    spec = spec_of(SMALLEST + "overrides: {0: {mixer: {state_size: 3}}}\n", registry)
    assert spec.layers[0].mixer.config.state_size == 3


def test_a_block_may_have_its_own_norm(registry):
    spec = spec_of(SMALLEST.replace("{mixer: memory}", "{mixer: memory, norm: rmsnorm}"), registry)
    assert spec.site(0).norm_part is spec.layers[0].norm and spec.site().norm_part is spec.norm


def test_aliases_are_copies(valid, registry):
    spec = spec_of(valid, registry, "blocks.look.feed_forward.inner_size=64")
    assert [block.feed_forward.config.inner_size for block in spec.layers[2:4]] == [32, 64]


def test_a_mapping_inherits_by_merge_and_goes_before_what_it_inherits(registry):
    text = SMALLEST.replace("{mixer: memory}", "") + """\
blocks:
  a: {mixer: &m {type: memory, state_size: 3, decay: 0.5}}
  b: {mixer: {<<: *m, state_size: 5}}
"""
    spec = spec_of(text.replace("layers: []", "layers: [a, b]"), registry)
    assert [(b.mixer.config.state_size, b.mixer.config.decay) for b in spec.layers] == [(3, 0.5), (5, 0.5)]


@pytest.mark.parametrize(("setting", "get", "value"), [
    ("hidden_size=32", lambda s: s.hidden_size, 32),
    ("training.gradient_clip=2e-1", lambda s: s.training.gradient_clip, 0.2),
    ("blocks.recall.mixer.state_size=9", lambda s: s.layers[0].mixer.config.state_size, 9),
    ("blocks.look.mixer=memory", lambda s: s.layers[3].mixer.name, "memory"),
    ("layers[2].mixer=attention", lambda s: s.layers[-1].mixer.name, "attention"),
    ("layers.2.mixer={type: attention, heads: 2}", lambda s: s.layers[-1].mixer.config.heads, 2),
    ("layers.3=look", lambda s: len(s.layers), 13),
    ("overrides.3.mixer.heads=2", lambda s: s.layers[3].mixer.config.heads, 2),
    ("expect.within=0.1", lambda s: s.expect.within, 0.1),
    ("training.schedule.type=wsd", lambda s: s.training.schedule.name, "wsd"),
    ("brain=[]", lambda s: s.brain, ()),
    ("name=a=b", lambda s: s.name, "a=b"),
])
def test_settings_replace_and_add(valid, registry, setting, get, value):
    assert get(spec_of(valid, registry, setting)) == value


def test_what_is_written_reads_back_as_the_same_spec(valid, registry):
    spec = spec_of(valid, registry, "hidden_size=32", "overrides.3.mixer.heads=2")
    again = spec_of(spec.as_yaml(), registry)
    assert again == spec and again.identity() == spec.identity()


def test_identity_follows_the_architecture_and_nothing_else(valid, registry):
    identity = spec_of(valid, registry).identity()
    assert spec_of(valid, registry, "training.seed=5", "name=x", "expect.within=0.3").identity() == identity
    assert spec_of(valid, registry, "blocks.recall.mixer.decay=0.8").identity() != identity
    # said in another way, the same
    assert spec_of(valid, registry, "blocks.recall.mixer.decay=0.9").identity() == identity


PLAIN = st.recursive(st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False)
                     | st.sampled_from(["1e5", "on", "010", "1:30", "2020-01-01", "~", "null", ".inf", "<<",
                                        "="]),
                     lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner,
                                                                                 max_size=3),
                     max_leaves=6)


@settings(deadline=None)
@given(st.dictionaries(st.text(), PLAIN, max_size=3))
def test_dumped_data_reads_back_as_it_was(data):
    assert parse_yaml(dump_yaml(data), "f").data == data


@pytest.mark.parametrize(("text", "value"), [
    ("9.4e9", 9.4e9), ("1e-3", 1e-3), ("3", 3), ("-3", -3), ("1_000", 1000), ("0x10", 16), (".5", 0.5),
    ("2.", 2.0),
    ("on", "on"), ("yes", "yes"), ("No", "No"), ("010", "010"), ("1:30", "1:30"),
    ("2026-01-01", "2026-01-01"),
    ("true", True), ("~", None), ("", None), ("1e5x", "1e5x"), ("1.2.3", "1.2.3"), ("'3'", "3"),
])
def test_scalars_are_what_they_look_like(text, value):
    (got,) = parse_yaml(f"k: {text}", "f").data.values()
    assert got == value and type(got) is type(value)


def test_each_value_knows_its_place(valid):
    source = parse_yaml(valid, "f")
    lines = valid.splitlines()
    for path, (line, column) in source.keys.items():
        assert lines[line - 1][column - 1:].lstrip('"').startswith(path[-1])
    assert source.values["blocks", "look", "mixer", "heads"] == (17, 14)


# --- the registry ---

def test_part_reports_all_problems_of_one_component(registry):
    with pytest.raises(UserError) as caught:
        registry.part("feed_forward", {"type": "moe", "experts": 0, "router": "x"})
    assert str(caught.value).splitlines() == [
        "feed_forward: inner_size is missing; add it (a whole number of at least 1)",
        "feed_forward.experts: expected a whole number of at least 1, got 0",
        "feed_forward.router: no router is called 'x' (there are: inhibition, top_k)"]


def test_whole_numbers_may_be_written_as_floats(registry):
    assert type(registry.part("mixer", {"type": "memory", "state_size": 1e1}).config.state_size) is int


def test_a_nearest_name_is_found_whatever_its_case(registry):
    with pytest.raises(UserError, match=r"did you mean silu\?"):
        registry.part("activation", "SiLU")


# --- files by name ---

def test_installed_files_are_found_by_name():
    assert find_file("full", "spec").name == "full.yaml"
    assert find_file("h200", "hardware").name == "h200.yaml"
    assert {"tiny", "5090", "full"} <= set(installed_files("spec"))


def test_a_path_goes_before_an_installed_name(tmp_path, monkeypatch):
    (tmp_path / "full").write_text("name: mine\n")
    monkeypatch.chdir(tmp_path)
    assert find_file("full", "spec") == Path("full")
    (tmp_path / "tiny").mkdir()  # a folder is no spec
    assert find_file("tiny", "spec").name == "tiny.yaml"


@pytest.mark.parametrize(("name", "message"), [
    ("ful",
     "ful: there is no such file, and no installed spec of that name (did you mean full?); installed: 5"),
    ("mine/tinny.yaml", "(did you mean tiny?)"),
    ("zzz", "no installed spec of that name; installed: 5090, full, published/"),
    ("/", "/: this is a folder; a YAML file is wanted, or an installed spec: 5090, full, published/"),
    ("a\0b", "no installed spec"),
])
def test_what_is_not_found_is_told_with_what_there_is(name, message):
    with pytest.raises(UserError) as caught:
        find_file(name, "spec")
    assert message in str(caught.value)


# --- what is installed ---

@pytest.mark.parametrize("name", installed_files("spec"))
def test_every_installed_spec_resolves_and_reads_back(name):
    registry = load_plugins().registry
    spec = load_spec(name, registry)
    assert load_spec(parse_yaml(spec.as_yaml(), "again"), registry) == spec
    assert yaml.safe_load(spec.as_yaml())["name"] == spec.name


def test_full_has_attention_at_every_eighth_layer():
    spec = load_spec("full", load_plugins().registry)
    assert [i for i, block in enumerate(spec.layers) if block.mixer.name == "gqa"] == [7, 15, 23, 31]
    assert len(spec.layers) == 32
