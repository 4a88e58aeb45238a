"""Passages of an index on this machine, found by BM25. Works offline."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from tryplicity import Passage, PassageIndex, Retriever, UserError, ensure_index, load_plugins

#: of the documentation that is indexed where nothing is named
_PYTHON = ["How do I read a file line by line?", "What does itertools.groupby return?",
           "When is a finally clause run?", "How do I join two paths?"]


class Passages(Retriever):
    """Searches an index file, or the documentation of this installation.

    The file is what `tryplicity search index SOURCE --out FILE` writes. Without one, `source` is indexed into the
    user's cache when the retriever is made, once: a later one finds the index there.
    """

    name = "passages"

    @dataclass(frozen=True)
    class Config:
        index: str | None = None
        """an index file; none: the index of `source` in the cache"""
        source: str = "python-reference"
        """what is searched where no file is given, as --data names it"""

    def __init__(self, config: Config) -> None:
        self._newest = Newest(open_index(config.index, config.source), lambda index: index)

    @property
    def index(self) -> PassageIndex:
        return self._newest.now()

    @property
    def passages(self) -> int:
        return len(self.index)

    def search(self, question: str, limit: int) -> list[Passage]:
        return self.index.search(question, limit)

    def examples(self, limit: int) -> list[str]:
        return examples_of(self.index, limit)


def examples_of(index: PassageIndex, limit: int) -> list[str]:
    return _PYTHON[:limit] if index.source == Passages.Config.source else index.examples(limit)


def open_index(path: str | None, source: str) -> PassageIndex:
    """The index file, or that of a source, built if need be. Raises UserError as these do."""
    return PassageIndex(path if path is not None else ensure_index(source, load_plugins().registry))


T = TypeVar("T")
_PATIENCE = 5.0     # seconds before a file that was no index is looked at again
log = logging.getLogger("tryplicity.search")


class Newest(Generic[T]):
    """What is made of an index file, made anew when another file is put in its place. Who asks meanwhile, and where
    that file is no index, is given what there was."""

    def __init__(self, index: PassageIndex, make: Callable[[PassageIndex], T]) -> None:
        self._index, self._make = index, make
        self._made = make(index)
        self._refused, self._patience = "", 0.0
        self._lock = threading.Lock()

    def now(self) -> T:
        if self._index.replaced and time.monotonic() >= self._patience and self._lock.acquire(blocking=False):
            try:
                if self._index.replaced:
                    index = PassageIndex(self._index.path)
                    self._made = self._make(index)
                    self._index = index
                    log.info("%s: a new index of %s passages", index.path, f"{len(index):,}")
            except UserError as error:
                self._patience = time.monotonic() + _PATIENCE
                if str(error) != self._refused:     # once
                    self._refused = str(error)
                    log.warning("the index before is used on: %s", error)
            finally:
                self._lock.release()
        return self._made
