"""Whatever is done to a spec, the answer is a spec or a UserError, never a traceback."""

from __future__ import annotations

import contextlib
import copy

from hypothesis import given, settings
from hypothesis import strategies as st
from small_components import COMPONENTS, VALID

from tryplicity import UserError
from tryplicity.registry import Registry
from tryplicity.spec import load_spec, parse_yaml
from tryplicity.spec.settings import apply_settings

REGISTRY = Registry()
REGISTRY.add_all(COMPONENTS, "plugin tests")
JUNK = st.sampled_from([None, True, 0, -1, 3, 2.5, 10**30, float("inf"), float("nan"), "", "memory",
                        "recall", "x.y",
                        [], [[]], {}, {"type": "moe"}, {"type": 3}, {"repeat": 2}, {"pattern": ["look"]},
                        [None], b"x"])
KEYS = st.sampled_from(["type", "heads", "repeat", "of", "mixer", "layers", "0-3", "99", "x", "", "experts",
                        "stages"])


def paths(data, path=()):
    yield path
    if isinstance(data, dict | list):
        for key, value in data.items() if isinstance(data, dict) else enumerate(data):
            yield from paths(value, (*path, key))


def mutated(data, draw):
    """One part of the data deleted, replaced, renamed, moved elsewhere, or joined by another."""
    *way, last = draw(st.sampled_from([path for path in paths(data) if path]))
    at = data
    for key in way:
        at = at[key]
    kind = draw(st.sampled_from(["delete", "junk", "copy", "add"]))
    if kind == "delete":
        del at[last]
    elif kind == "junk":
        at[last] = draw(JUNK)
    elif kind == "copy":
        source = data
        for key in draw(st.sampled_from(list(paths(data)))):
            source = source[key]
        at[last] = copy.deepcopy(source)
    elif isinstance(at, dict):
        at[draw(KEYS)] = draw(JUNK)
    else:
        at.append(draw(JUNK))


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_changed_values(data):
    source = parse_yaml(VALID, "s.yaml")
    for _ in range(data.draw(st.integers(1, 4))):
        if source.data:
            mutated(source.data, data.draw)
    with contextlib.suppress(UserError):
        load_spec(source, REGISTRY)


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_scrambled_text(data):
    text = VALID
    for _ in range(data.draw(st.integers(1, 5))):
        start = data.draw(st.integers(0, len(text)))
        end = min(len(text), start + data.draw(st.integers(0, 12)))
        insert = data.draw(st.text(alphabet="ab01 :-{}[]&*!|>'\"#%@`,?\n\t.\x00é", max_size=6))
        text = text[:start] + insert + text[end:]
    with contextlib.suppress(UserError):
        load_spec(parse_yaml(text, "s.yaml"), REGISTRY)


@settings(max_examples=80, deadline=None)
@given(st.text(alphabet="layersbockmix.[]012=- :{}'", max_size=30))
def test_any_setting(text):
    source = parse_yaml(VALID, "s.yaml")
    with contextlib.suppress(UserError):
        apply_settings(source, [text])
        load_spec(source, REGISTRY)
