"""Guessing tokens ahead, to check several in one pass of the model: speculative decoding (Leviathan et al.,
arXiv:2211.17192), the guesses by the model's own heads (Gloeckle et al., arXiv:2404.19737).

A guess counts only when it is the very token that plain decoding chooses in its place, with the same random numbers, so
that the text is the same with and without. Shapes: B batch, T time, K guesses, D hidden.
"""

from __future__ import annotations

from torch import Tensor

from tryplicity.components import Head
from tryplicity.model import Model

MOST_UNREAD = 12  # tokens to read again after wrong guesses, before they are read for good


class Drafter:
    """Guesses what comes after the next token, by whatever heads of the model can."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.heads = [head for head in model.heads.values() if type(head).draft is not Head.draft]
        self.drafted = self.accepted = 0

    def __bool__(self) -> bool:
        return bool(self.heads)

    def __call__(self, h_D: Tensor) -> list[int]:
        """The likeliest tokens 2, 3, ... after the one whose last hidden state this is, by the head that sees furthest;
        [] where none has a guess."""
        drafts = [own for head in self.heads if (own := head.draft(h_D[None, None])) is not None]
        if not drafts:
            return []
        h_BTKD = max(drafts, key=lambda own: own.shape[2])
        return self.model.logits(h_BTKD[0]).argmax(-1)[0].tolist()
