"""Which parts of a spec go with a module, against what a person would delete by hand."""

import copy
import dataclasses
from pathlib import Path

import pytest

from tryplicity.ablation.cells import Setting, cell, table
from tryplicity.ablation.modules import Variant, comparisons, component_names, types_in, without
from tryplicity.errors import UserError
from tryplicity.hardware import load_hardware
from tryplicity.spec import load_spec, parse_yaml, read_yaml

ROOT = Path(__file__).parents[2]
SMALL = ROOT / "tests" / "small.yaml"


@pytest.fixture(scope="module")
def named(registry):
    return component_names(registry)


@pytest.fixture(scope="module")
def setting(registry):
    return Setting(1000, 8, "texts", "d" * 64, load_hardware("cpu", registry))


def data_of(path):
    return read_yaml(path).data


#: what a person would delete to take the module out, as paths
BY_HAND = {
    SMALL: {
        "hyper_connections": [["residual"]],
        "spike": [["blocks", "memory", "feed_forward", "activation"]],  # a bare name
        "lateral_inhibition": [["blocks", "memory", "feed_forward", "router"]],
        "dynamic_sparsity": [["blocks", "attention", "feed_forward", "router"]],
        "moe": [["blocks", "memory", "feed_forward"], ["blocks", "attention", "feed_forward"]],
        "multi_token_prediction": [["heads", 0]],
        "mamba2": [["blocks", "memory", "mixer"]],
        "wsd": [["training", "schedule"]],
    },
    ROOT / "specs" / "tiny.yaml": {
        "bitlinear": [["linear"]],
        "hyper_connections": [["residual"]],
        "spike": [["blocks", "memory", "feed_forward", "activation"]],
        "lateral_inhibition": [["blocks", "memory", "feed_forward", "router"]],
        "dynamic_sparsity": [["blocks", "attention", "feed_forward", "router"]],
        "multi_token_prediction": [["heads", 0]],
    },
}


@pytest.mark.parametrize("path, module", [(p, m) for p, modules in BY_HAND.items() for m in modules],
                         ids=[f"{p.stem}-{m}" for p, modules in BY_HAND.items() for m in modules])
def test_taking_a_module_out_deletes_what_a_person_would(path, module, named):
    data, expected = data_of(path), data_of(path)
    for *way, last in BY_HAND[path][module]:
        place = expected
        for step in way:
            place = place[step]
        del place[last]
    untouched = copy.deepcopy(data)
    assert without(data, [module], named) == expected
    assert data == untouched
    assert module in types_in(data, named) and module not in types_in(expected, named)


def test_several_are_taken_out_of_one_list_and_through_an_alias(named):
    data = parse_yaml("""
        heads: [multi_token_prediction, {type: other, activation: silu}, {type: multi_token_prediction}]
        blocks: {a: {feed_forward: &moe {type: moe, router: {type: spike}}}, b: {feed_forward: *moe}}
        spike: {activation: spike, name: spike}
        layers: [spike, {mixer: gqa}]
        """, "x.yaml").data
    assert without(data, ["multi_token_prediction", "spike"], named) == {
        "heads": [{"type": "other", "activation": "silu"}],
        "blocks": {"a": {"feed_forward": {"type": "moe"}}, "b": {"feed_forward": {"type": "moe"}}},
        "spike": {"name": "spike"},  # neither a block of that name nor a text is a component
        "layers": ["spike", {"mixer": "gqa"}]}
    shared = {"type": "moe", "activation": "spike"}  # one object in two places, as an alias can be
    assert without({"a": {"feed_forward": shared}, "b": {"feed_forward": shared}}, ["spike"], named) == {
        "a": {"feed_forward": {"type": "moe"}}, "b": {"feed_forward": {"type": "moe"}}}


def test_what_the_default_can_hold_too_stays(named):
    """Two modules of one router: each goes alone."""
    both = {"router": {"type": "dynamic_sparsity", "max_experts": 6, "inhibition": {"type": "lateral_inhibition"}}}
    assert without(both, ["dynamic_sparsity"], named) == {
        "router": {"type": "top_k", "inhibition": {"type": "lateral_inhibition"}}}
    assert without(both, ["lateral_inhibition"], named) == {"router": {"type": "dynamic_sparsity", "max_experts": 6}}
    assert without(both, ["dynamic_sparsity", "lateral_inhibition"], named) == {}


def test_a_row_compares_the_spec_with_the_spec_without_it(registry):
    source = read_yaml(SMALL)
    source.data |= {"phases": [{"kind": "pretrain"}], "expect": {"total_parameters": 1}}
    rows = comparisons(source, ["spike", "hyper_connections", "spike"], registry)
    assert [(r.module, r.with_it.label, r.without_it.label) for r in rows] == [
        ("spike", "baseline", "without-spike"), ("hyper_connections", "baseline", "without-hyper_connections")]
    assert rows[0].with_it.data == data_of(SMALL)  # phases and expect left out
    assert rows[1].without_it.spec.residual.name == "add"  # the default stands in
    assert rows[1].without_it.spec.heads == rows[1].with_it.spec.heads


def test_alone_each_is_added_to_the_spec_without_any(registry, named):
    rows = comparisons(read_yaml(SMALL), ["spike", "hyper_connections"], registry, alone=True)
    bare = without(data_of(SMALL), ["spike", "hyper_connections"], named)
    assert [(r.with_it.label, r.without_it.label) for r in rows] == [
        ("only-spike", "bare"), ("only-hyper_connections", "bare")]
    assert all(r.without_it.data == bare for r in rows)
    assert rows[0].with_it.data == without(data_of(SMALL), ["hyper_connections"], named)
    assert rows[1].with_it.data == without(data_of(SMALL), ["spike"], named)


@pytest.mark.parametrize("modules, alone, message", [
    (["spik"], False, "--without spik: .*small.yaml names no such component .did you mean spike"),
    (["retina"], False, "names no such component .there are: adamw, .*spike"),
    (["mamba2", "moe"], True, "without mamba2, moe: .*small.yaml:9:5: blocks.memory: a block needs a mixer"),
    (["wsd"], False, "--without wsd: the model is the same with and without it"),
    (["moe", "spike"], True, "--without spike: the model is the same with and without it"),
])
def test_what_cannot_be_is_said_in_one_line(registry, modules, alone, message):
    if modules == ["wsd"]:  # the default, written out with its own options, is another schedule; as it is, it is none
        source = parse_yaml(SMALL.read_text().replace("{type: wsd, warmup_steps: 4}", "wsd"), str(SMALL))
    else:
        source = read_yaml(SMALL)
    with pytest.raises(UserError, match=message) as error:
        comparisons(source, modules, registry, alone)
    assert "\n" not in str(error.value)


# --- cells ---

def test_the_key_is_the_trainings_and_nothing_elses(registry, setting):
    text = SMALL.read_text()

    def key(text=text, seed=0, label="a", **changes):
        spec = load_spec(parse_yaml(text, "somewhere.yaml"), registry)
        return cell(Variant(label, spec), seed, dataclasses.replace(setting, **changes)).key

    first, *rest = [line for line in text.splitlines() if not line.startswith(("#", "name"))]
    same = [key(), key(label="b"), key("# a comment\n" + text), key(text.replace("name: small", "name: other")),
            key("\n".join([*rest, first, "name: small"])), key(data="elsewhere"),
            key(text.replace("checkpoint_every: 4", "checkpoint_every: 4  # often"))]
    assert len(set(same)) == 1
    batch = dataclasses.replace(setting.hardware, batch=2)
    price = dataclasses.replace(setting.hardware, price_per_hour=9.0)
    others = [key(seed=1), key(tokens=1001), key(rows=0), key(data_identity="e" * 64), key(hardware=batch),
              key(text.replace("activation: spike, ", "")), key(text.replace("3.0e-3", "3.1e-3"))]
    assert len({*same, *others}) == 1 + len(others)
    assert key(hardware=price) == same[0]
    assert key()[:8] == "e8d93494"  # cells of earlier days are found again


def test_equal_cells_are_one_and_seeds_come_in_turn(registry, setting, tmp_path):
    rows = comparisons(read_yaml(SMALL), ["spike", "hyper_connections", "multi_token_prediction"], registry)
    cells = table(rows, 2, setting)
    labels = ["baseline", "without-spike", "without-hyper_connections", "without-multi_token_prediction"]
    assert [(c.label, c.seed) for c in cells] == [(label, seed) for seed in range(2) for label in labels]
    assert [c.spec["training"]["seed"] for c in cells[::4]] == [0, 1]
    # of one module, the spec with it alone is the spec, and without any the spec without it: found under its name
    alone = comparisons(read_yaml(SMALL), ["spike"], registry, alone=True)
    assert [c.key for c in table(alone, 1, setting)] == [cells[0].key, cells[1].key]
    cells[0].folder(tmp_path).mkdir(parents=True)
    assert table(alone, 1, setting)[0].folder(tmp_path) == cells[0].folder(tmp_path)


def test_a_cells_seed_counts_from_the_specs_own(registry, setting):
    source = read_yaml(SMALL)
    source.data["training"]["seed"] = 7
    row = comparisons(source, ["spike"], registry)[0]
    assert [cell(row.with_it, seed, setting).spec["training"]["seed"] for seed in range(3)] == [7, 8, 9]
    assert source.data["training"]["seed"] == 7
