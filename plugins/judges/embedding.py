"""A judge by meaning: a sentence encoder and a linear head that is fitted on documents worth keeping and others.

Shapes: N documents, D hidden.
"""

from __future__ import annotations

import heapq
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import Field

from tryplicity import Document, Judge, Part, Steps, UserError, Verdict, unit_hash, uses, write_text
from tryplicity_plugins.encoder import Encoder, installed
from tryplicity_plugins.judges.neural import DECIMALS

CHARACTERS = 2000  # of a document's beginning: more than the encoder's 256 tokens
UNSEEN = 0.2  # the share of the documents that the head is not fitted on but measured with
RIDGE = 1e-3  # pulls the head's weights to zero (L2)


class Embedding(Judge):
    """The chance that a document is rather like those of `good` than like those of `bad`: logistic regression on the
    vectors of all-MiniLM-L6-v2. The head is fitted once for a corpus, in a minute, and says how often it is right about
    documents it was not fitted on."""

    name = "embedding"
    cost = 5e-2
    paths = ("model",)

    @dataclass(frozen=True)
    class Config:
        good: Part = uses("source")
        """Documents that are worth keeping."""
        bad: Part = uses("source")
        """Documents that are not."""
        documents: Steps = 400
        """Of each, how many the head is fitted on, at most: those with the least hashes of their ids."""
        model: str | None = None
        """The folder of another encoder of that kind (BERT with mean pooling)."""
        keep_at: Annotated[float, Field(ge=0, le=1)] = 0.5
        """The least chance that is a vote to keep."""

    def _encoder(self, device: torch.device | str) -> Encoder:
        return Encoder(Path(self.config.model).expanduser() if self.config.model else installed(), device)

    @property
    def _head(self) -> Path:
        if self.folder is None:
            raise UserError("its head is fitted for a corpus: name it in a recipe, and run tryplicity data filter")
        return self.folder / "head.json"

    def prepare(self, say: Callable[[str], None]) -> None:
        if self._head.exists():
            return
        encoder = self._encoder("cuda" if torch.cuda.is_available() else "cpu")
        sides = {"good": some_of(self.config.good, self.config.documents),
                 "bad": some_of(self.config.bad, self.config.documents)}
        texts = [document.text[:CHARACTERS] for documents in sides.values() for document in documents]
        vectors_ND = encoder.encode(texts).astype(np.float64)
        good_N = np.array([name == "good" for name, documents in sides.items() for _ in documents])
        unseen_N = np.array([unit_hash(document.id, "unseen") < UNSEEN for documents in sides.values()
                             for document in documents])
        weights_D, bias = fitted(vectors_ND[~unseen_N], good_N[~unseen_N])
        right = (vectors_ND @ weights_D + bias > 0) == good_N
        counts = " and ".join(f"{len(documents):,} {name}" for name, documents in sides.items())
        unseen = int(unseen_N.sum())
        say(f"a head fitted on {counts} documents" + (f"; it is right about {right[unseen_N].mean():.1%} of the "
                                                      f"{unseen} of them it has not seen" if unseen else ""))
        self._head.parent.mkdir(parents=True, exist_ok=True)
        write_text(self._head, json.dumps({"weights": weights_D.tolist(), "bias": bias, "encoder": encoder.identity}))

    def load(self, device):
        self.encoder = self._encoder(device)
        if not self._head.exists():
            raise UserError(f"{self._head} is missing; run tryplicity data filter again to fit it")
        head = json.loads(self._head.read_text(encoding="utf-8"))
        if head["encoder"] != self.encoder.identity:
            raise UserError(f"{self._head} was fitted with another encoder; remove it to fit it anew")
        self.weights_D, self.bias = np.array(head["weights"]), head["bias"]

    def judge(self, documents: Sequence[Document]) -> list[Verdict]:
        vectors_ND = self.encoder.encode([document.text[:CHARACTERS] for document in documents]).astype(np.float64)
        found, least = [], self.config.keep_at
        for value in (vectors_ND @ self.weights_D + self.bias).tolist():
            chance = round(1 / (1 + math.exp(-value)), DECIMALS)
            found.append(Verdict(chance, chance >= least, "" if chance >= least else "more like the bad documents"))
        return found


def some_of(part: Part, most: int) -> list[Document]:
    """The documents of a source with the least hashes of their ids. Raises UserError for a source with fewer than
    two."""
    source = part.build()
    chosen = heapq.nsmallest(most, ((unit_hash(d.id, "head"), d.id, d) for d in source.documents() if d.text.strip()),
                             key=lambda entry: entry[:2])
    if len(chosen) < 2:
        raise UserError(f"source {source.name}: {len(chosen)} documents are too few to fit a head on; give more")
    return [document for *_, document in chosen]


def fitted(vectors_ND: np.ndarray, good_N: np.ndarray) -> tuple[np.ndarray, float]:
    """Weights [D] and bias of the ridge logistic regression in which both sides weigh the same. Raises UserError where
    one side is empty."""
    if good_N.all() or not good_N.any():
        raise UserError("a head needs good documents and bad ones to be fitted on; give more of both")
    x_ND, y_N = torch.tensor(vectors_ND), torch.tensor(good_N, dtype=torch.float64)
    weight_N = torch.where(y_N > 0, 0.5 / y_N.sum(), 0.5 / (1 - y_N).sum())
    head_D1 = torch.zeros(x_ND.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS([head_D1], max_iter=500, tolerance_grad=1e-10,
                               tolerance_change=1e-14, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        search.zero_grad()
        logits_N = x_ND @ head_D1[:-1] + head_D1[-1]
        cost = torch.nn.functional.binary_cross_entropy_with_logits(logits_N, y_N, weight_N, reduction="sum")
        cost = cost + RIDGE / 2 * head_D1[:-1].square().sum()
        cost.backward()
        return cost

    search.step(loss)
    return head_D1[:-1].detach().numpy(), head_D1[-1].item()
