"""Who is told how a training goes on."""

from __future__ import annotations

from typing import Any

from tryplicity.training.checkpoint import TrainingProgress


class Watcher:
    """Is told how a training goes on; this one keeps it to itself."""

    def step(self, progress: TrainingProgress, metrics: dict[str, Any], spent: float, seconds_left: float) -> None:
        """A step is done; spent: the share of the budget; seconds_left: until all is done, the last scoring too."""

    def note(self, text: str) -> None:
        """Something of interest happened: another stage, a sleep."""

    def scoring(self, share: float, seconds_left: float) -> None:
        """At the end, so much of the held-out part is scored."""


class Unheard:
    """Stands on the other ranks for what rank 0 alone writes to or calls."""

    def write(self, line: dict[str, Any]) -> None:
        pass

    def call(self, hook: str, **arguments: Any) -> None:
        pass

    def close(self) -> None:
        pass


class Heard(Watcher):
    """Passes on to another until that cannot write any more: a terminal that is gone costs no training."""

    def __init__(self, watcher: Watcher) -> None:
        self.watcher = watcher

    def _tell(self, what: str, *arguments: Any) -> None:
        try:
            getattr(self.watcher, what)(*arguments)
        except OSError:
            self.watcher = Watcher()

    def step(self, *arguments: Any) -> None:
        self._tell("step", *arguments)

    def note(self, *arguments: Any) -> None:
        self._tell("note", *arguments)

    def scoring(self, *arguments: Any) -> None:
        self._tell("scoring", *arguments)
