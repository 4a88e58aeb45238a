"""Plugins given as files: what stands beside them, and runs that remember them."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import sys
from pathlib import Path

import pytest

from tryplicity import UserError, load_plugins
from tryplicity.cli import main
from tryplicity.plugins import _load, remembered
from tryplicity.run import Run

SMALL = Path(__file__).parents[1] / "small.yaml"
SHIFT = """\
from dataclasses import dataclass
from tryplicity import Mixer, hookimpl

class Shift(Mixer):
    name = "shift_of_a_file"
    def __init__(self, config, site): super().__init__()
    def forward(self, x_BTD, *, state=None, doc_ids=None): return GAIN * x_BTD

@hookimpl
def tryplicity_layers(): return [Shift]
"""


def call(capfd, *arguments):
    code = 0
    _load.cache_clear()  # as a new process has it
    try:
        main(list(map(str, arguments)))
    except SystemExit as end:
        code = end.code or 0
    out, err = capfd.readouterr()
    assert "Traceback" not in err
    return code, out, err


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Paths and modules as they were before."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith(("tryplicity_plugin_", "gains_", "deep_")):
            del sys.modules[name]
    _load.cache_clear()


# --- neighbours ---

def test_a_plugin_imports_what_stands_beside_it(tmp_path):
    (tmp_path / "gains_beside.py").write_text("GAIN = 2.0\n")
    (tmp_path / "deep_package").mkdir()
    (tmp_path / "deep_package" / "__init__.py").write_text("")
    (tmp_path / "deep_package" / "more.py").write_text("GAIN = 3.0\n")
    (tmp_path / "first.py").write_text("from gains_beside import GAIN\n" + SHIFT)
    (tmp_path / "later.py").write_text(SHIFT.replace("shift_of_a_file", "another").replace(
        "def tryplicity_layers(): return [Shift]",
        "def tryplicity_layers():\n    from deep_package.more import GAIN\n    Shift.gain = GAIN\n    return [Shift]"))
    plugins = load_plugins((str(tmp_path / "first.py"), str(tmp_path / "later.py")))
    assert not plugins.registry.failures
    assert plugins.registry.get("mixer", "another").gain == 3.0


@pytest.mark.parametrize("name", ["json", "click", "gains_twice"])
def test_a_neighbour_that_another_module_would_stand_for_is_refused(tmp_path, name):
    """Python would silently take the one of its own library, of an installed package, of another plugin's folder."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{name}.py").write_text("GAIN = 2.0\n")
        text = f"import {name}\nGAIN = 1.0\n" + SHIFT.replace("shift_of_a_file", f"of_{folder}")
        (tmp_path / folder / f"of_{folder}.py").write_text(text)
    plugins = load_plugins(tuple(str(tmp_path / folder / f"of_{folder}.py") for folder in ("a", "b")))
    failures = plugins.registry.failures
    assert len(failures) == (1 if name == "gains_twice" else 2)
    assert f"it imports {name}, and Python takes" in failures[-1]
    assert f"not {tmp_path / 'b' / name}.py; rename the latter" in failures[-1]
    assert plugins.registry.names("mixer").count("of_a") == (name == "gains_twice")


# --- runs ---

@pytest.fixture
def trained(tmp_path, corpus, capfd, monkeypatch):
    """A run of a spec with a mixer from a file."""
    monkeypatch.setenv("TRYPLICITY_CACHE", str(tmp_path / "cache"))
    plugin = tmp_path / "shift.py"
    plugin.write_text("GAIN = 1.0\n" + SHIFT)
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    line = ["train", SMALL, "--hw", "cpu", "--set", "layers=[{mixer: shift_of_a_file, feed_forward: gated_mlp}]",
            "--set", "linear=bitlinear",
            "--data", corpus, "--run", run]
    code, _, err = call(capfd, *line, "--plugin", "shift.py", "--steps", "1")
    assert code == 0, err
    return run, plugin, line


def test_a_run_loads_the_plugins_it_was_made_with(trained, capfd, tmp_path):
    run, plugin, line = trained
    assert json.loads((run / "plugins.json").read_text()) == [
        {"file": str(plugin), "sha256": hashlib.sha256(plugin.read_bytes()).hexdigest()}]
    assert call(capfd, "generate", run, "the model", "--max-tokens", 2)[0] == 0
    assert call(capfd, "export", run, "--out", tmp_path / "m.safetensors")[0] == 0
    assert call(capfd, "brain", run)[0] == 0
    folder = run / "checkpoints" / "step-1"
    assert json.loads((folder / "plugins.json").read_text()) == {
        "shift.py": "a file", "tryplicity": importlib.metadata.version("tryplicity")}
    # as a package would have left it, whose layer a file provides now
    (folder / "plugins.json").write_text('{"my-layers": "1.2", "tryplicity": "0.0.1"}')
    complete = json.loads((folder / "complete.json").read_text())
    complete["plugins.json"] = hashlib.sha256((folder / "plugins.json").read_bytes()).hexdigest()
    (folder / "complete.json").write_text(json.dumps(complete))
    code, _, err = call(capfd, *line, "--steps", 2, "--resume")
    assert code == 0, err
    assert "step-1 was saved with my-layers 1.2 (pip install my-layers==1.2), and here is none\n" in err
    code, _, err = call(capfd, *line, "--steps", 3, "--resume")
    assert code == 0 and "was saved with" not in err


def test_what_is_gone_or_changed_is_said_and_not_run(trained, capfd, tmp_path):
    run, plugin, _ = trained
    text = plugin.read_text()
    plugin.write_text(text + f"\nopen({str(tmp_path / 'ran')!r}, 'w')\n")
    code, _, err = call(capfd, "generate", run, "the", "--max-tokens", 2)
    assert code == 2 and f"warning: the plugin {plugin} has changed since this run was made; --plugin" in err
    assert "no mixer is called 'shift_of_a_file'" in err and not (tmp_path / "ran").exists()
    code, _, err = call(capfd, "generate", run, "the", "--max-tokens", 2, "--plugin", plugin)
    assert code == 0 and "is not as it was when this run was made" in err and (tmp_path / "ran").exists()
    plugin.rename(tmp_path / "elsewhere.py")
    code, _, err = call(capfd, "generate", run, "the", "--max-tokens", 2)
    assert code == 2 and f"the plugin {plugin}, which is gone; --plugin says where it is" in err
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved" / "shift.py").write_text(text)
    code, _, err = call(capfd, "generate", run, "the", "--max-tokens", 2, "--plugin", tmp_path / "moved" / "shift.py")
    assert (code, err) == (0, "")


def test_a_folder_that_somebody_sent_brings_no_code(tmp_path):
    run = Run(tmp_path / "sent")
    run.folder.mkdir()
    inside = run.folder / "evil.py"
    inside.write_text("raise SystemExit('ran')")
    digest = hashlib.sha256(inside.read_bytes()).hexdigest()
    for file in ("evil.py", "./sent/evil.py", str(inside), str(run.folder / ".." / "sent" / "evil.py")):
        run.plugins.write_text(json.dumps([{"file": file, "sha256": digest}]))
        assert remembered(run.folder) == ()


@pytest.mark.parametrize("text", ["{", "[1]", "[{}]", "{}", '[{"file": 3, "sha256": ""}]', "[" * 100_000])
def test_a_list_of_plugins_that_is_none(tmp_path, text):
    (tmp_path / "plugins.json").write_text(text)
    if text == "{}":
        assert remembered(tmp_path) == ()
        return
    with pytest.raises(UserError, match=r"plugins\.json: not a list of plugin files"):
        remembered(tmp_path)
