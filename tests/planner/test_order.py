"""Which strategy `auto` tries first is said by the strategies; the core names none."""

import ast
from pathlib import Path

import pytest
from planning_tools import DENSE, GPUS

from tryplicity import load_plugins
from tryplicity.model import assemble
from tryplicity.planner import plan
from tryplicity.spec import load_spec, parse_yaml

CORE = Path(__file__).parents[2] / "tryplicity"
PLUGIN = '''
from tryplicity import MemoryPlan, Parallelism, hookimpl


class Thrifty(Parallelism):
    """Needs a byte."""

    name = "thrifty"
    {order}

    def __init__(self, config):
        self.config = config

    def memory(self, facts, hardware):
        return MemoryPlan({{"weights": 1}}, "always")


@hookimpl
def tryplicity_parallelism():
    return [Thrifty]
'''


@pytest.mark.parametrize(("order", "tried", "chosen"), [
    ("", ["single", "ddp", "fsdp", "thrifty"], "ddp"),
    ("order = 15", ["single", "thrifty", "ddp", "fsdp"], "thrifty"),
    ("order = 20.5", ["single", "ddp", "thrifty", "fsdp"], "ddp"),
    ("order = -1", ["thrifty", "single", "ddp", "fsdp"], "thrifty"),
])
def test_a_stranger_s_strategy_says_when_it_is_tried(tmp_path, order, tried, chosen):
    path = tmp_path / "thrifty.py"
    path.write_text(PLUGIN.format(order=order))
    registry = load_plugins([str(path)]).registry
    planned = plan(assemble(load_spec(parse_yaml(DENSE, "dense.yaml"), registry)), GPUS, registry)
    assert planned.chosen.name == chosen
    assert [o.name for o in planned.rejected] == [name for name in tried if name != chosen]


def test_the_core_names_no_strategy(registry):
    """But for a namespace of torch's operators that is called like one of them."""
    names = set(registry.names("parallelism"))
    named = {f"{path.relative_to(CORE)}:{node.lineno}: {node.value}"
             for path in CORE.rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))
             if isinstance(node, ast.Constant) and node.value in names}
    named = {place for place in named if not (place.startswith("planner/ledger.py:") and place.endswith(": fsdp"))}
    assert names >= {"single", "ddp", "fsdp"} and not named
