"""A judge by how hard a text reads."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from tryplicity import Document, Judge, Verdict, grade

Grade = Annotated[float, Field(ge=0, le=1000)]


class ReadingLevel(Judge):
    """Keeps texts whose prose reads like what people write for people, by the Automated Readability Index: menus and
    lists read like no school grade, words without a full stop like a very high one. The score is the grade. No opinion
    where there is too little prose to tell by, and of code without comments."""

    name = "reading_level"
    cost = 1e-3

    @dataclass(frozen=True)
    class Config:
        least: Grade = 2.0
        """The lowest school grade that is a vote to keep."""
        most: Grade = 20.0
        """The highest one. Of two hundred pages of documentation 98 % read like 3.8 to 18.2; half of those whose words
        are shuffled, like 59 and more."""

    @classmethod
    def check(cls, config: Any, site: Any) -> Iterator[tuple[str, str]]:
        if config.least >= config.most:
            yield "least", f"{config.least:g} is not under most ({config.most:g}): nothing would ever be kept"

    def judge(self, documents: Sequence[Document]) -> list[Verdict]:
        return [self._verdict(grade(document)) for document in documents]

    def _verdict(self, level: float) -> Verdict:
        if math.isnan(level):
            return Verdict(level, None)
        reason = "reads like no sentences" if level > self.config.most else \
            "reads like single words" if level < self.config.least else ""
        return Verdict(level, not reason, reason)
