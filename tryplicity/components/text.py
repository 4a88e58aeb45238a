"""Text, where it comes from and what is thought of it: sources and judges, retrievers and passages."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch

from tryplicity.errors import UserError
from tryplicity.leftout import LeftOut
from tryplicity.parts import Component


class Document(NamedTuple):
    """A text with an identity that does not change between harvests and a URL a reader can check.

    What stands in the id before a `#` is the work that the document is part of: its parts are all trained on or all
    held out. A foreign name (of a file, a data set) goes through `tryplicity.escaped` before it becomes part of an id.
    """

    id: str
    text: str
    domain: str  # text, code or math
    url: str
    quality: float | None = None  # what its source says of it, on the source's own scale


class Conversation(NamedTuple):
    """A dialogue to learn from. The messages are mappings of `role` (system, user, assistant, tool) and `content`; one
    of the assistant's with a `weight` of 0 is read, but not learnt to write. The id is like a Document's."""

    id: str
    messages: tuple[Mapping[str, Any], ...]
    url: str


class Reading:
    """An iterator over a source's documents that can say where it stands. This one counts: it goes on by passing over
    as many documents as it had given, which is right for what lies on the disk; a source that streams has its own."""

    #: whether going on reads from the beginning again, so that what was left out before is counted again too
    rereads: ClassVar[bool] = True

    def __init__(self, documents: Iterator[Document], position: Any = None) -> None:
        """position: what `position` gave, of documents that are still the same; None: from the beginning."""
        self._documents, self._passed = documents, 0
        for _ in range(position or 0):
            next(self, None)

    def __iter__(self) -> Reading:
        return self

    def __next__(self) -> Document:
        document = next(self._documents)
        self._passed += 1
        return document

    def position(self) -> Any:
        """Where the next document is read from, as JSON."""
        return self._passed


class Source(Component):
    """`Class(config)`: where training text comes from; it gives documents, or conversations, or both."""

    family = "source"
    #: a folder where what is made of it (tokens, a tokenizer) is kept, in place of the cache
    cache: Path | None = None

    @functools.cached_property
    def left_out(self) -> LeftOut:
        """What `documents` or `conversations` passed over (files, rows) when last iterated, counted by reason. Add to
        it while they run; whoever reads them to the end prints it."""
        return LeftOut("items")

    def fingerprint(self) -> str:
        """Changes when the documents may have: under this the cache finds them without reading the source. It may be
        made of paths and times; what the data is, is told by the documents alone."""
        raise NotImplementedError

    def ready(self) -> None:
        """Asked before a download begins. Raises UserError where something must be done first: a licence accepted, a
        login."""

    def documents(self) -> Iterator[Document]:
        """Raises UserError where the source holds conversations alone."""
        raise NotImplementedError

    def reading(self, position: Any = None) -> Reading:
        """The documents from a position on, which an earlier `Reading` gave. Raises Unreachable where a connection
        breaks: the next try goes on from the last position."""
        return Reading(self.documents(), position)

    def conversations(self) -> Iterator[Conversation]:
        """What a chat phase learns from."""
        raise UserError(f"source {self.name}: holds documents, not conversations; a chat phase needs conversations, "
                        "such as a .jsonl file of {\"messages\": [...]}")


class Verdict(NamedTuple):
    """What a judge says of a document."""

    score: float  # higher is better, on the judge's own scale
    keep: bool | None  # None: no opinion; then others decide
    reason: str = ""  # why it is not kept: a short phrase, under which such documents are counted


class Judge(Component):
    """Says whether documents are worth learning from. `Class(config)`.

    One instance works in one process, on one device; several processes may have one each. The same document gets the
    same verdict whatever others are judged with it.
    """

    family = "judge"
    #: seconds that a document takes, in its order of magnitude: the cheap ones are asked first, and the dear ones only
    #: where the vote is still open
    cost: ClassVar[float] = 1e-3
    #: options that are paths: in a recipe one that is relative counts from the recipe's file, if it is there
    paths: ClassVar[tuple[str, ...]] = ()
    #: this judge's own in the corpus: what `prepare` leaves there `load` finds; None outside of a corpus
    folder: Path | None = None

    def __init__(self, config: Any) -> None:
        self.config = config

    def prepare(self, say: Callable[[str], None]) -> None:
        """Called in one process before any `load` of a corpus, and again whenever the filter is gone on with: make what
        is made only once, as a model that is trained or fitted first, into `folder`, unless it is there. `say` tells
        the user a line."""

    def load(self, device: torch.device) -> None:
        """Called once before the first `judge`: read a model. Raises UserError with the reason where it cannot."""

    def judge(self, documents: Sequence[Document]) -> list[Verdict]:
        """A verdict for each."""
        raise NotImplementedError


class Passage(NamedTuple):
    """A stretch of text that an answer can rest on, and where a reader can check it."""

    id: str  # the same for the same passage as long as the index stands
    title: str
    url: str
    text: str
    score: float  # higher is better; comparable within one search alone


class Retriever(Component):
    """Finds passages for a question. `Class(config)`; `search` may be called from several threads at once."""

    family = "retriever"

    def __init__(self, config: Any) -> None:
        self.config = config

    def search(self, question: str, limit: int) -> list[Passage]:
        """At most `limit` passages, best first. Raises UserError when it cannot search at all (no index, no
        network), with what to do."""
        raise NotImplementedError

    def examples(self, limit: int) -> list[str]:
        """At most `limit` questions that its passages can answer, for a page to offer; none where it does not know."""
        return []
