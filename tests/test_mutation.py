"""The mutation tool: what it changes, and that the known faults still fit the code they are planted in."""

import ast
import io
import json
from collections import Counter
from pathlib import Path

import pytest

from tests.mutation import bench
from tests.mutation.coverage_map import Map
from tests.mutation.mutants import PACKAGES, files_of, mutants_of
from tests.mutation.planted import PLANTED
from tests.mutation.report import EQUIVALENT, page, wilson

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


def test_what_is_noted_as_equivalent_is_still_there_with_its_reason():
    keys = {mutant.key for package in PACKAGES for file in files_of(ROOT, package) for mutant in mutants_of(ROOT, file)}
    assert EQUIVALENT.keys() <= keys and all(len(why.split()) > 4 for why in EQUIVALENT.values())


def test_the_interval_of_a_score():
    low, high = wilson(85, 100)  # by hand: the centre (0.85 + 1.9208 / 100) / 1.038416 and half its width
    assert (low, high) == pytest.approx((0.7671, 0.9069), abs=2e-4)


def test_the_page_is_of_the_mutants_of_today(tmp_path):
    first, second, third = mutants_of(ROOT, "tryplicity/search/words.py")[:3]
    with open(tmp_path / "results", "w", encoding="utf-8") as file:
        for lot, mutant, outcome in ((first.lot, first, "survived"), (first.lot, first, "killed"), (second.lot, second,
                                     "unreached"), (third.lot, third, "time"), ("of yesterday", third, "survived")):
            file.write(json.dumps({"package": "search", "lot": lot, "key": mutant.key, "file": mutant.file,
                                   "line": mutant.line, "outcome": outcome, "test": ""}) + "\n")
    told = io.StringIO()
    page(tmp_path / "results", told)
    assert "| search | 3 | 2 | 66.7% |" in told.getvalue() and "\n1 survive;" in told.getvalue()
    assert told.getvalue().endswith(f"- `{second.key}` (line {second.line}, no test reaches it)\n")


def test_new_tests_join_a_map():
    before = Map({"f.py": {1: ["a::x", "a::y"], 2: ["a::x"]}, "g.py": {5: ["b::z"]}}, {"a::x": 1, "a::y": 2, "b::z": 3})
    now = Map({"f.py": {1: ["a::x"], 3: ["c::n"]}}, {"a::x": 4, "c::n": 5})
    both = before.with_new(now)
    assert both.lines == {"f.py": {1: ["a::x", "a::y"], 3: ["c::n"]}, "g.py": {5: ["b::z"]}}
    assert both.seconds == {"a::x": 4, "a::y": 2, "b::z": 3, "c::n": 5}
    assert both.tests("f.py", 1, 1, 5) == ["a::y"] and both.tests("f.py", 1, 3, 50) == ["a::y", "a::x", "c::n"]


class Table(bench.Bench):
    """A bench that looks up which tests fail, and how long all take, with the change and without."""

    def __init__(self, fails, takes=(1, 1)):
        self.fails, self.takes, self.changed, self._pass = fails, takes, False, set()
        self.now, self.asked = 0.0, []

    def change(self, files):
        self.changed = True

    def restore(self):
        self.changed = False

    def run(self, tests, limit):
        self.asked.append((self.changed, tests))
        failed = next((test for test in tests if test in self.fails[not self.changed]), "")
        took = 1 if failed else self.takes[not self.changed]
        self.now += min(took, limit)
        return {"outcome": "time" if took > limit else "killed" if failed else "survived", "test": failed}


@pytest.mark.parametrize("fails, takes, said", [
    (({"a::x"}, set()), (1, 1), ("killed", "a::x")), ((set(), set()), (1, 1), ("survived", "")),
    (({"a::x", "a::y"}, {"a::x"}), (1, 1), ("killed", "a::y")), (({"a::x"}, {"a::x"}), (1, 1), ("survived", "")),
    (({"a::x", "a::y"}, {"a::x", "a::y"}), (1, 1), ("unsure", "")),
    ((set(), set()), (1000, 1), ("time", "")),      # a loop that never ends
    ((set(), set()), (100, 80), ("survived", "")),  # a busy machine
    ((set(), set()), (1000, 1000), ("unsure", ""))])
def test_what_fails_without_the_change_too_tells_nothing(monkeypatch, fails, takes, said):
    """Tests that do not pass are left out, and a busy machine gets more time."""
    table = Table(fails, takes)
    monkeypatch.setattr(bench.time, "monotonic", lambda: table.now)
    assert tuple(table.judge({}, ["a::x", "a::y"], 30).values()) == said
    if said[0] == "killed":
        table.asked.clear()
        table.judge({}, [said[1]], 30)
        assert table.asked == [(True, [said[1]])]   # it was seen to pass
