"""Faults of the wiring that once went unnoticed, all at once, through 2,819 green tests. `python -m tests.mutation
planted` plants them again; `tests/test_planted.py` holds that each still fits the code."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Fault:
    """`before` stands once in the file, and is exchanged for `after`."""

    name: str
    file: str
    before: str
    after: str

    def plant(self, source: str) -> str:
        assert source.count(self.before) == 1, f"{self.name}: {self.file} no longer reads {self.before!r} once"
        return source.replace(self.before, self.after)

    def lines(self, root: Path) -> tuple[int, int]:
        source = (root / self.file).read_text(encoding="utf-8")
        first = source[:source.index(self.before)].count("\n") + 1
        return first, first + self.before.count("\n")


PLANTED: list[Fault] = []
