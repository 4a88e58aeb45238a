"""What the README says is so."""

import re
import shlex
from pathlib import Path

import click
import pytest

from tryplicity.cli import main
from tryplicity.errors import UserError
from tryplicity.spec import load_spec, parse_yaml

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
SPEC = re.search(r"```yaml\n(.*?)```", README, re.S).group(1)


def test_its_spec_is_right_and_comes_out_as_expected(registry, tmp_path):
    from tryplicity.builder import build

    (tmp_path / "my.yaml").write_text(SPEC)
    assert build(str(tmp_path / "my.yaml"), "cpu", registry).plan.fits  # `expect` is checked on the way


def test_its_error_messages_are_what_is_printed(registry):
    wrong = SPEC.replace("head_dim: 32}", "head_dim: 33}").replace("activation: spike", "activation: spik")
    with pytest.raises(UserError) as error:
        load_spec(parse_yaml(wrong, "my.yaml"), registry)
    shown = re.findall(r"    error: (my\.yaml.*)", README)
    assert shown == str(error.value).splitlines() and len(shown) == 2


LINES = re.findall(r"^    (?:\$ )?(tryplicity [a-z].*)$", README, re.M)
COMMANDS = sorted({line.split("#")[0].strip() for line in LINES})


@pytest.mark.parametrize("command", COMMANDS)
def test_its_commands_exist_with_these_options(command):
    words = shlex.split(command.split(" > ")[0])[1:]
    group = main
    while isinstance(group, click.Group):
        group = group.commands[words.pop(0)]
    context = group.make_context("tryplicity", words, resilient_parsing=False)
    assert context.params


def test_its_first_plugin_is_the_tested_one():
    example = (Path(__file__).parent / "plugins" / "example_plugin.py").read_text(encoding="utf-8")
    shown = re.search(r"```python\n(.*?)```", README, re.S).group(1)
    _, _, code = example.partition("from __future__ import annotations\n\n")
    assert shown.strip() == code.strip()


def test_every_make_target_it_names_exists():
    makefile = (Path(__file__).parent.parent / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"^    make (\w+)", README, re.M)):
        assert re.search(rf"^{target}:", makefile, re.M), target
