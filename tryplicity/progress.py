"""How long work says how far it is: two kinds of function that a caller gives, and the one that says nothing."""

from __future__ import annotations

from collections.abc import Callable

#: called as progress(what, done, total); total is None where it is not known
Progress = Callable[[str, float, float | None], None]

#: called as progress(done, total), of one thing in bytes or numbers
CountProgress = Callable[[int, int], None]


def no_progress(what: str, done: float, total: float | None) -> None:
    pass


def no_count_progress(done: int, total: int) -> None:
    pass
