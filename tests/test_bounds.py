"""Every number a user may give has two ends, and beyond them there is one line, at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tryplicity import PluginFault, UserError, load_plugins
from tryplicity.builder import build
from tryplicity.configs import config_schema
from tryplicity.hardware import hardware_schema
from tryplicity.spec import load_spec, parse_yaml, spec_schema


def numbers(schema: Any, path: str = "") -> Iterator[tuple[str, dict]]:
    """Every place in a schema that takes a number."""
    if isinstance(schema, dict):
        if schema.get("type") in ("integer", "number"):
            yield path, schema
        for key, value in schema.items():
            yield from numbers(value, f"{path}/{key}")
    elif isinstance(schema, list):
        for value in schema:
            yield from numbers(value, path)


@pytest.mark.parametrize("compose", [spec_schema, hardware_schema])
def test_every_number_has_two_ends(compose):
    found = list(numbers(compose(load_plugins().registry)))
    assert len(found) > 8
    open_ended = [path for path, schema in found if not ({"minimum", "exclusiveMinimum"} & set(schema)
                                                         and {"maximum", "exclusiveMaximum"} & set(schema))]
    assert not open_ended


@pytest.mark.parametrize("setting", [
    "vocab_size=12345678901234567890", "vocab_size=1e19", "hidden_size=1e308", "hidden_size=.inf", "hidden_size=.nan",
    "context_length=1e11", "context_length=0x7fffffffffffffffff", "training.seed=1e20", "training.seed=-1",
    "training.gradient_clip=1e-320", "hardware.memory_gb=1e308", "hardware.memory_gb=5e-324", "hardware.batch=1e20",
    "hardware.count=1e20", "hardware.accumulation=-1", "hardware.tflops=1e-300", "hardware.price_per_hour=1e300",
    "expect.total_parameters=1e300", "layers.0.repeat=1e18", "phases=[{kind: pretrain, share: 1e300}]",
    "layers=[{mixer: gqa, feed_forward: {type: moe, experts: 1e20}}]",
    "layers=[{mixer: {type: mamba2, state_size: 1e15}}]", "layers=[{repeat: 1e6, of: [{mixer: gqa}]}]",
    "layers=[{pattern: [{mixer: gqa}], layers: 1e15}]",
    "layers=[{repeat: 900, of: [{repeat: 900, of: [{repeat: 900, of: [{mixer: gqa}]}]}]}]",
])
def test_what_is_beyond_them_is_one_line(setting, registry):
    with pytest.raises(UserError) as caught:
        build("tiny", "cpu", registry, ["layers=[{repeat: 1, of: {mixer: gqa}}]", setting])
    (line,) = str(caught.value).splitlines()
    assert "expected" in line or "more than 1000 layers" in line


def test_more_tokens_in_a_pass_than_any_device_holds_are_refused(registry):
    with pytest.raises(UserError, match=r"batch 65,536 x context_length 1,048,576: .* tokens in one forward pass"):
        build("tiny", "cpu", registry, ["context_length=1048576", "hardware.batch=65536"])


def options() -> list[tuple[str, str, str]]:
    registry = load_plugins().registry
    return [(component.family, component.name, name) for component in registry.components()
            for name, schema in config_schema(component.Config)["properties"].items() if any(numbers(schema))]


def ends(schema: dict) -> list[float]:
    """The least and the most that a number may be."""
    (_, bounds), *_ = numbers(schema)
    whole = bounds["type"] == "integer"
    inside = 1 if whole else 1e-6
    low = bounds["minimum"] if "minimum" in bounds else bounds["exclusiveMinimum"] + inside
    high = bounds["maximum"] if "maximum" in bounds else bounds["exclusiveMaximum"] - inside
    return [low, high]


@pytest.mark.parametrize(("family", "name", "option"), options(), ids=lambda text: text)
def test_either_end_of_every_option_is_taken_and_beyond_it_is_told(family, name, option, registry):
    """Taken, or refused by the component's own check in words: nothing else."""
    component = registry.get(family, name)
    schema = config_schema(component.Config)["properties"][option]
    if {kind.get("type") for kind in (schema, *schema.get("anyOf", ()))} & {"object", "array"}:
        pytest.skip("a collection: its members are options of their own")
    needed = {field: "x" for field in config_schema(component.Config)["required"] if field != option}
    needed |= {"url": "http://x"} if "url" in needed else {}
    needed |= {name: {"type": "files", "path": "x"} for name in ("good", "bad") if name in needed}
    for value in ends(schema):
        part = registry.part(family, {"type": name, **needed, option: value})
        assert getattr(part.config, option) == value
    for value in (1e308, -1e308, 10**20, -(10**20), float("inf"), float("-inf"), float("nan"), 5e-324 / 2 - 1e300):
        with pytest.raises(UserError) as caught:
            registry.part(family, {"type": name, **needed, option: value})
        assert len(str(caught.value).splitlines()) == 1 and option in str(caught.value)


NUMBERS = st.one_of(st.integers(-(10**25), 10**25), st.floats(allow_nan=True, allow_infinity=True),
                    st.sampled_from([0, 1, -1, 2**31, 2**53, 2**63, 2**64, 1e308, 5e-324, 1e-45]))
PLACES = ["vocab_size", "hidden_size", "context_length", "training.seed", "training.validate_every",
          "layers.0.mixer.heads", "layers.0.mixer.head_dim", "layers.0.mixer.rope_base",
          "layers.0.feed_forward.experts", "layers.0.feed_forward.top_k", "layers.0.feed_forward.inner_size",
          "layers.0.feed_forward.shared_experts",
          "training.optimizer.learning_rate", "training.schedule.warmup_steps"]
SMALL = """\
name: small
vocab_size: 300
hidden_size: 32
context_length: 16
layers: [{mixer: {type: gqa}, feed_forward: {type: moe}}]
"""


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(st.sampled_from(PLACES), NUMBERS, min_size=1, max_size=4))
def test_whatever_the_numbers_are_a_spec_is_resolved_or_refused(values):
    registry = load_plugins().registry
    chosen = []
    for place, value in values.items():
        text = {"inf": ".inf", "-inf": "-.inf", "nan": ".nan"}.get(str(value), repr(value))
        chosen.append(f"{place}={text}")
    try:
        spec = load_spec(parse_yaml(SMALL, "s.yaml"), registry, chosen)
    except UserError:
        return
    assert dataclasses.is_dataclass(spec)


@pytest.mark.parametrize("settings", [
    ["hidden_size=1048576"], ["vocab_size=1048576"], ["hardware.accumulation=65536"],
    ["hardware.memory_gb=1e-6", "hardware.tflops=1e-6", "hardware.utilisation=1e-6", "hardware.price_per_hour=1e9"],
    ["hidden_size=1048576", "layers=[{mixer: {type: gqa, heads: 65536, head_dim: 1048576}}]"],
    ["layers=[{mixer: gqa, feed_forward: {type: moe, experts: 65536, top_k: 8, inner_size: 1048576, "
     "shared_experts: 1000000, shared_inner_size: 1048576}}]", "hidden_size=1048576"],
], ids=lambda s: s[-1][:40])
def test_the_widest_models_are_planned(settings, registry):
    """Nothing overflows between the bounds: a verdict, or one line."""
    base = ["layers=[{mixer: gqa, feed_forward: gated_mlp}]", "heads=[]", "brain=[]", "phases=[]", "residual=add"]
    try:
        plan = build("tiny", "cpu", registry, [*base, *settings]).plan.as_dict()
    except (UserError, PluginFault) as error:
        pytest.fail(str(error))
    import json

    json.dumps(plan, allow_nan=False)
