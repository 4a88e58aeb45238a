"""Bits per byte by domain. Shapes: B rows, T tokens of a row, N tokens of a batch, D hidden, V vocabulary."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tryplicity.components import IGNORE
from tryplicity.data.packing import Batch, HeldOut, TokenFile
from tryplicity.model import Model

TOKENS = 4096   # of a batch, or one row where a context is longer
LOGITS = 512    # tokens whose logits are in memory at once


@dataclass(frozen=True)
class Score:
    """nats: of all targets, the ends of documents among them. bytes: of UTF-8 text that they stand for."""

    nats: float
    tokens: int
    bytes: int
    documents: int

    @property
    def bits_per_byte(self) -> float | None:
        """None where there is no byte to predict."""
        return self.nats / math.log(2) / self.bytes if self.bytes else None

    def __add__(self, other: Score) -> Score:
        return Score(self.nats + other.nats, self.tokens + other.tokens, self.bytes + other.bytes,
                     self.documents + other.documents)


@torch.no_grad()
def by_domain(model: Model, tokens: TokenFile,
              progress: Callable[[int, int], None] = lambda done, total: None) -> dict[str, Score]:
    """The score of each domain that has documents. Rows are packed as a training's own scoring packs them, so that the
    domains' sum is the figure it gives, to rounding. progress: called with the rows scored and all of them."""
    model.eval()
    heldout, context = HeldOut(tokens), model.spec.context_length
    rows, total, done = max(1, TOKENS // context), heldout.rows(context), 0
    nats_D, tokens_D, bytes_D = np.zeros(len(tokens.domains)), *np.zeros((2, len(tokens.domains)), dtype=np.int64)
    for batch in heldout.batches(rows, context):
        nll_BT = nats(model, batch.ids_BT, batch.targets_BT, batch.doc_ids_BT).cpu().numpy()
        targets_N = batch.targets_BT[batch.targets_BT != IGNORE].numpy()
        domain_N = _domains(tokens, batch)
        np.add.at(nats_D, domain_N, nll_BT[batch.targets_BT.numpy() != IGNORE].astype(np.float64))
        np.add.at(tokens_D, domain_N, 1)
        np.add.at(bytes_D, domain_N, tokens.token_bytes_V[targets_N].astype(np.int64))
        done += len(nll_BT)
        progress(done, total)
    documents_D = np.bincount(tokens.domain_D, minlength=len(tokens.domains))
    return {domain: Score(float(nats_D[i]), int(tokens_D[i]), int(bytes_D[i]), int(documents_D[i]))
            for i, domain in enumerate(tokens.domains) if documents_D[i]}


def _domains(tokens: TokenFile, batch: Batch) -> np.ndarray:
    """The domain of each target's document: [N]."""
    found = [tokens.domain_D[documents[docs_T]] for documents, docs_T in
             zip(batch.documents, batch.doc_ids_BT.numpy(), strict=True)]
    return np.stack(found)[batch.targets_BT.numpy() != IGNORE]


def nats(model: Model, ids_BT: Tensor, targets_BT: Tensor, doc_ids_BT: Tensor | None = None) -> Tensor:
    """What each target costs the model, in fp32 on its device: [B, T], zero where the target is IGNORE."""
    return nats_and_choice(model, ids_BT, targets_BT, doc_ids_BT)[0]


def nats_and_choice(model: Model, ids_BT: Tensor, targets_BT: Tensor,
                    doc_ids_BT: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As `nats`; and whether each target is the token that the model finds likeliest: bool [B, T]."""
    device = model.embedding.weight.device
    h_BTD, _ = model.hidden(ids_BT.to(device), doc_ids_BT=None if doc_ids_BT is None else doc_ids_BT.to(device))
    h_ND, targets_N, costs, likeliest = h_BTD.flatten(0, 1), targets_BT.to(device).flatten(), [], []
    for i in range(0, len(h_ND), LOGITS):
        logits_NV, part_N = model.logits(h_ND[None, i:i + LOGITS])[0].float(), targets_N[i:i + LOGITS]
        costs.append(F.cross_entropy(logits_NV, part_N, ignore_index=IGNORE, reduction="none"))
        likeliest.append(logits_NV.argmax(-1) == part_N)
    return torch.cat(costs).view_as(targets_BT), torch.cat(likeliest).view_as(targets_BT)
