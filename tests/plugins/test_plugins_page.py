"""docs/plugins.md: every example is a plugin whose components keep their promises; every promise is explained."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest

from tests.test_docs import anchors
from tryplicity.components import FAMILIES
from tryplicity.plugins import load_plugins
from tryplicity.scaffold import KINDS
from tryplicity.testing import check, families, layers, model, training  # noqa: F401 - each adds its promises
from tryplicity.testing.promises import PAGE, PROMISES

TEXT = (Path(__file__).parents[2] / PAGE).read_text(encoding="utf-8")
EXAMPLES = [code for code in re.findall(r"^```python\n(.*?)^```", TEXT, re.M | re.S) if "@hookimpl" in code]


@pytest.fixture
def loaded(tmp_path):
    def load(code: str):
        file = tmp_path / "example.py"
        file.write_text(code)
        plugins = load_plugins((str(file),))
        assert not plugins.registry.failures
        return plugins, (str(file),)

    return load


@pytest.mark.parametrize("code", EXAMPLES, ids=lambda code: re.search(r"(class|def) (\w+)", code)[2])
def test_every_example_keeps_its_promises(loaded, code):
    plugins, files = loaded(code)
    (own,) = [plugin for plugin in plugins.found if plugin.name == "example"]
    assert own.provides
    for component in plugins.registry.components():
        if plugins.registry.owner(component.family, component.name) == str(own):
            assert check(component, plugins=files) == []


def test_every_family_has_an_example():
    shown = {family for code in EXAMPLES for family in FAMILIES if re.search(
        rf"class \w+\({FAMILIES[family].__name__}\)", code)}
    elsewhere = {"linear", "inhibition"} | set(KINDS)  # plugins/affine_plugin.py; those that `plugins new` writes
    assert set(FAMILIES) - shown - elsewhere <= {"architecture"}


def test_the_command_and_the_route_answer(loaded):
    from click.testing import CliRunner

    plugins, _ = loaded(next(code for code in EXAMPLES if "tryplicity_server_routes" in code))
    ((command,),) = [found for found in plugins.call("tryplicity_commands") if found[0].name == "greet"]
    assert CliRunner().invoke(command, ["you"]).output == "hello you\n"
    routes = {}

    class App:
        def add_route(self, handler, path):
            routes[path] = handler

    plugins.call("tryplicity_server_routes", app=App())
    assert asyncio.run(routes["/my/ready"](None)).body == b"ready"


def test_every_promise_is_explained():
    missing = {promise.read for promise in PROMISES} | {"trials", "a-plugin-that-is-broken"}
    assert missing <= anchors(TEXT)


def test_every_kind_that_can_be_written_is_named():
    for kind in KINDS:
        assert kind in TEXT
