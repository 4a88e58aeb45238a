"""What became of a shard's documents, counted. Loads no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tryplicity.components import Document, Verdict

EXAMPLES = 3  # of what was left out for each reason, in a shard


class Summary:
    """Kept and dropped by reason, what the judges said and how often two of them agreed, examples."""

    def __init__(self, source: str) -> None:
        self.source, self.kept = source, {"documents": 0, "bytes": 0}
        self.domains: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self.examples: dict[str, list[dict[str, str]]] = {}
        self.judges: dict[str, Counter[str]] = {}
        self.pairs: dict[str, Counter[str]] = {}

    def keep(self, document: Document) -> None:
        size = len(document.text.encode("utf-8", "replace"))
        self.kept["documents"] += 1
        self.kept["bytes"] += size
        self.domains[document.domain] += size
        self._example("kept", document)

    def drop(self, document: Document, reason: str) -> None:
        self.dropped[reason] += 1
        self._example(reason, document)

    def verdicts(self, verdicts: Mapping[str, Verdict]) -> None:
        words = {name: {True: "keep", False: "drop", None: "no opinion"}[verdict.keep]
                 for name, verdict in verdicts.items()}
        for name, word in words.items():
            self.judges.setdefault(name, Counter())[word] += 1
        names = sorted(words)
        for i, one in enumerate(names):
            for other in names[i + 1:]:
                self.pairs.setdefault(f"{one} / {other}", Counter())[f"{words[one]} / {words[other]}"] += 1

    def _example(self, what: str, document: Document) -> None:
        if len(held := self.examples.setdefault(what, [])) < EXAMPLES:
            held.append({"id": document.id, "text": " ".join(document.text[:1000].split())[:200]})

    def as_dict(self) -> dict[str, Any]:
        return {"source": self.source, "kept": self.kept, "domains": dict(self.domains),
                "dropped": dict(self.dropped), "examples": self.examples,
                "judges": {name: dict(counts) for name, counts in self.judges.items()},
                "pairs": {name: dict(counts) for name, counts in self.pairs.items()}}
