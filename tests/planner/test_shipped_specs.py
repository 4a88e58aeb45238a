"""`full` and `5090` are the models that the project is about: all seven brain modules, each off by one line."""

from pathlib import Path

import pytest

from tryplicity.ablation.modules import component_names, types_in
from tryplicity.model import assemble
from tryplicity.planner.count import count
from tryplicity.spec import load_spec, parse_yaml

SPECS = Path(__file__).parents[2] / "specs"
#: what a line holds, and what stands in its place without the module
LINES = {
    "spike": ("activation: {type: spike}", ""),
    "dynamic_sparsity": ("<<: {type: dynamic_sparsity", "        type: top_k\n"),
    "lateral_inhibition": ("inhibition: {type: lateral_inhibition}", ""),
    "hebbian_loss": ("- {type: hebbian_loss}", ""),
    "predictive_coding": ("- {type: predictive_coding}", ""),
    "sleep_consolidation": ("- {type: sleep_consolidation", ""),
    "neuro_curriculum": ("- {type: neuro_curriculum}", ""),
}


def modules_of(registry, text):
    spec = load_spec(parse_yaml(text, "spec.yaml"), registry)
    model = assemble(spec)
    assert len({repr(block.feed_forward) for block in spec.layers}) == 1, "every block has the same experts"
    return set(types_in(spec.architecture(), component_names(registry))) & LINES.keys(), model


@pytest.mark.parametrize("name", ["full", "5090", "tiny"])
def test_all_seven_are_there(registry, name):
    spec = load_spec(str(SPECS / f"{name}.yaml"), registry)
    assert set(types_in(spec.architecture(), component_names(registry))) >= LINES.keys()


@pytest.mark.parametrize("name", ["full", "5090"])
@pytest.mark.parametrize("module", LINES)
def test_each_is_off_by_one_line_and_the_model_keeps_its_size(registry, name, module):
    text = (SPECS / f"{name}.yaml").read_text()
    part, instead = LINES[module]
    line, = [line for line in text.splitlines(keepends=True) if part in line]
    assert "#" in line or "#" in text.splitlines()[text.splitlines().index(line.rstrip("\n")) - 1], "what was found"
    modules, model = modules_of(registry, text.replace(line, instead))
    assert modules == LINES.keys() - {module}
    whole, without = count(modules_of(registry, text)[1]), count(model)
    assert without.total == pytest.approx(whole.total, rel=0.001)
    assert without.active == pytest.approx(whole.active, rel=0.001)


@pytest.mark.parametrize(("name", "least", "most", "mean"), [("full", 4, 12, 8), ("5090", 2, 6, 4)])
def test_experts_of_a_token(registry, name, least, most, mean):
    spec = load_spec(str(SPECS / f"{name}.yaml"), registry)
    router = spec.layers[0].feed_forward.config.router.config
    assert (router.min_experts, router.max_experts, router.mean_experts) == (least, most, mean)
