"""What others call an option leads to ours."""

from __future__ import annotations

import pytest

from tryplicity import UserError, load_plugins
from tryplicity.configs import config_schema
from tryplicity.hardware import Hardware
from tryplicity.names import FOREIGN, NOT_HERE, PROFILE
from tryplicity.spec import load_spec, parse_yaml
from tryplicity.spec.model import Phase, Training, _SpecFile

SPEC = """\
name: x
vocab_size: 300
hidden_size: 64
context_length: 16
layers: [{mixer: {type: gqa}, feed_forward: {type: moe}}]
"""


@pytest.mark.parametrize(("old", "new", "hint"), [
    ("context_length", "max_position_embeddings", "did you mean context_length?"),
    ("hidden_size", "d_model", "did you mean hidden_size?"), ("hidden_size", "n_embd", "did you mean hidden_size?"),
    ("name: x", "name: x\ntie_word_embeddings: true", "did you mean tied_embeddings?"),
    ("name: x", "name: x\nlr: 1", "did you mean training.optimizer.learning_rate?"),
    ("name: x", "name: x\nseed: 1", "did you mean training.seed?"),
    ("name: x", "name: x\nmax_grad_norm: 1", "did you mean training.gradient_clip?"),
    ("name: x", "name: x\nnum_attention_heads: 8", "heads is an option of mixer"),
    ("name: x", "name: x\nwarmup_steps: 8", "did you mean training.schedule.warmup_steps?"),
    ("name: x", "name: x\nbatch_size: 8", "batch stands in the hardware profile"),
    ("name: x", "name: x\nmax_steps: 8", "--steps, --tokens or --minutes"),
    ("name: x", "name: x\ntraining: {lr: 1}", "did you mean optimizer.learning_rate?"),
    ("type: gqa", "type: gqa, n_heads: 8", "did you mean heads?"),
    ("type: gqa", "type: gqa, num_key_value_heads: 8", "did you mean kv_heads?"),
    ("type: gqa", "type: gqa, rope_theta: 8", "did you mean rope_base?"),
    ("type: gqa", "type: gqa, attention_dropout: 0", "nothing is dropped here"),
    ("type: moe", "type: moe, num_experts: 8", "did you mean experts?"),
    ("type: moe", "type: moe, n_routed_experts: 8", "did you mean experts?"),
    ("type: moe", "type: moe, num_experts_per_tok: 8", "did you mean top_k?"),
    ("type: moe", "type: moe, moe_intermediate_size: 8", "did you mean inner_size?"),
    ("type: moe", "type: moe, hidden_act: silu", "did you mean activation?"),
])
def test_a_foreign_name_gets_the_right_hint(old, new, hint):
    with pytest.raises(UserError) as caught:
        load_spec(parse_yaml(SPEC.replace(old, new), "s.yaml"), load_plugins().registry)
    (line,) = str(caught.value).splitlines()  # not a second one of what is missing
    assert hint in line


def test_a_foreign_name_that_is_an_option_here_is_no_mistake():
    """The table is asked only about what a component does not take."""
    registry = load_plugins().registry
    for component in registry.components():
        for option in component.Config.__dataclass_fields__:
            assert option not in FOREIGN or FOREIGN[option] != option


def test_every_name_the_table_leads_to_is_there():
    registry = load_plugins().registry
    known = {option for component in registry.components() for option in component.Config.__dataclass_fields__}
    for config in (_SpecFile, Training, Phase, Hardware):
        known |= set(config_schema(config)["properties"])
    known |= {"mixer", "feed_forward"}
    assert set(FOREIGN.values()) <= known and set(PROFILE) <= set(config_schema(Hardware)["properties"])
    assert not set(FOREIGN) & set(NOT_HERE)
