"""Do the tests notice? One-place changes to the code, each tried on the tests that reach it.

    python -m tests.mutation map                          which tests reach which line (as long as the suite takes)
    python -m tests.mutation map --add tests/search       of these alone, beside what the map holds already
    python -m tests.mutation run --package training       every mutant of a package; --sample 60, --part 3/20
    python -m tests.mutation planted                      known faults of the wiring, singly and all at once
    python -m tests.mutation report                       the score by package, and the survivors

mutmut and cosmic-ray start the interpreter for each mutant and do not know processes that tests start: at four
seconds of importing for each of 7,000 mutants that is not a night. Here a fork does.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import queue
import sys
from pathlib import Path

import click

from tests.mutation import coverage_map
from tests.mutation.bench import Bench
from tests.mutation.coverage_map import FOLDER, ROOT
from tests.mutation.mutants import PACKAGES, Mutant, files_of, mutants_of
from tests.mutation.planted import PLANTED
from tests.mutation.report import EQUIVALENT, page

RESULTS = FOLDER / "results.jsonl"


@click.group()
def main() -> None:
    """Mutation tests."""


@main.command("map", context_settings={"ignore_unknown_options": True})
@click.option("--add", is_flag=True, help="Keep what the map says of other tests: for tests that are new or changed.")
@click.argument("arguments", nargs=-1)
def make_map(add: bool, arguments: tuple[str, ...]) -> None:
    """Measure which tests reach which line. ARGUMENTS go to pytest."""
    coverage_map.make(list(arguments), add)


@main.command()
@click.option("--package", "packages", multiple=True, type=click.Choice(list(PACKAGES)), help="By default all.")
@click.option("--sample", type=click.IntRange(1), help="So many mutants of each package, the same on every machine.")
@click.option("--part", default="1/1", show_default=True, help="K/N: the k-th of n parts, for a night each.")
@click.option("--file", "files", multiple=True, help="Only mutants of these files.")
@click.option("--workers", default=2, show_default=True)
@click.option("--seconds", default=40.0, show_default=True, help="Of tests for one mutant; the rest is not tried.")
def run(packages: tuple[str, ...], sample: int | None, part: str, files: tuple[str, ...], workers: int,
        seconds: float) -> None:
    """Try mutants; what was tried already is not tried again unless it has moved in its file, or it survived tests
    that were others or have changed since."""
    number, parts = map(int, part.split("/"))
    chosen = []
    for package in packages or PACKAGES:
        mutants = [m for file in files_of(ROOT, package) if not files or file in files
                   for m in mutants_of(ROOT, file)]
        lots = sorted(mutants, key=lambda m: m.lot)[:sample]
        chosen += [(package, m) for m in lots[number - 1::parts]]
    _try(chosen, workers, seconds)
    page(RESULTS, sys.stdout)


def _try(chosen: list[tuple[str, Mutant]], workers: int, seconds: float) -> None:
    reached = coverage_map.load()
    known = {r["lot"]: r for r in map(json.loads, RESULTS.read_text().splitlines())} if RESULTS.exists() else {}
    todo = []
    for package, mutant in chosen:
        tests = reached.tests(mutant.file, mutant.line, mutant.line + mutant.before.count("\n"), seconds)
        before = known.get(mutant.lot)
        again = before is None or (before["outcome"] not in ("killed", "time")
                                   and before.get("tests") != _digest(tests))
        if again and mutant.key not in EQUIVALENT:
            todo.append((package, mutant, tests))
    click.echo(f"{len(chosen)} mutants, {len(todo)} to try", err=True)
    benches: queue.Queue[Bench] = queue.Queue()

    def one(package: str, mutant: Mutant, tests: list[str]) -> dict:
        if not tests:
            outcome = {"outcome": "unreached", "test": ""}
        else:
            bench = benches.get()
            try:
                changed = {mutant.file: mutant.apply((ROOT / mutant.file).read_bytes())}
                outcome = bench.judge(changed, tests, 15 + 2.5 * sum(reached.seconds[t] for t in tests))
            finally:
                benches.put(bench)
        return {"package": package, "lot": mutant.lot, "key": mutant.key, "file": mutant.file, "line": mutant.line,
                "tests": _digest(tests), **outcome}

    with concurrent.futures.ThreadPoolExecutor(workers) as pool, open(RESULTS, "a") as results:
        opened = [Bench().__enter__() for _ in range(min(workers, len(todo)))]
        for bench in opened:
            benches.put(bench)
        try:
            for i, future in enumerate(concurrent.futures.as_completed([pool.submit(one, *t) for t in todo]), 1):
                result = future.result()
                results.write(json.dumps(result) + "\n")
                results.flush()
                if result["outcome"] not in ("killed", "time"):
                    click.echo(f"{i}/{len(todo)} {result['outcome']}: line {result['line']} {result['key']}", err=True)
        finally:
            for bench in opened:
                bench.__exit__()


def _digest(tests: list[str]) -> str:
    """Of the tests' names and of the files they are in."""
    files = sorted({test.partition("::")[0] for test in tests})
    return hashlib.sha256(repr([tests, [(ROOT / file).read_bytes() for file in files]]).encode()).hexdigest()[:16]


@main.command()
@click.option("--only", multiple=True, help="Only faults with this word in their name.")
@click.option("--seconds", default=120.0, show_default=True, help="Of tests for one fault.")
def planted(only: tuple[str, ...], seconds: float) -> None:
    """Plant each known fault, and then all at once; exits with 1 where one goes unnoticed."""
    reached = coverage_map.load()
    unnoticed, all_changes, all_tests = [], {}, []
    faults = [f for f in PLANTED if not only or any(word in f.name for word in only)]
    with Bench() as bench:
        for fault in faults:
            source = all_changes.get(fault.file, (ROOT / fault.file).read_text())
            all_changes[fault.file] = fault.plant(source)
            first, last = fault.lines(ROOT)
            tests = reached.tests(fault.file, first, last, seconds)
            all_tests += [t for t in tests if t not in all_tests]
            bench.change({fault.file: fault.plant((ROOT / fault.file).read_text()).encode()})
            said = bench.run(tests, 30 + 4 * seconds) if tests else {"outcome": "unreached", "test": ""}
            bench.restore()
            click.echo(f"{said['outcome']:9} {fault.name}: {said['test']}")
            if said["outcome"] not in ("killed", "time"):
                unnoticed.append(fault.name)
        bench.change({file: text.encode() for file, text in all_changes.items()})
        said = bench.run(all_tests, 3600)
        click.echo(f"{said['outcome']:9} all {len(faults)} at once: {said['test']}")
        if said["outcome"] not in ("killed", "time"):
            unnoticed.append("all at once")
    if unnoticed:
        raise SystemExit(f"unnoticed: {', '.join(unnoticed)}")


@main.command()
@click.option("--out", type=click.Path(path_type=Path), help="By default on the screen.")
def report(out: Path | None) -> None:
    """The score by package with its 95 % interval, and the survivors."""
    if out is None:
        page(RESULTS, sys.stdout)
    else:
        with open(out, "w", encoding="utf-8") as file:
            page(RESULTS, file)


if __name__ == "__main__":
    main()
