"""Bits per byte of single texts under a trained model. Shapes: B texts, T tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tryplicity.components import IGNORE
from tryplicity.data.tokenizer import BOS, PAD
from tryplicity.errors import UserError
from tryplicity.evaluation.score import TOKENS, nats
from tryplicity.inference.packed import load_model
from tryplicity.inference.text import token_bytes

if TYPE_CHECKING:
    from tryplicity.registry import Registry

CHARACTERS = 64  # of a text for each token that is read: no token stands for more


class TextScorer:
    """A model from a run folder or an exported file. Raises UserError where there is none, or one without a
    tokenizer."""

    def __init__(self, run: str | Path, registry: Registry, device: torch.device | str = "cpu") -> None:
        self.model, self.spec, self.tokenizer, _ = load_model(run, registry, str(device), ternary=False)
        if self.tokenizer is None:
            raise UserError(f"{run}: this model has no tokenizer, so it reads no text; give a run folder")
        self.tokenizer.encode_special_tokens = True  # "<|eos|>" in a text is text
        self.model.eval()
        self.bytes_V = [len(piece) for piece in token_bytes(self.tokenizer)]

    @torch.no_grad()
    def bits_per_byte(self, texts: Sequence[str], tokens: int | None = None) -> list[float]:
        """Of each text's beginning, at most so many tokens or a context; NaN for a text without any. Each is read by
        itself: what stands beside it in a batch is padding behind its end, which no causal model sees."""
        most = min(tokens or self.spec.context_length, self.spec.context_length)
        ids = [self.tokenizer.encode(text[:CHARACTERS * most], add_special_tokens=False).ids[:most] for text in texts]
        order = sorted((i for i in range(len(ids)) if ids[i]), key=lambda i: (-len(ids[i]), i))
        found = [math.nan] * len(texts)
        while order:
            longest = len(ids[order[0]])
            count = max(1, TOKENS // longest)
            batch, order = order[:count], order[count:]
            ids_BT = torch.full((len(batch), longest), PAD)
            targets_BT = torch.full((len(batch), longest), IGNORE)
            for row, i in enumerate(batch):
                targets_BT[row, :len(ids[i])] = torch.tensor(ids[i])
                ids_BT[row, :len(ids[i])] = torch.tensor([BOS, *ids[i][:-1]])
            nats_B = nats(self.model, ids_BT, targets_BT).double().sum(1).tolist()
            for i, cost in zip(batch, nats_B, strict=True):
                found[i] = cost / math.log(2) / sum(self.bytes_V[token] for token in ids[i])
        return found
