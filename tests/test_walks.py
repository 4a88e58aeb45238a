"""The three ways that CONTRIBUTING.md leads a reader are ways that the program goes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROW = re.compile(r"^\| `([\w/.]+\.py)` \| `([\w.]+)` \|", re.M)


@pytest.fixture(scope="module")
def traced():
    """way -> file -> the functions that ran there"""
    done = subprocess.run([sys.executable, "-m", "tests.walks", "--files"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    ways = re.findall(r"^(\w.+?): \d+ files, \d+ lines\n((?: {4}.+\n)+)", done.stdout, re.M)
    return {way: {file: names.split(", ") for file, names in re.findall(r"^ +(\S+) \d+: (.+)$", lines, re.M)}
            for way, lines in ways}


def test_each_step_of_a_way_is_on_it(traced):
    (section,) = re.findall(r"^## Three ways.*?(?=^## )", (ROOT / "CONTRIBUTING.md").read_text(), re.M | re.S)
    _, *parts = re.split(r"^\*\*(.+?)\*\*", section, flags=re.M)
    told = {title.replace("`", ""): ROW.findall(table) for title, table in zip(parts[::2], parts[1::2], strict=True)}
    assert list(told) == list(traced) and len(told) == 3
    for way, steps in told.items():
        assert len(steps) > 5
        for file, function in steps:
            assert function in traced[way].get(file, ()), (way, file, function)
