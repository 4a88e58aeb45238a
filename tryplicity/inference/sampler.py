"""From logits to the next token. Shapes: V vocabulary, N candidates."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

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


def candidates(logits_V: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The tokens that `filtered` leaves of logits over the temperature, and fp64 weights in the ratio of their
    probabilities. The same without sorting the vocabulary, which costs more than all the rest."""
    weight_V = (logits_V.double() - float(logits_V.max())).div_(sampling.temperature).exp_()  # the largest is 1
    smallest = 0.0
    if 0 < sampling.top_k < len(weight_V):
        smallest = float(weight_V.topk(sampling.top_k).values[-1])
    if sampling.top_p == 1:
        smallest = max(smallest, sampling.min_p)
    token_N = (weight_V >= smallest).nonzero()[:, 0] if smallest > 0 else torch.arange(len(weight_V))
    weight_N = weight_V[token_N]
    if sampling.top_p < 1:
        token_N, weight_N = _nucleus(token_N, weight_N, sampling.top_p * float(weight_N.sum()))
        inside_N = weight_N >= sampling.min_p
        token_N, weight_N = token_N[inside_N], weight_N[inside_N]
    return token_N, weight_N


def _nucleus(token_N: Tensor, weight_N: Tensor, mass: float) -> tuple[Tensor, Tensor]:
    """The largest, so many that each has less than `mass` before it."""
    few = 256
    if len(weight_N) > few and float((top := weight_N.topk(few).values).sum()) >= mass:
        near_N = weight_N >= top[-1]  # in the order of their numbers, as a stable sort wants them
        token_N, weight_N = token_N[near_N], weight_N[near_N]
    weight_N, order_N = weight_N.sort(descending=True, stable=True)
    inside_N = weight_N.cumsum(0) - weight_N < mass
    return token_N[order_N[inside_N]], weight_N[inside_N]


class Sampler:
    """Chooses tokens one after another for one sequence; remembers which it has seen.

    It draws one random number for each token, whatever else there is, so that a seed gives the same text alone, in a
    batch, and where tokens are drafted.
    """

    def __init__(self, sampling: Sampling, prompt: Iterable[int] = ()) -> None:
        """prompt: the words that the repetition penalty counts as seen."""
        self.sampling = sampling
        self.prompt = tuple(prompt)
        self._random = random.Random(sampling.seed)
        self._seen_V: Tensor | None = None  # prompt and text
        self._count_V: Tensor | None = None  # text
        self._bias = None
        if sampling.logit_bias:
            self._bias = (torch.tensor(list(sampling.logit_bias)), torch.tensor(list(sampling.logit_bias.values())))

    @property
    def greedy(self) -> bool:
        """Whether the likeliest of the model's own logits is always the next."""
        return self.sampling.temperature == 0 and self.sampling.plain

    def __call__(self, logits_V: Tensor, allowed_V: Tensor | None = None) -> int:
        """The next token. allowed_V: true for those that may come, by what the text must satisfy."""
        sampling = self.sampling
        logits_V = self.adjusted(logits_V.detach().to("cpu"))
        if allowed_V is not None:
            logits_V = logits_V.masked_fill(~allowed_V, -torch.inf)
        best, token = (value.item() for value in logits_V.max(-1))
        if not math.isfinite(best):
            raise ArithmeticError(f"the model's logits are {best}")
        if sampling.temperature > 0:
            token_N, weight_N = candidates(logits_V, sampling)
            below_N = weight_N.cumsum(0)
            drawn = torch.searchsorted(below_N, self._random.random() * float(below_N[-1]), right=True)
            token = int(token_N[min(int(drawn), len(token_N) - 1)])
        if not sampling.plain:
            self._remember(token, len(logits_V))
        return token

    def adjusted(self, logits_V: Tensor) -> Tensor:
        """The logits after penalties and biases."""
        sampling = self.sampling
        if sampling.plain:
            return logits_V
        self._start(len(logits_V))
        if sampling.repetition_penalty != 1:
            penalty = sampling.repetition_penalty
            penalised_V = torch.where(logits_V > 0, logits_V / penalty, logits_V * penalty)
            logits_V = torch.where(self._seen_V, penalised_V, logits_V)
        if sampling.presence_penalty:
            logits_V = logits_V - sampling.presence_penalty * (self._count_V > 0)
        if sampling.frequency_penalty:
            logits_V = logits_V - sampling.frequency_penalty * self._count_V
        if self._bias is not None:
            token_N, bias_N = self._bias
            logits_V = logits_V.index_add(0, token_N, bias_N.to(logits_V.dtype))
        return logits_V

    def _start(self, vocab_size: int) -> None:
        if self._seen_V is None:
            self._seen_V, self._count_V = torch.zeros(vocab_size, dtype=torch.bool), torch.zeros(vocab_size)
            self._seen_V[list(self.prompt)] = True

    def _remember(self, token: int, vocab_size: int) -> None:
        self._start(vocab_size)
        self._seen_V[token] = True
        self._count_V[token] += 1
