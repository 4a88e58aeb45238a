"""A pytest plugin for the map: tells coverage which test runs, and keeps what each passing test took."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import coverage
import pytest

_SECONDS: dict[str, float] = defaultdict(float)
_BAD: set[str] = set()


def _phase(item: pytest.Item, name: str) -> Iterator[None]:
    if measuring := coverage.Coverage.current():
        measuring.switch_context(f"{item.nodeid} ({name})")
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    return (yield from _phase(item, "setup"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    return (yield from _phase(item, "call"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    return (yield from _phase(item, "teardown"))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    test = report.nodeid.partition("[")[0]  # its parameters together
    _SECONDS[test] += report.duration
    if report.outcome != "passed":
        _BAD.add(test)


def pytest_sessionfinish() -> None:
    kept = {test: round(taken, 3) for test, taken in _SECONDS.items() if test not in _BAD}
    (Path(__file__).parents[2] / ".mutation" / "seconds.json").write_text(json.dumps(kept))
