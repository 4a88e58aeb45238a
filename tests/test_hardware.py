"""Hardware profiles: those of the package, and every mistake in one."""

import dataclasses
from pathlib import Path

import pytest

from tryplicity import UserError
from tryplicity.hardware import Hardware, load_hardware

PROFILES = sorted((Path(__file__).parents[1] / "hardware").glob("*.yaml"))
GOOD = """\
name: two
device: cuda
accelerator: Some GPU
count: 2
memory_gb: 80
tflops: 900
memory_bandwidth_gbs: 3000
link_bandwidth_gbs: 400
"""


def test_the_package_has_its_profiles():
    assert {p.stem for p in PROFILES} == {"cpu", "5090", "b200", "mi300x", "h200", "h100"}


@pytest.mark.parametrize("path", PROFILES, ids=lambda p: p.stem)
def test_profiles_load_by_path_and_by_name(registry, path):
    profile = load_hardware(path, registry)
    assert profile == load_hardware(path.stem, registry)
    assert profile.name == path.stem
    assert profile.memory_bytes == pytest.approx(profile.memory_gb * 10**9, abs=1)


@pytest.mark.parametrize(("name", "count", "memory_gb", "batch", "accumulation"), [
    ("5090", 1, 33.7, 1, 64), ("b200", 4, 191.5, 4, 8), ("mi300x", 8, 206.1, 2, 8), ("h200", 8, 150.7, 4, 4),
    ("h100", 8, 85.5, 4, 4)])
def test_budgets_stand_in_the_profiles(registry, name, count, memory_gb, batch, accumulation):
    p = load_hardware(name, registry)
    assert (p.count, p.memory_gb, p.batch, p.accumulation) == (count, memory_gb, batch, accumulation)
    assert p.activation_checkpointing and p.precision == "bf16"
    assert p.sequences_per_step() == count * batch * accumulation
    assert p.machine_price_per_hour == pytest.approx(count * p.price_per_hour)


@pytest.mark.parametrize(("name", "mib"), [("h100", 81_559), ("h200", 143_771), ("b200", 183_359), ("5090", 32_607),
                                          ("mi300x", 206_141_652_992 / 2**20)])
def test_memory_is_what_the_device_s_own_tool_reports_and_no_more(registry, name, mib):
    """Less where the driver is known to keep some."""
    assert 0.985 * mib * 2**20 < load_hardware(name, registry).memory_bytes <= mib * 2**20


def test_amd_is_reached_under_the_name_cuda(registry):
    assert load_hardware("mi300x", registry).torch_device == "cuda"
    assert load_hardware("cpu", registry).torch_device == "cpu"


def load(registry, tmp_path, text, *settings):
    path = tmp_path / "p.yaml"
    path.write_text(text)
    return load_hardware(path, registry, settings)


def test_defaults_and_settings(registry, tmp_path):
    loaded = load(registry, tmp_path, GOOD, "batch=3", "precision=fp32")
    defaults = {f.name: f.default for f in dataclasses.fields(Hardware) if f.default is not dataclasses.MISSING}
    given = {"count": 2, "link_bandwidth_gbs": 400, "batch": 3, "precision": "fp32"}
    assert {name: getattr(loaded, name) for name in defaults} == {**defaults, **given}


def test_several_machines_alike(registry, tmp_path):
    one, three = (load(registry, tmp_path, GOOD + "price_per_hour: 2\n", f"nodes={nodes}") for nodes in (1, 3))
    assert (one.devices, three.devices, three.machine_price_per_hour) == (2, 6, 12)
    assert (one.described, three.described) == ("2 x Some GPU", "3 x 2 x Some GPU")
    with pytest.raises(UserError, match="the profile has 3"):
        load(registry, tmp_path, GOOD, "nodes=3", "count=1", "strategy=single")
    with pytest.raises(UserError, match="shards 4 does not divide 6 devices"):
        load(registry, tmp_path, GOOD, "nodes=3", "strategy={type: fsdp, shards: 4}")


@pytest.mark.parametrize(("change", "line", "words"), [
    (("memory_gb: 80", "memory_bg: 80"), "p.yaml:5:1: memory_bg", "did you mean memory_gb"),
    (("memory_gb: 80", "memory_gb: -1"), "p.yaml:5:12: memory_gb", "from 1e-06 to 1e+09, got -1"),
    (("memory_gb: 80", "memory_gb: a lot"), "p.yaml:5:12: memory_gb", "a number"),
    (("memory_gb: 80\n", ""), "p.yaml:1:1", "memory_gb is missing"),
    (("count: 2", "count: 0"), "p.yaml:4:8: count", "from 1 to 65,536, got 0"),
    (("count: 2", "count: 2.5"), "p.yaml:4:8: count", "whole number"),
    (("device: cuda", "device: cud"), "p.yaml:2:9: device", "did you mean cuda"),
    (("name: two", "name: two\nstrategy: fsdb"), "p.yaml:2:11: strategy", "did you mean fsdp"),
    (("name: two", "name: two\nstrategy: single"), "p.yaml:2:11: strategy", "the profile has 2"),
    (("name: two", "name: two\nutilisation: 1.5"), "p.yaml:2:14: utilisation", "from 1e-06 to 1, got 1.5"),
    (("link_bandwidth_gbs: 400\n", ""), "p.yaml:4:", "2 devices need a link_bandwidth_gbs"),
    (("device: cuda", "device: cpu"), "p.yaml:", "use fp32"),
    (("name: two", "name: two\nname: three"), "p.yaml:2:1: name", "duplicate key"),
])
def test_a_mistake_has_its_place_and_remedy(registry, tmp_path, change, line, words):
    assert change[0] in GOOD
    with pytest.raises(UserError) as error:
        load(registry, tmp_path, GOOD.replace(*change))
    assert line in str(error.value) and words in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_all_mistakes_come_at_once(registry, tmp_path):
    text = GOOD.replace("memory_gb: 80", "memory_gb: -80").replace("device: cuda", "device: abacus")
    with pytest.raises(UserError) as error:
        load(registry, tmp_path, text.replace("count: 2", "cuont: 2") + "strategy: magic\n")
    lines = str(error.value).splitlines()
    assert [line.split(":")[1] for line in lines[:4]] == ["2", "4", "5", "9"]


def test_a_profile_that_is_not_there(registry):
    with pytest.raises(UserError, match="h200"):
        load_hardware("h20", registry)
    with pytest.raises(UserError, match="no such file"):
        load_hardware("nowhere/h200.yaml", registry)
