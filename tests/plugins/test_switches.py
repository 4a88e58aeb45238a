"""Plugins left out by name, hooks traced, and what a model was made with."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.command_line import call
from tryplicity import UserError
from tryplicity.plugins import _load, load_plugins
from tryplicity.spec import load_spec, parse_yaml
from tryplicity.spec.made_with import MADE_WITH

EXAMPLE = str(Path(__file__).with_name("example_plugin.py"))
SPEC = {"name": "x", "vocab_size": 300, "hidden_size": 8, "context_length": 8, "layers": [{"mixer": "shift"}]}


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch):
    """The switches are told to the processes that a command starts, so they stay in the environment."""
    monkeypatch.setenv("TRYPLICITY_DISABLE_PLUGINS", "")
    monkeypatch.setenv("TRYPLICITY_TRACE_PLUGINS", "")
    yield
    _load.cache_clear()


def test_a_plugin_is_left_out_by_name_and_that_is_no_fault(capfd):
    code, out, err = call(capfd, "plugins", "list", "--json", "--plugin", EXAMPLE, "--without-plugin",
                          "example_plugin", "--without-plugin", "tryplicity.logging")
    found = {plugin["name"]: plugin for plugin in json.loads(out)["plugins"]}
    assert (code, err) == (0, "")
    assert "disabled by --without-plugin" in found["example_plugin"]["cause"]
    assert found["tryplicity.logging"]["disabled"] and not found["tryplicity.logging"]["provides"]
    assert found["tryplicity.layers"]["cause"] is None


def test_the_environment_says_it_too_and_a_spec_is_told_why(monkeypatch):
    monkeypatch.setenv("TRYPLICITY_DISABLE_PLUGINS", "other, example_plugin")
    with pytest.raises(UserError, match=r"no mixer is called 'shift'.*not loaded: plugin example_plugin .*disabled by"):
        load_spec(parse_yaml(json.dumps(SPEC), "s.yaml"), load_plugins((EXAMPLE,)).registry)


def test_a_whole_distribution_is_left_out_by_its_name(monkeypatch):
    monkeypatch.setenv("TRYPLICITY_DISABLE_PLUGINS", "tryplicity")
    assert not list(load_plugins().registry.components())


def test_a_name_that_is_none_is_said(capfd):
    code, _, err = call(capfd, "plugins", "list", "--without-plugin", "tryplicity.login")
    assert code == 0 and "no plugin is called tryplicity.login, so none is left out (did you mean" in err


def test_the_list_says_families_and_hooks(capfd, tmp_path):
    file = tmp_path / "hooked.py"
    file.write_text("from tryplicity import hookimpl\n@hookimpl\ndef tryplicity_run_started(run): pass\n")
    code, out, _ = call(capfd, "plugins", "list", "--json", "--plugin", EXAMPLE, "--plugin", str(file))
    found = {plugin["name"]: plugin for plugin in json.loads(out)["plugins"]}
    assert code == 0 and found["hooked"]["hooks"] == ["tryplicity_run_started"]
    assert found["example_plugin"]["families"] == {"mixer": ["shift"]} and found["example_plugin"]["version"] is None
    assert found["tryplicity.layers"]["version"]
    code, page, _ = call(capfd, "plugins", "list", "--plugin", EXAMPLE, "--plugin", str(file))
    assert "mixer: shift" in page and re.search(r"hooks:\s+tryplicity_run_started", page)


@pytest.mark.parametrize("before", [True, False])
def test_every_call_of_a_hook_is_traced_with_its_time(capfd, before):
    line = ["--trace-plugins", "schema"] if before else ["schema", "--trace-plugins"]
    _load.cache_clear()
    code, out, err = call(capfd, *line)
    assert code == 0 and json.loads(out)
    for what in ("import", "tryplicity_layers"):
        assert re.search(rf"^trace: plugin tryplicity\.layers: {what} took [\d.]+ ms$", err, re.M)


def test_hooks_of_a_run_are_traced(capfd, tmp_path, monkeypatch):
    file = tmp_path / "late.py"
    file.write_text("from tryplicity import hookimpl\n@hookimpl\ndef tryplicity_run_started(run): raise OSError\n")
    monkeypatch.setenv("TRYPLICITY_TRACE_PLUGINS", "1")
    load_plugins((str(file),)).call("tryplicity_run_started", run=tmp_path, spec=None, model=None)
    assert re.search(r"trace: plugin late: tryplicity_run_started took [\d.]+ ms", capfd.readouterr().err)


# --- what a model was made with ---

def test_a_spec_that_the_program_writes_says_what_its_components_came_with():
    spec = load_spec(parse_yaml(json.dumps(SPEC), "s.yaml"), load_plugins((EXAMPLE,)).registry)
    from importlib.metadata import version

    written = parse_yaml(spec.as_yaml(), "written").data
    assert written[MADE_WITH] == {"example_plugin.py": "a file", "tryplicity": version("tryplicity")}
    again = load_spec(parse_yaml(spec.as_yaml(), "written"), load_plugins((EXAMPLE,)).registry)
    assert again == spec and again.identity() == spec.identity()


@pytest.mark.parametrize(("recorded", "said"), [
    ({"example_plugin.py": "a file", "tryplicity": "0.1.0"},
     "this model was made with the plugin file example_plugin.py (--plugin says where it is), which is not here"),
    ({"my-layers": "1.2", "tryplicity": "0.1.0"},
     "this model was made with my-layers 1.2 (pip install my-layers==1.2), which is not here")])
def test_without_one_of_them_it_is_said_which(recorded, said):
    text = json.dumps({**SPEC, MADE_WITH: recorded})
    with pytest.raises(UserError) as caught:
        load_spec(parse_yaml(text, "s.yaml"), load_plugins().registry)
    (line,) = str(caught.value).splitlines()
    assert "no mixer is called 'shift'" in line and line.endswith(said)
