"""What was passed over (files, rows, documents), counted by reason and said in the same words everywhere.

Nothing is left out in silence: who reads files or rows keeps one of these and shows it when done. Loads no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

FIRST = 3       # places that are kept for each reason


@dataclass
class LeftOut:
    """Counts by reason, and the first three examples of each. `kind` and the reasons are plural nouns and short
    phrases: LeftOut("files"); add("of another kind (.py)", "setup.py"); str() is then
    "left out 60 files: 58 of another kind (.py) (setup.py, a.py, b.py, ...), 2 not UTF-8 (old.txt, x.txt)".
    """

    kind: str
    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # files of earlier versions hold one for each reason, as a text
        self.examples = {reason: [some] if isinstance(some, str) else list(some)
                         for reason, some in self.examples.items()}

    def add(self, reason: str, example: object = None, count: int = 1) -> None:
        """One more (or `count` more) left out for this reason; example: a name or place a person can look at."""
        self.counts[reason] = self.counts.get(reason, 0) + count
        if example is not None:
            held = self.examples.setdefault(reason, [])
            if len(held) < FIRST and str(example) not in held:
                held.append(str(example))

    def update(self, more: LeftOut) -> None:
        """What was left out further on."""
        for reason, count in more.counts.items():
            self.add(reason, count=count)
            for example in more.examples.get(reason, ()):
                self.add(reason, example, 0)

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def __bool__(self) -> bool:
        return bool(self.counts)

    def as_dict(self) -> dict[str, int]:
        """Counts by reason, the most frequent first: what --json prints as `left_out`."""
        return dict(sorted(self.counts.items(), key=lambda item: (-item[1], item[0])))

    @classmethod
    def of(cls, kind: str, counts: Mapping[str, int], examples: Mapping[str, list[str]] | None = None) -> LeftOut:
        """From what `as_dict` gave, and the examples."""
        return cls(kind, dict(counts), dict(examples or {}))

    def __str__(self) -> str:
        """One line, or nothing where nothing was left out."""
        if not self:
            return ""
        noun = self.kind.removesuffix("s") if self.total == 1 else self.kind
        reasons = ", ".join(f"{count:,} {reason}{self._example(reason, count)}"
                            for reason, count in self.as_dict().items())
        return f"left out {self.total:,} {noun}: {reasons}"

    def _example(self, reason: str, count: int) -> str:
        some = self.examples.get(reason, [])
        return f" ({', '.join(some)}{', ...' if count > len(some) else ''})" if some else ""
