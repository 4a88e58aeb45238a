"""The mutation tool: what it changes, and that the known faults still fit the code they are planted in."""

import ast
from collections import Counter
from pathlib import Path

import pytest

from tests.mutation.mutants import PACKAGES, files_of, mutants_of
from tests.mutation.planted import PLANTED
from tests.mutation.report import wilson

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("fault", PLANTED, ids=lambda fault: fault.name)
def test_a_known_fault_can_be_planted(fault):
    source = (ROOT / fault.file).read_text(encoding="utf-8")
    planted = fault.plant(source)
    ast.parse(planted)
    first, last = fault.lines(ROOT)
    assert planted != source and source.splitlines()[first - 1:last]


def test_what_is_changed(tmp_path):
    (tmp_path / "a.py").write_text(
        'def f(x: int = 3) -> bool:\n    """Doc."""\n    if x < 2 and not done(x):\n        print("é", x - 1)\n'
        '    return x\n')
    changes = Counter((m.scope, m.before, m.after) for m in mutants_of(tmp_path, "a.py"))
    assert changes == Counter([
        ("f", "3", "4"), ("f", "x < 2 and not done(x)", "(x < 2 or not done(x))"), ("f", "x < 2", "(x <= 2)"),
        ("f", "2", "3"), ("f", "not done(x)", "bool(done(x))"), ("f", 'print("é", x - 1)', "pass"),
        ("f", "x - 1", "(x + 1)"), ("f", "1", "2"), ("f", "return x", "return None")])


@pytest.mark.parametrize("package", PACKAGES)
def test_every_mutant_is_python(package):
    for file in files_of(ROOT, package):
        source = (ROOT / file).read_bytes()
        for mutant in mutants_of(ROOT, file)[::7]:
            ast.parse(mutant.apply(source))


def test_the_interval_of_a_score():
    low, high = wilson(85, 100)  # by hand: the centre (0.85 + 1.9208 / 100) / 1.038416 and half its width
    assert (low, high) == pytest.approx((0.7671, 0.9069), abs=2e-4)
