"""`base:`: what a spec says is laid over another."""

import pytest
from jsonschema import Draft202012Validator

from tryplicity import UserError, load_plugins
from tryplicity.spec import load_spec, parse_yaml, spec_schema

REGISTRY = load_plugins().registry
BASE = """
name: first
vocab_size: 300
hidden_size: 32
context_length: 64
blocks:
  look: {mixer: {type: gqa, heads: 4, kv_heads: 2, rope_base: 500}, feed_forward: {type: gated_mlp, inner_size: 48}}
layers: [{repeat: 3, of: look}]
expect: {total_parameters: 1}
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "first.yaml").write_text(BASE)
    return tmp_path


def write(folder, text, name="second.yaml"):
    (folder / name).write_text(text)
    return str(folder / name)


def test_mappings_are_merged_lists_and_other_types_replaced(folder):
    spec = load_spec(write(folder, """
base: first.yaml
name: second
blocks:
  look: {mixer: {kv_heads: 4}}
  past: {mixer: {type: mamba2, head_dim: 16}}
layers: [look, past]
"""), REGISTRY)
    look, past = spec.layers
    assert (look.mixer.config.heads, look.mixer.config.kv_heads, look.mixer.config.rope_base) == (4, 4, 500)
    assert look.feed_forward.config.inner_size == 48 and past.feed_forward is None
    assert (spec.name, spec.vocab_size, spec.expect) == ("second", 300, None)  # what was expected was another model
    assert load_spec(parse_yaml(spec.as_yaml(), "again"), REGISTRY) == spec  # and needs no base any more

    path = write(folder, "base: first.yaml\nblocks: {look: {mixer: {type: mamba2, head_dim: 16}}}")
    changed = load_spec(path, REGISTRY)
    assert changed.layers[0].mixer.name == "mamba2" and changed.layers[0].feed_forward.config.inner_size == 48


def test_a_base_of_a_base_settings_and_installed_ones(folder):
    write(folder, "base: first.yaml\nhidden_size: 64\nname: middle", "middle.yaml")
    spec = load_spec(write(folder, "base: middle.yaml\nname: last"), REGISTRY, ["blocks.look.mixer.heads=8"])
    assert (spec.name, spec.hidden_size, spec.layers[0].mixer.config.heads) == ("last", 64, 8)
    assert load_spec(write(folder, "base: tiny\ncontext_length: 32"), REGISTRY).context_length == 32


def test_a_mistake_is_told_where_it_stands(folder):
    path = write(folder, "base: first.yaml\nblocks: {look: {mixer: {kv_heads: 3}}}")
    with pytest.raises(UserError, match=rf"^{path}:2:35: blocks\.look\.mixer\.kv_heads: 3 does not divide heads"):
        load_spec(path, REGISTRY)
    write(folder, BASE.replace("kv_heads: 2", "kv_heads: 3"), "first.yaml")
    with pytest.raises(UserError, match=rf"^{folder / 'first.yaml'}:7:\d+: blocks\.look\.mixer\.kv_heads: 3 does not"):
        load_spec(write(folder, "base: first.yaml\nname: x"), REGISTRY)


@pytest.mark.parametrize("text, message", [
    ("base: frist.yaml", r"second.yaml:1:7: base: frist.yaml: there is no such file"),
    ("base: {a: 1}", r"second.yaml:1:7: base: expected the name of a spec"),
    ("base: third.yaml", r"base: third.yaml begins with this spec itself"),
])
def test_no_such_base(folder, text, message):
    write(folder, "base: second.yaml", "third.yaml")
    with pytest.raises(UserError, match=message):
        load_spec(write(folder, text), REGISTRY)


def test_the_schema_knows_it():
    schema = Draft202012Validator(spec_schema(REGISTRY))
    assert schema.is_valid({"base": "full", "blocks": {"attention": {"mixer": {"heads": 8}}}})
    assert not schema.is_valid({"base": "full", "blocks": {"attention": {"mixer": {"headz": 8}}}})
    assert not schema.is_valid({"base": "full", "hidden": 8})
    assert not schema.is_valid({"name": "x"})
