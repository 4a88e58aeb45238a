"""From logits to the next token. Shapes: V vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tryplicity.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. temperature 0: always the likeliest."""

    temperature: float = 0.8
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    repetition_penalty: float = 1.0  # Keskar et al., arXiv:1909.05858; 1: none
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, good, range_ in (("temperature", self.temperature >= 0, "0 or more"),
                                   ("top_k", self.top_k >= 0, "0 (all) or more"),
                                   ("top_p", 0 < self.top_p <= 1, "over 0, up to 1"),
                                   ("repetition_penalty", self.repetition_penalty > 0, "over 0")):
            if not good:
                raise UserError(f"{name} is {getattr(self, name)}; it must be {range_}")


def filtered(logits_V: Tensor, sampling: Sampling) -> Tensor:
    """Logits with everything outside the top k and the nucleus of mass p set to -inf."""
    if 0 < sampling.top_k < logits_V.shape[-1]:
        smallest = logits_V.topk(sampling.top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < smallest, -torch.inf)
    if sampling.top_p < 1:
        sorted_V, order_V = logits_V.sort(descending=True)
        probability_V = sorted_V.softmax(-1)
        outside_V = probability_V.cumsum(-1) - probability_V >= sampling.top_p  # the first is never outside
        logits_V = logits_V.masked_fill(outside_V.scatter(0, order_V, outside_V), -torch.inf)
    return logits_V


class Sampler:
    """Chooses tokens one after another for one sequence; remembers which it has seen."""

    def __init__(self, sampling: Sampling, seen: list[int], device: torch.device) -> None:
        self.sampling = sampling
        self.generator = torch.Generator(device)
        if sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(sampling.seed)
        self.seen = torch.tensor(sorted(set(seen)), device=device) if sampling.repetition_penalty != 1 else None

    def __call__(self, logits_V: Tensor) -> int:
        sampling = self.sampling
        if self.seen is not None and len(self.seen):
            value = logits_V[self.seen]
            penalty = sampling.repetition_penalty
            logits_V = logits_V.index_copy(0, self.seen, torch.where(value > 0, value / penalty, value * penalty))
        if sampling.temperature == 0:
            token = int(logits_V.argmax())
        else:
            probability_V = filtered(logits_V.float() / sampling.temperature, sampling).softmax(-1)
            token = int(torch.multinomial(probability_V, 1, generator=self.generator))
        if self.seen is not None:
            self.seen = torch.cat([self.seen, self.seen.new_tensor([token])]).unique()
        return token
