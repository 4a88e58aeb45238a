"""Passages of an index on this machine, found by BM25. Works offline."""

from __future__ import annotations

from dataclasses import dataclass

from tryplicity import Passage, PassageIndex, Retriever, ensure_index, load_plugins

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
        self.index = open_index(config.index, config.source)
        self.passages = len(self.index)

    def search(self, question: str, limit: int) -> list[Passage]:
        return self.index.search(question, limit)

    def examples(self, limit: int) -> list[str]:
        return examples_of(self.index, limit)


def examples_of(index: PassageIndex, limit: int) -> list[str]:
    return _PYTHON[:limit] if index.source == Passages.Config.source else index.examples(limit)


def open_index(path: str | None, source: str) -> PassageIndex:
    """The index file, or that of a source, built if need be. Raises UserError as these do."""
    return PassageIndex(path if path is not None else ensure_index(source, load_plugins().registry))
