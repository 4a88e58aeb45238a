"""From logits to the next token. Shapes: V vocabulary, N candidates."""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from tryplicity.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. temperature 0: always the likeliest.

    In this order: penalties and biases change the logits, the temperature divides them, top_k, top_p and min_p leave
    some out, and one of the rest is drawn.
    """

    temperature: float = 0.8
    top_k: int = 0  # 0: all
    top_p: float = 1.0  # the likeliest whose probabilities reach this together
    min_p: float = 0.0  # those at least so many times as probable as the likeliest (Nguyen et al., arXiv:2407.01082)
    repetition_penalty: float = 1.0  # of words in prompt and text: Keskar et al., arXiv:1909.05858; 1: none
    presence_penalty: float = 0.0  # off the logit of each token in the text (OpenAI's)
    frequency_penalty: float = 0.0  # likewise, once for each time it is there
    seed: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # added to the logits of tokens

    def __post_init__(self) -> None:
        for name, good, range_ in (("temperature", self.temperature >= 0, "0 or more"),
                                   ("top_k", self.top_k >= 0, "0 (all) or more"),
                                   ("top_p", 0 < self.top_p <= 1, "over 0, up to 1"),
                                   ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
                                   ("repetition_penalty", self.repetition_penalty > 0, "over 0"),
                                   ("presence_penalty", math.isfinite(self.presence_penalty), "a finite number"),
                                   ("frequency_penalty", math.isfinite(self.frequency_penalty), "a finite number")):
            value = getattr(self, name)
            if not (good and math.isfinite(value)):
                raise UserError(f"{name} is {value}; it must be {range_}")
        for token, bias in self.logit_bias.items():
            if not isinstance(token, int) or token < 0 or not math.isfinite(bias):
                raise UserError(f"logit_bias: {token!r}: {bias!r}; it must give token numbers finite biases")

    @property
    def plain(self) -> bool:
        """Whether the logits are used as they come."""
        return (self.repetition_penalty == 1 and self.presence_penalty == 0 and self.frequency_penalty == 0
                and not self.logit_bias)


def filtered(logits_V: Tensor, sampling: Sampling) -> Tensor:
    """Logits, divided by the temperature already, with everything outside top_k, then outside top_p of what that left,
    then outside min_p set to -inf. Equals stand or fall together under top_k and min_p; under top_p the smaller
    number comes first."""
    if 0 < sampling.top_k < logits_V.shape[-1]:
        smallest = logits_V.topk(sampling.top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < smallest, -torch.inf)
    if sampling.top_p < 1:
        sorted_V, order_V = logits_V.sort(descending=True, stable=True)
        probability_V = sorted_V.softmax(-1)
        outside_V = probability_V.cumsum(-1) - probability_V >= sampling.top_p  # the first is never outside
        logits_V = logits_V.masked_fill(outside_V.scatter(0, order_V, outside_V), -torch.inf)
    if sampling.min_p > 0:
        probability_V = logits_V.softmax(-1)
        logits_V = logits_V.masked_fill(probability_V < sampling.min_p * probability_V.max(), -torch.inf)
    return logits_V


def candidates(logits_V: np.ndarray, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that `filtered` leaves of logits over the temperature, and fp64 weights in the ratio of their
    probabilities; without putting the vocabulary in order, which costs more than all the rest."""
    with np.errstate(over="ignore"):  # the coldest divide by so little that all but the largest are -inf
        weight_V = np.exp((logits_V.astype(np.float64) - logits_V.max()) / sampling.temperature)  # the largest is 1
    smallest = 0.0
    if 0 < sampling.top_k < len(weight_V):
        smallest = float(np.partition(weight_V, -sampling.top_k)[-sampling.top_k])
    if sampling.top_p == 1:
        smallest = max(smallest, sampling.min_p)
    token_N = np.flatnonzero(weight_V >= smallest) if smallest > 0 else np.arange(len(weight_V))
    weight_N = weight_V[token_N]
    if sampling.top_p < 1:
        inside_N = _nucleus(weight_N, sampling.top_p) & (weight_N >= sampling.min_p)
        token_N, weight_N = token_N[inside_N], weight_N[inside_N]
    return token_N, weight_N


def _nucleus(weight_N: np.ndarray, top_p: float) -> np.ndarray:
    """Which are the largest, so many that each has less than `top_p` of the sum before it; of equals the first."""
    falling_N = np.sort(weight_N)[::-1]
    sums_N = np.cumsum(falling_N)
    count = int(np.searchsorted(sums_N, top_p * sums_N[-1])) + 1
    last = falling_N[min(count, len(falling_N)) - 1]
    inside_N = weight_N > last
    inside_N[np.flatnonzero(weight_N == last)[:count - int(inside_N.sum())]] = True
    return inside_N


class Sampler:
    """Chooses tokens one after another for one sequence; remembers which it has seen.

    It draws one random number for each token, whatever else there is, so that a seed gives the same text alone, in a
    batch, and where tokens are drafted.
    """

    def __init__(self, sampling: Sampling, prompt: Iterable[int] = ()) -> None:
        """prompt: the words that the repetition penalty counts as seen."""
        self.sampling = sampling
        #: the different words of the prompt, then the tokens of the text, where any of them count
        self.words = array("q", () if sampling.plain else sorted(set(prompt)))
        self.prompt_words = len(self.words)
        self._random = random.Random(sampling.seed)
        self._seen_V: np.ndarray | None = None  # in prompt or text
        self._count_V: np.ndarray | None = None  # in the text
        self._counted = 0  # of `words`, in these two
        self._biased = list(sampling.logit_bias), list(sampling.logit_bias.values())
        #: whether the likeliest of the model's own logits is always the next
        self.greedy = sampling.temperature == 0 and sampling.plain

    def number(self) -> float:
        """The random number of the next token, where that is drawn: from 0 to 1, without 1."""
        return self._random.random()

    def __call__(self, logits_V: Tensor, allowed_V: Tensor | None = None) -> int:
        """The next token. allowed_V: true for those that may come, by what the text must satisfy."""
        sampling = self.sampling
        wide = torch.promote_types(logits_V.dtype, torch.float32)  # NumPy has no bf16
        logits_V = self._adjusted(logits_V.detach().to("cpu", wide).numpy())
        if allowed_V is not None:
            logits_V = np.where(allowed_V.numpy(), logits_V, -np.inf)
        token = int(logits_V.argmax())
        if not math.isfinite(logits_V[token]):
            raise ArithmeticError(f"the model's logits are {logits_V[token]}")
        if sampling.temperature > 0:
            token_N, weight_N = candidates(logits_V, sampling)
            sums_N = np.cumsum(weight_N)
            drawn = int(np.searchsorted(sums_N, self.number() * sums_N[-1], side="right"))
            token = int(token_N[min(drawn, len(token_N) - 1)])
        self.took(token)
        return token

    def took(self, token: int) -> None:
        """Remember a token that was chosen elsewhere."""
        if not self.sampling.plain:
            self.words.append(token)

    def _adjusted(self, logits_V: np.ndarray) -> np.ndarray:
        """The logits after penalties and biases."""
        sampling = self.sampling
        if sampling.plain:
            return logits_V
        if self._seen_V is None:
            self._seen_V, self._count_V = np.zeros(len(logits_V), dtype=bool), np.zeros(len(logits_V), logits_V.dtype)
        new = np.array(self.words[self._counted:], dtype=np.int64)
        self._seen_V[new] = True
        np.add.at(self._count_V, new[max(0, self.prompt_words - self._counted):], 1)
        self._counted = len(self.words)
        logits_V = logits_V.copy()
        if sampling.repetition_penalty != 1:
            seen_N, penalty = logits_V[self._seen_V], sampling.repetition_penalty
            logits_V[self._seen_V] = np.where(seen_N > 0, seen_N / penalty, seen_N * penalty)
        if sampling.presence_penalty:
            logits_V -= sampling.presence_penalty * (self._count_V > 0)
        if sampling.frequency_penalty:
            logits_V -= sampling.frequency_penalty * self._count_V
        tokens, biases = self._biased
        logits_V[tokens] += biases
        return logits_V
