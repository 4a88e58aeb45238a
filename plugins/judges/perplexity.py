"""A judge that reads: what a text costs a model of this project."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from tryplicity import Document, Judge, Part, Steps, UserError, Verdict, load_plugins, train_reference, uses
from tryplicity_plugins.judges.neural import DECIMALS

Bits = Annotated[float, Field(ge=0, le=1e3)]


class Perplexity(Judge):
    """Keeps texts that a model trained on good text finds neither strange nor too easy: gibberish and other languages
    cost many bits a byte, what is said again and again hardly any (CCNet's filter: Wenzek et al., arXiv:1911.00359,
    section 3.3; there a 5-gram model). The score is minus the bits per byte."""

    name = "perplexity"
    cost = 2e-2
    paths = ("run", "spec")

    @dataclass(frozen=True)
    class Config:
        run: str | None = None
        """The model: a run folder, or an exported file. None: one is trained first, into the corpus."""
        spec: str = "reader"
        """What is trained where no run is given."""
        data: Part = uses("source", default="python-docs")
        """On what: text that is good beyond doubt."""
        steps: Steps = 300
        """For how long."""
        least: Bits = 0.3
        """Bits per byte; a text that costs less is no vote to keep."""
        most: Bits = 4.7
        """Bits per byte; a text that costs more is none either. To `reader` after 300 steps documentation, code and
        mathematics cost 1.7 to 4.6, German 5.3, base64 8.7, random characters 14."""
        tokens: Steps = 256
        """Of a document's beginning, how many are read; a context of the model at most."""

    @classmethod
    def check(cls, config: Any, site: Any) -> Iterator[tuple[str, str]]:
        if config.least >= config.most:
            yield "least", f"{config.least:g} is not under most ({config.most:g}): nothing would ever be kept"

    def prepare(self, say: Callable[[str], None]) -> None:
        if self.config.run is None and self.folder is not None and not (self.folder / "model.safetensors").exists():
            say(f"training {self.config.spec} on {self.config.data.name} for {self.config.steps} steps")
            train_reference(self.config.spec, self.config.data.build(), self.folder, self.config.steps)

    def load(self, device):
        if self.config.run is None and self.folder is None:
            raise UserError("it needs a model: give `run`, the folder of one")
        run = Path(self.config.run).expanduser() if self.config.run else self.folder
        from tryplicity import TextScorer  # the engine, which `build` does not wait for

        self.scorer = TextScorer(run, load_plugins().registry, device)

    def judge(self, documents: Sequence[Document]) -> list[Verdict]:
        costs = self.scorer.bits_per_byte([document.text for document in documents], self.config.tokens)
        return [self._verdict(cost) for cost in costs]

    def _verdict(self, cost: float) -> Verdict:
        if math.isnan(cost):
            return Verdict(cost, None)
        cost = round(cost, DECIMALS)
        reason = "strange to the model" if cost > self.config.most else \
            "too easy for the model" if cost < self.config.least else ""
        return Verdict(-cost, not reason, reason)
