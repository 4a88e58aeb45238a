"""An installed plugin that is broken, in each of the ways that there are: one line names it and the remedy, and every
other command works."""

from __future__ import annotations

import json
import sys

import pytest

from tests.command_line import call
from tryplicity.cli import _foreign_commands
from tryplicity.plugins import _load

HEAD = "from tryplicity import hookimpl\n"
LAYER = """
@hookimpl
def tryplicity_layers():
    from dataclasses import dataclass
    from tryplicity import Activation
    class Mine(Activation):
        name = "mine"
        {config}
        def forward(self, x, group=None): return x
    return [Mine]
"""
#: what is wrong -> the module, and what the line says
BROKEN = {
    "syntax error": ("def f(:\n", "SyntaxError: invalid syntax (wrong.py, line 1)"),
    "missing dependency": ("import no_such_package\n", "No module named 'no_such_package' (wrong.py, line 1)"),
    "misspelt hook": (HEAD + "@hookimpl\ndef tryplicity_layer(): return []\n", "did you mean tryplicity_layers?"),
    "missing marker": ("def tryplicity_layers(): return []\n", "put @hookimpl above it"),
    "wrong signature": (HEAD + "@hookimpl\ndef tryplicity_step_finished(step, metric): pass\n",
                        "unknown argument(s) metric (there are: run, step, metrics)"),
    "raising hook": (HEAD + "@hookimpl\ndef tryplicity_layers(): raise KeyError('oh')\n",
                     "KeyError: 'oh' (wrong.py, line 3)"),
    "duplicate name": (HEAD + LAYER.format(config="").replace('"mine"', '"silu"'),
                       "activation 'silu' is provided by both plugin tryplicity.layers"),
    "reserved name": (HEAD + LAYER.format(config="").replace('"mine"', '"auto"'),
                      "is called 'auto', which means something else where a component is named; give it another name"),
    "reserved option": (HEAD + LAYER.format(config="@dataclass(frozen=True)\n        class Config:\n"
                                                   "            type: int = 1"),
                        "an option called 'type', which is the key that names the component; give the option another"),
    "options that are no dataclass": (HEAD + LAYER.format(config="class Config: x = 1"),
                                      "Mine.Config must be a dataclass marked @dataclass(frozen=True)"),
    "changing another's component when it is asked": (HEAD + """
@hookimpl
def tryplicity_layers():
    from tryplicity_plugins.layers.activations import SiLU
    SiLU.forward = lambda self, x, group=None: 1 / 0
    return []
""", "it changes a component of another plugin (forward of activation 'silu'"),
    "changing another's component at import": ("""
from tryplicity import hookimpl
from tryplicity_plugins.layers.activations import SiLU
SiLU.forward = lambda self, x, group=None: 1 / 0
@hookimpl
def tryplicity_layers(): return []
""", "it changes a component of another plugin (forward of activation 'silu'"),
    "printing at import": (HEAD + "print('hello')\n" + LAYER.format(config=""),
                           "printed 'hello' while it was loaded; take that out, or print in a hook"),
    "slow import": (HEAD + "import time\ntime.sleep(1.2)\n" + LAYER.format(config=""),
                    "to import, in every command; import what takes long inside its hooks"),
}


@pytest.fixture
def install(tmp_path, monkeypatch):
    """A distribution `wrong 1.2`, as pip would have left it."""

    def install(text: str) -> None:
        (tmp_path / "wrong.py").write_text(text)
        info = tmp_path / "wrong-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: wrong\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text("[tryplicity]\nwrong = wrong\n")
        monkeypatch.syspath_prepend(tmp_path)
        _load.cache_clear()
        _foreign_commands.cache_clear()

    yield install
    sys.modules.pop("wrong", None)
    _load.cache_clear()
    _foreign_commands.cache_clear()


@pytest.mark.parametrize(("text", "said"), BROKEN.values(), ids=BROKEN)
def test_one_line_and_everything_else_works(install, tmp_path, capfd, text, said):
    """What needs components, and goes through one that the plugin may have spoilt."""
    spec = tmp_path / "spec.yaml"
    spec.write_text("name: x\nvocab_size: 300\nhidden_size: 16\ncontext_length: 16\n"
                    "layers: [{mixer: {type: gqa, heads: 2}, feed_forward: {type: gated_mlp, activation: silu}}]\n")
    install(text)
    code, out, err = call(capfd, "build", str(spec), "--hw", "cpu", "--json")
    assert code == 0 and json.loads(out)["name"] == "x"
    (line,) = err.splitlines()
    assert line.startswith("warning: ") and "plugin wrong (wrong 1.2)" in line and said in line, line
    for command in (["plugins", "show", "silu"], ["--help"], ["schema"]):
        code, out, err = call(capfd, *command)
        assert (code, err) == (0, "") and out  # once a process is enough
    code, _, _ = call(capfd, "plugins", "list")
    assert code == (0 if "import" in said or "print" in said else 1)


def test_a_command_that_is_there_already_is_said(install, capfd):
    install(HEAD + "import click\n@click.command('build')\ndef mine(): pass\n"
                   "@hookimpl\ndef tryplicity_commands(): return [mine]\n")
    code, out, err = call(capfd, "--help")
    assert code == 0 and "build" in out
    assert err == ("warning: a plugin brings a command called build, which is there already; it needs another name\n")
