"""The composed JSON Schema: valid, right about the installed specs, and knowing a stranger's components."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import pytest
from jsonschema import Draft202012Validator
from pydantic import Field

from tryplicity import Mixer, load_plugins
from tryplicity.configs import config_schema
from tryplicity.spec import installed_files, parse_yaml, read_yaml, spec_schema


class Stranger(Mixer):
    """Rolls tokens along."""

    name = "stranger"

    @dataclass(frozen=True)
    class Config:
        distance: Annotated[int, Field(gt=0, le=64)] = 1
        """how far, in tokens"""


def accepts(schema, data) -> bool:
    return Draft202012Validator(schema).is_valid(data)


def test_it_is_a_schema_and_accepts_the_valid_spec(valid, registry):
    schema = spec_schema(registry)
    Draft202012Validator.check_schema(schema)
    Draft202012Validator(schema).validate(parse_yaml(valid, "s.yaml").data)


def test_composed_of_the_installed_plugins_it_accepts_every_installed_spec():
    schema = spec_schema(load_plugins().registry)
    Draft202012Validator.check_schema(schema)
    for path in installed_files("spec").values():
        Draft202012Validator(schema).validate(read_yaml(path).data)


@pytest.mark.parametrize(("old", "new"), [
    ("linear: {type: linear}", "liner: {type: linear}"), ("heads: 4", "haeds: 4"), ("heads: 4", "heads: 0"),
    ("heads: 4", 'heads: "4"'), ("heads: 4", "window: -3"), ("hidden_size: 64", "hidden_size: wide"),
    ("context_length: 128\n", ""), ("      inner_size: 32\n", ""), ("type: inhibition", "type: inhibitoin"),
    ("type: attention", "typ: attention"), ("mixer: memory", "mixer: mamba"), ("mixer: memory", "mixer:"),
    ("repeat: 3", "repeat: 0"), ("pattern: [recall, look]", "pattern: []"),
    ("state_size: 8", "state_size: 8.5"),
    ("gradient_clip: 0.5", "gradient_clips: 0.5"), ("total_parameters: 1e6", "within: 2"),
    ("  11:", "  last:"),
    ("{until: 1, judge", "{until: 1.5, judge"), ("judge: silu", "judge: gelu"),
    ("11: {feed_forward", "11: {feed"),
])
def test_it_rejects_the_mistakes_a_schema_can_see(valid, registry, old, new):
    assert valid.count(old) == 1
    assert not accepts(spec_schema(registry), parse_yaml(valid.replace(old, new), "s.yaml").data)


def test_a_strangers_options_are_in_it_with_their_description(valid, registry):
    text = valid.replace("mixer: memory", "mixer: {type: stranger, distance: 3}")
    assert not accepts(spec_schema(registry), parse_yaml(text, "s.yaml").data)
    registry.add(Stranger, "plugin stranger")
    schema = spec_schema(registry)
    assert accepts(schema, parse_yaml(text, "s.yaml").data)
    assert not accepts(schema, parse_yaml(text.replace("distance: 3", "distanse: 3"), "s.yaml").data)
    assert not accepts(schema, parse_yaml(text.replace("distance: 3", "distance: 65"), "s.yaml").data)
    assert "stranger" in schema["$defs"]["mixer"]["allOf"][0]["then"]["enum"]
    own = schema["$defs"]["mixer.stranger"]
    assert own["description"] == "Rolls tokens along."
    assert own["properties"]["distance"] == {"default": 1, "description": "how far, in tokens",
                                             "type": "integer",
                                             "exclusiveMinimum": 0, "maximum": 64}


def test_a_component_held_by_another_keeps_its_description_and_default(registry):
    router = spec_schema(registry)["$defs"]["feed_forward.moe"]["properties"]["router"]
    assert router == {"$ref": "#/$defs/router", "default": "top_k",
                      "description": "which experts a token goes to"}


def test_composing_leaves_the_schemas_of_the_parts_alone(registry):
    first = spec_schema(registry)
    assert spec_schema(registry) == first
    router = registry.get("feed_forward", "moe").Config
    assert config_schema(router)["properties"]["router"] == {"description": "which experts a token goes to"}


def test_a_config_pydantic_cannot_read_does_not_take_the_rest_along(registry):
    class Odd(Mixer):
        name = "odd"

        @dataclass(frozen=True)
        class Config:
            thing: object.__class__ = type

    class Broken(Mixer):
        name = "broken"

        @dataclass(frozen=True)
        class Config:
            thing: NoSuchName = 3  # noqa: F821

    registry.add(Odd, "plugin odd")
    registry.add(Broken, "plugin broken")
    schema = spec_schema(registry)
    assert schema["$defs"]["mixer.broken"]["type"] == "object"
    assert "mixer.attention" in schema["$defs"]


# --- what an editor completes ---

def offered(schema, root, depth=0):
    """The options that an editor offers inside a mapping: what stands outside of conditions, by name."""
    found = {}
    if depth > 12 or not isinstance(schema, dict):
        return found
    if "$ref" in schema:
        found |= offered(root["$defs"][schema["$ref"].rpartition("/")[2]], root, depth + 1)
    for inner in [*schema.get("anyOf", []), *schema.get("allOf", [])]:
        found |= offered(inner, root, depth + 1)
    return found | schema.get("properties", {})


def test_types_are_completed_in_block_style_for_every_family():
    """`mixer:`, a new line, `type:` and the editor knows the names."""
    from tryplicity.components import FAMILIES

    registry = load_plugins().registry
    root = spec_schema(registry)
    for family in FAMILIES:
        assert offered({"$ref": f"#/$defs/{family}"}, root)["type"]["enum"] == registry.names(family), family
    for place in (offered(root, root)["linear"], root["$defs"]["block"]["properties"]["mixer"],
                  root["$defs"]["feed_forward.moe"]["properties"]["router"],
                  root["properties"]["training"]["properties"]["optimizer"]):
        assert offered(place, root)["type"]["enum"]


def test_overrides_are_typed():
    registry = load_plugins().registry
    root = spec_schema(registry)
    base = read_yaml(installed_files("spec")["tiny"]).data
    for override, right in [
        ("{mixer: {heads: 2}}", True), ("{mixer: {type: gqa, heads: 2}}", True), ("{mixer: mamba2}", True),
        ("{feed_forward: {router: {bias_rate: 0.1}}}", True), ("{feed_forward: null}", True),
        ("{feed_forward: {inner_size: 8}}", True), ("{feed_forward: {activation: {zero_rate: 0.7}}}", True),
        ("{mixer: {haeds: 2}}", False), ("{mixer: {heads: two}}", False), ("{mixer: {type: gqaa}}", False),
        ("{mixer: mamba}", False), ("{feed_forward: {router: {bias_rat: 0.1}}}", False), ("{feed: {}}", False),
        ("{mixer: {heads: 0}}", False),
    ]:
        overrides = parse_yaml(f"overrides: {{'0': {override}}}", "o").data
        assert accepts(root, {**base, **overrides}) == right, override


def test_profiles_have_a_schema_too(capsys):
    import json

    from tryplicity.cli import main

    with pytest.raises(SystemExit) as end:
        main(["schema", "--hardware"])
    assert end.value.code == 0
    schema = json.loads(capsys.readouterr().out)
    Draft202012Validator.check_schema(schema)
    for path in installed_files("hardware").values():
        profile = read_yaml(path).data
        Draft202012Validator(schema).validate(profile)
        for wrong in ({"strategy": "fsdb"}, {"memory_gb": 1e308}, {"memory_bg": 3}, {"device": "cud"}):
            assert not accepts(schema, {**profile, **wrong}), wrong
        assert accepts(schema, {**profile, "x-note": [1], "strategy": "fsdp"})
