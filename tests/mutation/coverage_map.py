"""Which tests reach which line, measured once: a mutant is tried on those tests alone.

`coverage` notes the running test beside each line; processes that a test starts inherit its name. Tests that fail
are left out. The map is kept in `.mutation/`, which git ignores.
"""

from __future__ import annotations

import ast
import functools
import json
import os
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".mutation"

_RC = """[run]
source_dirs =
    {root}/tryplicity
    {root}/plugins
context = ${{PYTEST_CURRENT_TEST-}}
parallel = true
patch = subprocess, _exit
concurrency = thread
core = ctrace
data_file = {folder}/coverage
"""


@functools.cache
def _functions(file: str) -> list[tuple[int, range]]:
    """Of each function of a file: the line where it is defined, and the lines that run when it is called."""
    source = (ROOT / file).read_bytes() if (ROOT / file).exists() else b""  # a map may be older
    return [(node.lineno, range(node.body[0].lineno, node.end_lineno + 1)) for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


@dataclass(frozen=True)
class Map:
    """The tests that reach each line, and what each takes."""

    lines: dict[str, dict[int, list[str]]]  # file -> line -> tests
    seconds: dict[str, float]  # test -> seconds, of those that pass

    def tests(self, file: str, first: int, last: int, most_seconds: float) -> list[str]:
        """Tests of these lines, quick ones first, near ones before others, for at most so many seconds.

        A line that runs when its module is imported is no test's, though the first to import it is noted beside it:
        then those that call the function whose defaults it holds, or reach anything in the file.
        """
        reached, functions, lines = self.lines.get(file, {}), _functions(file), range(first, last + 1)
        if not any(first in body for _, body in functions):
            lines = next((body for begin, body in functions if begin <= first < body.start), range(0))
        tests = {t for line in lines for t in reached.get(line, ())}
        if not tests:
            tests = {t for those in reached.values() for t in those}
        stem, folder = Path(file).stem, Path(file).parent.name
        name = folder if stem == "__init__" else stem

        def rank(test: str) -> tuple:
            far = 1 if name in test else 2 if folder in test else 8
            return far * self.seconds[test], test

        chosen, total = [], 0.0
        for test in sorted(tests & self.seconds.keys(), key=rank):
            total += self.seconds[test]
            if chosen and total > most_seconds:
                break
            chosen.append(test)
        return chosen

    def with_new(self, new: Map) -> Map:
        """With what was measured again, in place of what was known of the same tests, and with what is new."""
        lines: dict[str, dict[int, list[str]]] = {}
        for file in self.lines.keys() | new.lines.keys():
            before, now = self.lines.get(file, {}), new.lines.get(file, {})
            both = {line: sorted({*(t for t in before.get(line, ()) if t not in new.seconds), *now.get(line, ())})
                    for line in before.keys() | now.keys()}
            lines[file] = {line: tests for line, tests in both.items() if tests}
        return Map(lines, self.seconds | new.seconds)


def make(arguments: list[str], add: bool = False) -> None:
    """Run the suite (or what `arguments` name) under coverage and keep the map; add: beside what it says of other
    tests, which is of use as long as the lines that these reach have not moved."""
    FOLDER.mkdir(exist_ok=True)
    for old in FOLDER.glob("coverage*"):
        old.unlink()
    (FOLDER / "coveragerc").write_text(_RC.format(root=ROOT, folder=FOLDER))
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "COVERAGE_RCFILE": str(FOLDER / "coveragerc")}
    subprocess.run([sys.executable, "-m", "coverage", "run", f"--rcfile={FOLDER / 'coveragerc'}", "-m", "pytest",
                    "-p", "tests.mutation.durations", "-p", "no:cacheprovider", *arguments],
                   cwd=ROOT, env=environment, check=False)
    _keep(load() if add else Map({}, {}))


def _keep(before: Map) -> None:
    import coverage

    seconds = json.loads((FOLDER / "seconds.json").read_text())
    by_file: dict[str, set[str]] = defaultdict(set)
    for test in seconds:
        by_file[test.partition("::")[0]].add(test)
    data = coverage.Coverage(data_file=str(FOLDER / "coverage"), config_file=str(FOLDER / "coveragerc"))
    data.combine(keep=False)
    lines: dict[str, dict[int, list[str]]] = {}
    for file in data.get_data().measured_files():
        path = Path(file).resolve()
        if not path.is_relative_to(ROOT):
            continue
        found: dict[int, set[str]] = defaultdict(set)
        for line, contexts in data.get_data().contexts_by_lineno(file).items():
            for context in contexts:
                test, phase = _test_and_phase(context)
                if phase == "setup":  # a fixture, which other tests of the file may share
                    found[line] |= by_file.get(test.partition("::")[0], set())
                elif test in seconds:
                    found[line].add(test)
        lines[path.relative_to(ROOT).as_posix()] = {line: sorted(tests) for line, tests in found.items()}
    kept = before.with_new(Map(lines, seconds))
    whole = FOLDER / "map.json.part"
    whole.write_text(json.dumps({"lines": kept.lines, "seconds": kept.seconds}))
    whole.replace(FOLDER / "map.json")
    print(f"{len(kept.seconds):,} tests, {sum(map(len, kept.lines.values())):,} lines reached by one")


def _test_and_phase(context: str) -> tuple[str, str]:
    """From "tests/a.py::test_b[x] (call)", as pytest and `durations` name what runs; parameters are left out."""
    test, _, phase = context.rpartition(" (")
    return test.partition("[")[0], phase.removesuffix(")")


def load() -> Map:
    try:
        kept = json.loads((FOLDER / "map.json").read_text())
    except FileNotFoundError:
        raise SystemExit("no map yet: python -m tests.mutation map") from None
    return Map({file: {int(n): tests for n, tests in found.items()} for file, found in kept["lines"].items()},
               kept["seconds"])
