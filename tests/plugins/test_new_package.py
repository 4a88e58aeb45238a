"""What `tryplicity plugins new` writes keeps every promise at once, and what `plugins check` says of it."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command_line import call
from tryplicity import UserError
from tryplicity.plugins import _load, load_plugins
from tryplicity.scaffold import KINDS
from tryplicity.testing import check


@pytest.fixture
def package(tmp_path, monkeypatch, capfd):
    """Writes a package of a kind, where Python finds it as if it were installed."""
    made = []

    def write(kind: str, name: str) -> Path:
        folder = tmp_path / name
        code, out, _ = call(capfd, "plugins", "new", name, "--kind", kind, "--out", str(folder))
        assert code == 0 and f"next: pip install -e '{folder}[test]'" in out
        module = name.replace("-", "_")
        info = folder / f"{module}-0.1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1.0\n")
        (info / "entry_points.txt").write_text(f"[tryplicity]\n{name} = {module}\n")
        monkeypatch.syspath_prepend(folder)
        importlib.invalidate_caches()
        _load.cache_clear()
        made.append(module)
        return folder

    yield write
    for module in [m for m in sys.modules if m.partition(".")[0] in made]:
        del sys.modules[module]
    _load.cache_clear()


@pytest.mark.parametrize("kind", KINDS)
def test_it_works_at_once(package, kind):
    name = f"first-{kind.replace('_', '-')}"
    folder = package(kind, name)
    plugins = load_plugins()
    module = name.replace("-", "_")
    assert not plugins.registry.failures
    component = plugins.registry.get(kind, module)
    assert plugins.registry.owner(kind, module) == f"plugin {name} ({name} 0.1.0)"
    assert check(component) == []
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.*") if "dist-info" not in str(p)
                  and p.suffix != ".pyc") == [
        "README.md", f"{module}/__init__.py", f"{module}/component.py", "pyproject.toml", f"tests/test_{module}.py"]
    assert "$package" not in "".join(p.read_text() for p in folder.rglob("*.*") if p.suffix in (".py", ".md", ".toml"))
    assert subprocess.run([sys.executable, "-m", "ruff", "check", "-q", "--isolated", "--select", "E,F,W",
                           "--line-length", "120", folder]).returncode == 0


def test_it_is_found_by_its_entry_point_and_checked_from_outside(package, capfd):
    package("feed_forward", "my-gate")
    code, out, _ = call(capfd, "plugins", "check", "my-gate", "--no-ranks")
    lines = out.splitlines()
    assert code == 0 and lines[-1].startswith("my-gate: ") and ", 0 broken, " in lines[-1]
    assert any(line.startswith("feed_forward my_gate") and "kept" in line and "No token sees a later one" in line
               for line in lines)


def test_a_file_is_checked_and_what_is_broken_ends_it_with_1(capfd, tmp_path):
    file = tmp_path / "wrong.py"
    text = (Path(__file__).with_name("example_plugin.py")).read_text()
    file.write_text(text.replace("return self.out(x_BTD + self", "return self.out(x_BTD.flip(1) + self"))
    code, out, _ = call(capfd, "plugins", "check", str(file), "--no-ranks", "--json")
    said = json.loads(out)
    assert code == 1 and said["broken"] > 0
    (leak,) = [one for one in said["findings"] if one["promise"] == "No token sees a later one"]
    assert leak["verdict"] == "broken" and "leaks the future" in leak["why"] and leak["component"] == "mixer shift"
    assert leak["read"] == "docs/plugins.md#one-forward-for-any-length"
    code, out, _ = call(capfd, "plugins", "check", str(file), "--no-ranks")
    assert code == 1 and "(docs/plugins.md#one-forward-for-any-length)" in out


def test_a_file_that_cannot_be_loaded_is_broken(capfd, tmp_path):
    file = tmp_path / "worse.py"
    file.write_text("import no_such_package\n")
    code, out, _ = call(capfd, "plugins", "check", str(file), "--no-ranks")
    assert code == 1 and "worse: ModuleNotFoundError: No module named 'no_such_package'" in out


@pytest.mark.parametrize(("line", "said"), [
    (["check", "no-such-package"], "neither a plugin's file nor an installed plugin"),
    (["check", "none.py"], "there is no such file"), (["new", "1x", "--kind", "mixer"], "is no name for a package"),
    (["new", "class", "--kind", "mixer"], "is no name for a package"),
    (["new", "x", "--kind", "mixer", "--out", "."], "is there already")])
def test_what_cannot_be_is_one_line(capfd, tmp_path, monkeypatch, line, said):
    (tmp_path / "here.txt").write_text("x")
    monkeypatch.chdir(tmp_path)
    code, _, err = call(capfd, "plugins", *line)
    assert code == 2 and said in err and len(err.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["here.txt"]


def test_trials_that_cannot_be_are_said(capfd, tmp_path):
    file = tmp_path / "wide.py"
    text = (Path(__file__).with_name("example_plugin.py")).read_text()
    file.write_text(text.replace('name = "shift"', 'name = "shift"\n    trials = ({"share": 2},)'))
    code, out, _ = call(capfd, "plugins", "check", str(file), "--no-ranks")
    assert code == 1 and "`trials` of Shift" in out and "expected a number from 0 to 1" in out


def test_pytest_finds_the_fixture_by_itself(tmp_path):
    """And what it says of a component that breaks its promises is a line for each, without a traceback."""
    test = tmp_path / "test_mine.py"
    test.write_text("from tryplicity_plugins.layers.norms import LayerNorm\n"
                    "class Wrong(LayerNorm):\n    name = 'wrong'\n    def forward(self, x): return x.flip(1)\n"
                    "def test_right(conforms): conforms(LayerNorm)\n"
                    "def test_wrong(conforms): conforms(Wrong)\n")
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test, "--rootdir", tmp_path],
                          capture_output=True, text=True, cwd=tmp_path)
    assert "1 failed, 1 passed" in done.stdout, done.stdout
    assert "norm wrong (test_mine.Wrong) breaks " in done.stdout and "it leaks the future" in done.stdout
    assert "Traceback" not in done.stdout and "raise Broken" not in done.stdout


def test_the_folder_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    from tryplicity import scaffold

    shutil.copytree(scaffold.HERE, tmp_path / "parts")
    (tmp_path / "parts" / "test.txt").unlink()  # the last that is read
    monkeypatch.setattr(scaffold, "HERE", tmp_path / "parts")
    (tmp_path / "here").mkdir()
    with pytest.raises(FileNotFoundError):
        scaffold.new_package("mine-of-my-own", "mixer", tmp_path / "here" / "new")
    assert not list((tmp_path / "here").iterdir())
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError, match="you are in it; --out names another folder"):
        scaffold.new_package("mine-of-my-own", "mixer", Path("."))


@pytest.mark.parametrize("name", ["torch", "tryplicity", "Ünïcode", "bad name!", "../elsewhere", "a--b", "class", ""])
def test_a_name_that_cannot_be_or_is_taken_is_refused_and_nothing_written(name, tmp_path):
    from tryplicity.scaffold import new_package

    with pytest.raises(UserError, match=r"no name for a package|that is installed"):
        new_package(name, "mixer", tmp_path / "new")
    assert not list(tmp_path.iterdir())
