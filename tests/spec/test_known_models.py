"""A model that was trained is still known by the same hash when a component has got another option."""

import dataclasses
from dataclasses import dataclass

from tryplicity import Mixer, Part, later, load_plugins
from tryplicity.spec import load_spec, parse_yaml

HYBRID = """\
name: known
vocab_size: 300
hidden_size: 64
context_length: 16
layers:
- {mixer: {type: mamba2, head_dim: 16}, feed_forward: {type: moe, router: top_k}}
- {mixer: {type: gqa, heads: 4}, feed_forward: gated_mlp}
"""


class Turned(Mixer):
    name = "turned"

    @dataclass(frozen=True)
    class Config:
        angle: float = 1.0
        """how far"""
        axis: int | None = later(None)
        """around what"""


def test_an_option_that_came_later_counts_only_where_it_changes_something():
    part = Part(Turned, Turned.Config())
    assert part.as_dict() == {"type": "turned", "angle": 1.0}
    part = Part(Turned, dataclasses.replace(part.config, axis=0))
    assert part.as_dict() == {"type": "turned", "angle": 1.0, "axis": 0}


def test_models_trained_before_such_options_are_known_by_their_hash():
    spec = load_spec(parse_yaml(HYBRID, "hybrid.yaml"), load_plugins().registry)
    assert spec.identity() == "d7152fd2f6cf3c9e"
