"""What a phase learns from is found, checked and placed by `build`, as every other component of a spec."""

from __future__ import annotations

from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from tryplicity import UserError, load_plugins
from tryplicity.builder import build
from tryplicity.spec import parse_yaml, read_yaml, spec_schema

SMALL = (Path(__file__).parents[1] / "small.yaml").read_text()


@pytest.fixture(scope="module")
def registry():
    return load_plugins().registry


def spec_file(tmp_path, data, kind="pretrain"):
    path = tmp_path / "specs" / "s.yaml"
    path.parent.mkdir(exist_ok=True)
    first = "" if kind == "pretrain" else "  - {kind: pretrain}\n"
    path.write_text(f"{SMALL}\nphases:\n{first}  - kind: {kind}\n    data: {data}\n")
    return path


@pytest.mark.parametrize(("data", "said"), [
    ("pyton-docs", "no such file or folder, and no source of that name (did you mean python-docs?)"),
    ("no/such/folder", "no such file or folder"), ("'files:'", "path is missing; write files:PATH"),
    ("{type: filez, path: x}", "no source is called 'filez' (did you mean files?)"),
    ("{type: files, pth: x}", "unknown key (did you mean path?)"), ("{path: x}", "type is missing"),
    ("{type: huggingface, dataset: x, limit: 0}", "limit: expected a whole number"),
    ("'{type: files, path: [}'", "not a YAML mapping"), ("3", "expected text or a mapping or null"),
])
def test_a_source_that_there_is_none_of_is_refused_at_its_place(tmp_path, registry, data, said):
    path = spec_file(tmp_path, data)
    number = len(path.read_text().splitlines())
    with pytest.raises(UserError) as caught:
        build(str(path), "cpu", registry)
    lines = str(caught.value).splitlines()
    assert all(line.startswith(f"{path}:{number}:") and "phases[0].data" in line for line in lines)
    assert any(said in line for line in lines), lines


def test_a_chat_phase_needs_conversations(tmp_path, registry):
    with pytest.raises(UserError, match=r"phases\[1\]\.data: python-docs holds documents, not conversations"):
        build(str(spec_file(tmp_path, "python-docs", "chat")), "cpu", registry)
    built = build(str(spec_file(tmp_path, "python-docs-chat", "chat")), "cpu", registry)
    assert built.data[1].name == "python-docs-chat" and set(built.data) == {1}


@pytest.mark.parametrize("data", ["../texts", "{type: files, path: ../texts}", "'files:../texts'",
                                  "'{type: files, path: ../texts}'"])
def test_a_path_counts_from_the_spec_wherever_one_stands(tmp_path, registry, monkeypatch, data):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("text")
    path = spec_file(tmp_path, data)
    for where in (tmp_path, tmp_path / "specs", Path("/")):
        monkeypatch.chdir(where)
        built = build(str(path), "cpu", registry)
        assert Path(built.data[0].config.path).resolve() == tmp_path / "texts"
        # the copy that a run folder holds means the same from there
        copy = tmp_path / "run" / "spec.yaml"
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(built.spec.as_yaml())
        again = build(str(copy), "cpu", registry)
        assert again.data == built.data


def test_it_is_in_the_schema(registry, tmp_path):
    schema = Draft202012Validator(spec_schema(registry))
    for data, right in [("python-docs", True), ("{type: files, path: x}", True), ("null", True),
                        ("{type: filez, path: x}", False), ("{type: files, pth: x}", False), ("3", False)]:
        assert schema.is_valid(read_yaml(spec_file(tmp_path, data)).data) == right, data


def test_an_unread_phase_of_a_finished_model_is_no_mistake(tmp_path, registry):
    """Whoever only writes with a model needs none of the data it learned from."""
    from tryplicity.spec import load_spec

    assert load_spec(parse_yaml(spec_file(tmp_path, "no/such/folder").read_text(), "s"), registry).phases[0].data
