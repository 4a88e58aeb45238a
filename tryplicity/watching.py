"""What a plugin does beside what it was asked for, while it is imported and while its hooks are called: it prints, it
takes long, it changes another's components. Loads no torch."""

from __future__ import annotations

import contextlib
import io
import sys
import time
from collections.abc import Iterator
from typing import Any

from tryplicity.errors import UserError
from tryplicity.guard import called
from tryplicity.parts import Component

SLOW = 1.0  # seconds: from then on every command is slower than a user forgives
#: attributes that Python itself puts on a class later
_LATE = {"__abstractmethods__", "_abc_impl", "__doc__", "__parameters__"}


def top(module: str) -> str:
    return module.partition(".")[0]


@contextlib.contextmanager
def quiet(who: str) -> Iterator[None]:
    """What is printed inside must not get into --json; it is said in one line, and by whom."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            yield
    finally:
        if text := " ".join(said.getvalue().split()):
            print(f"warning: {who} printed {text[:60]!r} while it was loaded; take that out, or print in a hook",
                  file=sys.stderr)


@contextlib.contextmanager
def quick(who: str) -> Iterator[None]:
    """Says so where it takes long: every command waits for it."""
    start, torch_was_there = time.monotonic(), "torch" in sys.modules
    yield
    took = time.monotonic() - start
    if took > SLOW:
        what = "torch" if "torch" in sys.modules and not torch_was_there else "what takes long"
        print(f"warning: {who} takes {took:.1f} s to import, in every command; import {what} inside its hooks",
              file=sys.stderr)


@contextlib.contextmanager
def untouched(foreign: set[str]) -> Iterator[set[str]]:
    """Raises UserError, once everything is as it was, where a component of one of these packages was changed inside.
    Into the set that it gives go the packages that are one's own."""
    before = {cls: dict(vars(cls)) for cls in _components() if top(cls.__module__) in foreign}
    own: set[str] = set()
    try:
        yield own
    except BaseException:
        _restored(before, foreign - own)
        raise
    if changed := _restored(before, foreign - own):
        raise UserError(f"it changes a component of another plugin ({', '.join(sorted(changed)[:3])}); bring one of "
                        "its own, under a name of its own")


def _restored(before: dict[type, dict[str, Any]], foreign: set[str]) -> list[str]:
    """What was changed, by name, and is as it was again."""
    changed = []
    for cls in _components():
        if top(cls.__module__) not in foreign:
            continue
        known = before.get(cls) or Component._as_made.get(cls, {})
        for name in known.keys() | vars(cls).keys():
            if name not in _LATE and vars(cls).get(name) is not known.get(name):
                changed.append(f"{name} of {called(cls)}")
                _put_back(cls, name, known)
    return changed


def _put_back(cls: type, name: str, known: dict[str, Any]) -> None:
    if name in known:
        setattr(cls, name, known[name])
    else:
        delattr(cls, name)


def _components() -> list[type[Component]]:
    """Every component class that there is now."""
    found: list[type[Component]] = []
    waiting = [Component]
    while waiting:
        more = [cls for cls in waiting.pop().__subclasses__() if cls not in found]
        found += more
        waiting += more
    return found
