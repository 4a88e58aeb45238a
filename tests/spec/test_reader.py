"""One reader and one writer of YAML, which a few bytes cannot hang, and which take a file however it comes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tryplicity import UserError, load_plugins
from tryplicity.data import parse_source
from tryplicity.hardware import load_hardware
from tryplicity.server.app import searcher_loader
from tryplicity.spec import dump_yaml, find_file, load_spec, parse_value, parse_yaml, read_yaml

ROOT = Path(__file__).parents[2]
SMALLEST = "name: smallest\nvocab_size: 300\nhidden_size: 8\ncontext_length: 16\nlayers: [{mixer: memory}]\n"


# --- what a few bytes stand for counts ---

def nested(line: str) -> str:
    """Nine mappings, each merging the one before it nine times."""
    return "a0: &a0 {" + line + "}\n" + "".join(
        f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 10))


@pytest.mark.parametrize("text", [nested("x: 1"), nested("")], ids=["merged pairs", "merged nothing"])
def test_what_merge_keys_and_aliases_stand_for_is_counted(text, tmp_path):
    assert len(text) < 800
    with pytest.raises(UserError, match=r"x.yaml:\d+:\d+: .*more than 100000 values"):
        parse_yaml(text, "x.yaml")
    (tmp_path / "spec.yaml").write_text(text)
    with pytest.raises(UserError, match="more than 100000 values"):
        read_yaml(tmp_path / "spec.yaml")
    with pytest.raises(UserError, match="more than 100000 values"):
        parse_value("{" + text.strip().replace("\n", ", ") + "}", "--data")


def test_in_the_metadata_of_an_exported_file_too(tmp_path):
    import torch
    from safetensors.torch import save_file

    from tryplicity.inference import packed

    save_file({"x": torch.zeros(1)}, tmp_path / "m.safetensors",
              {"format": packed.FORMAT, "spec": nested("x: 1"), "tokenizer": ""})
    with pytest.raises(UserError, match="more than 100000 values"):
        packed.load_model(tmp_path / "m.safetensors", load_plugins().registry)


def test_merge_keys_within_reason_still_merge():
    text = "base: &b {x: 1, y: 2}\nmore: &m {<<: *b, y: 3}\nall: {<<: [*m, *b], z: 4}\n"
    assert parse_yaml(text, "f").data["all"] == {"x": 1, "y": 3, "z": 4}


def test_a_file_without_end_is_not_read_to_its_end():
    with pytest.raises(UserError, match=r"/dev/zero: more than 16 MB"):
        read_yaml("/dev/zero")


# --- the same values wherever YAML is read or written ---

@pytest.mark.parametrize("name", ["1e3", "no", "null", "~", "0x10", "12:30", "true", "TRUE", "2026-01-01", "ünï ✓",
                                  "a: b", "#1", "- x", "a\u2028b", "", "'", '"'])
def test_a_name_comes_back_as_it_was(name, tmp_path, registry):
    assert parse_yaml(dump_yaml({"name": name, name: 1}), "f").data == {"name": name, **{name: 1}}
    assert parse_value(dump_yaml({"x": [name]}), "f") == {"x": [name]}


def test_a_profile_in_a_run_folder_comes_back_as_it_was(tmp_path):
    """Its name is text that YAML 1.1 takes for a number, a boolean, a time."""
    from dataclasses import asdict

    registry = load_plugins().registry
    for name in ("1e3", "no", "12:30"):
        profile = load_hardware("cpu", registry, [f"name='{name}'"])
        (tmp_path / "hardware.yaml").write_text(dump_yaml(asdict(profile)))
        assert load_hardware(tmp_path / "hardware.yaml", registry) == profile and profile.name == name


def test_options_are_read_as_specs_are():
    registry = load_plugins().registry
    assert parse_source(registry, "{type: files, path: no}").config.path == "no"
    assert parse_source(registry, "{type: files, path: 1:30}").config.path == "1:30"
    with pytest.raises(UserError, match="duplicate key"):
        parse_source(registry, "{type: files, path: a, path: b}")
    with pytest.raises(UserError, match="duplicate key"):
        searcher_loader("{type: searxng, url: 'http://a', url: 'http://b'}", load_plugins())()


def test_nothing_else_reads_or_writes_yaml():
    for folder in ("tryplicity", "plugins"):
        for path in (ROOT / folder).rglob("*.py"):
            if path.relative_to(ROOT).as_posix() != "tryplicity/spec/loader.py":
                assert not re.search(r"^\s*(import|from) yaml\b", path.read_text("utf-8"), re.MULTILINE), path


@pytest.mark.parametrize("text", ["true", "True", "TRUE"])
def test_true_however_it_is_written(text):
    assert parse_value(text, "f") is True
    assert parse_value({"true": "false", "True": "False", "TRUE": "FALSE"}[text], "f") is False
    assert parse_value({"true": "null", "True": "Null", "TRUE": "NULL"}[text], "f") is None


# --- however a file comes ---

def test_a_pipe_is_read_once(tmp_path, registry):
    pipe = tmp_path / "spec.pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=(SMALLEST,))
    writer.start()
    assert load_spec(str(find_file(str(pipe), "spec")), registry).name == "smallest"
    writer.join(10)
    assert not writer.is_alive()


def test_standard_input_is_a_profile():
    command = [sys.executable, "-m", "tryplicity.cli", "build", "tests/small.yaml", "--hw", "/dev/stdin"]
    done = subprocess.run(command, input=(ROOT / "hardware" / "cpu.yaml").read_bytes(), capture_output=True, cwd=ROOT,
                          timeout=120)
    assert done.returncode == 0 and b"fits: single" in done.stdout, done.stderr


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_other_encodings_are_named(encoding, tmp_path):
    (tmp_path / "s.yaml").write_bytes(SMALLEST.encode(encoding))
    with pytest.raises(UserError, match=r"s\.yaml:1:1: this is UTF-16 or UTF-32 text; save it as UTF-8"):
        read_yaml(tmp_path / "s.yaml")


def test_a_key_that_is_nobodys_may_hold_anchors(registry, tmp_path):
    text = "x-sizes:\n  small: &small {type: memory, state_size: 3}\n" + SMALLEST.replace("{mixer: memory}",
                                                                                          "{mixer: *small}")
    spec = load_spec(parse_yaml(text, "s.yaml"), registry)
    assert spec.layers[0].mixer.config.state_size == 3
    assert load_spec(parse_yaml(spec.as_yaml(), "again"), registry) == spec
    with pytest.raises(UserError, match="unknown key"):  # only at the top
        load_spec(parse_yaml(text.replace("mixer: *small", "mixer: *small, x-a: 1"), "s.yaml"), registry)
    (tmp_path / "p.yaml").write_text("x-note: mine\n" + (ROOT / "hardware" / "cpu.yaml").read_text())
    assert load_hardware(tmp_path / "p.yaml", load_plugins().registry).name == "cpu"


def test_a_spec_given_as_profile_and_a_profile_as_spec(tmp_path):
    registry = load_plugins().registry
    for name, kind in (("cpu", "hardware"), ("tiny", "specs")):
        (tmp_path / f"{name}.yaml").write_text((ROOT / kind / f"{name}.yaml").read_text())
    with pytest.raises(UserError, match=r"cpu\.yaml: this is a hardware profile, and a spec is wanted here; .*--hw"):
        load_spec(str(tmp_path / "cpu.yaml"), registry)
    with pytest.raises(UserError, match=r"tiny\.yaml: this is a spec, and a hardware profile is wanted here"):
        load_hardware(tmp_path / "tiny.yaml", registry)
    with pytest.raises(UserError, match="full: this is a spec"):
        load_hardware("full", registry)
    with pytest.raises(UserError, match="h200: this is a hardware profile"):
        load_spec("h200", registry)


# --- --set ---

ALIASES = """\
name: x
vocab_size: 300
hidden_size: 8
context_length: 16
blocks:
  a: {mixer: &m {type: memory, state_size: 3}}
  b: {mixer: *m}
  c: {mixer: {<<: *m, decay: 0.5}}
layers: [a, b, c]
"""


@pytest.mark.parametrize(("settings", "kept"), [
    (["blocks.a.mixer.state_size=9"], "blocks.b.mixer.state_size, blocks.c.mixer.state_size keep their value"),
    (["blocks.b.mixer.state_size=9"], "blocks.a.mixer.state_size, blocks.c.mixer.state_size keep their value"),
    (["blocks.b.mixer=memory"], "blocks.a.mixer keeps its value"),
    (["blocks.a.mixer.state_size=9", "blocks.b.mixer.state_size=9", "blocks.c.mixer.state_size=9"], None),
    (["blocks.c.mixer.decay=0.4"], None), (["hidden_size=16"], None),
])
def test_a_copy_that_stays_as_it_was_is_named(settings, kept, registry, capsys):
    spec = load_spec(parse_yaml(ALIASES, "s.yaml"), registry, settings)
    said = capsys.readouterr().err
    assert (f"note: --set {settings[0]}: {kept}: an alias is a copy" in said) if kept else said == ""
    if kept and "state_size" in kept:
        sizes = [block.mixer.config.state_size for block in spec.layers]
        assert sorted(sizes) == [3, 3, 9]


def test_a_setting_does_not_invent_a_block(registry):
    with pytest.raises(UserError, match=r"--set blocks\.z\.mixer\.heads=8: there is no blocks\.z"):
        load_spec(parse_yaml(ALIASES, "s.yaml"), registry, ["blocks.z.mixer.heads=8"])
    spec = load_spec(parse_yaml(ALIASES, "s.yaml"), registry, ["blocks.z={mixer: memory}", "layers=[z]"])
    assert len(spec.layers) == 1  # a whole one is meant
