"""specs/published: what transformers' own models are, by their published config.json."""

from __future__ import annotations

import json
from functools import cache

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.command_line import call
from tests.exchange.published import CONFIGS
from tryplicity import load_plugins
from tryplicity.model import assemble
from tryplicity.planner.count import count
from tryplicity.spec import installed_files, load_spec, parse_yaml
from tryplicity.spec.loader import dump_yaml

REGISTRY = load_plugins().registry
NAMES = sorted(name.removeprefix("published/") for name in installed_files("spec") if name.startswith("published/"))


@cache
def theirs(name):
    """transformers' model without memory."""
    config = {key: value for key, value in CONFIGS[name].items() if key not in ("model_type", "quantization_config")}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(CONFIGS[name]["model_type"], **config))


def test_each_is_there():
    assert sorted(CONFIGS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_it_counts_what_transformers_model_counts(name):
    spec, model = load_spec(f"published/{name}", REGISTRY), theirs(name)
    counts = count(assemble(spec))
    assert counts.total == sum(parameter.numel() for parameter in model.parameters()) == spec.expect.total_parameters
    chosen = CONFIGS[name].get("num_experts_per_tok", 1) / max(1, CONFIGS[name].get(
        "num_experts", CONFIGS[name].get("num_local_experts", 1)))
    active = sum(parameter.numel() * (chosen if ".experts." in key else 1)
                 for key, parameter in model.named_parameters())
    assert counts.active == active == (spec.expect.active_parameters or counts.total)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_what_import_makes_of_its_config(name):
    config = CONFIGS[name]
    data = {"name": name, **REGISTRY.get("architecture", config["model_type"]).spec(config)}
    due = load_spec(parse_yaml(dump_yaml(data), name), REGISTRY)
    spec = load_spec(f"published/{name}", REGISTRY)
    assert spec.architecture() == due.architecture() and spec.name == name


@pytest.mark.parametrize("name", NAMES)
def test_its_file_says_where_it_is_from(name):
    lines = installed_files("spec")[f"published/{name}"].read_text(encoding="utf-8").splitlines()
    assert any(line.startswith("# https://") for line in lines[:4])


def test_build_answers_for_them(capfd):
    code, out, _ = call(capfd, "build", "published/smollm2-135m", "--hw", "5090", "--json")
    said = json.loads(out)
    assert code == 0 and said["fits"] and said["parameters"]["total"] == 134_515_008
