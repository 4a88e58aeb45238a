"""The next tokens of several sequences in one pass, where their logits are, and what the model thought of them.

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tryplicity.inference.generation import MOST_LOGPROBS, Token
from tryplicity.inference.sampler import Sampler


def next_tokens(logits_RV: Tensor, samplers: Sequence[Sampler | None]) -> Tensor:
    """int64 [R]: the token that each of these chooses from its row, to the rounding of sums; -1 where the logits are
    not finite. None: the likeliest. The host waits for nothing.

    Each that draws takes one random number, from its own generator, as it does alone. What was chosen it is to be told:
    `Sampler.took`.
    """
    if any(sampler is not None and not sampler.sampling.plain for sampler in samplers):
        logits_RV = _adjusted(logits_RV, samplers)
    best_R1, token_R1 = logits_RV.max(-1, keepdim=True)
    if any(sampler is not None and sampler.sampling.temperature > 0 for sampler in samplers):
        token_R1 = _drawn(logits_RV, best_R1, token_R1, samplers)
    return token_R1.where(best_R1.isfinite(), -1)[:, 0]


def _exact(logits_RV: Tensor) -> torch.dtype:
    return torch.float32 if logits_RV.device.type == "mps" else torch.float64  # the former has no fp64


def _there(values: Any, logits_RV: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers of the host where the logits are, without waiting for what is computed there."""
    return torch.as_tensor(values, dtype=dtype).to(logits_RV.device, non_blocking=True)


def _adjusted(logits_RV: Tensor, samplers: Sequence[Sampler | None]) -> Tensor:
    """The logits after penalties and biases, as Sampler rounds them. L words of each row; those that it lacks are V."""
    (R, V), device = logits_RV.shape, logits_RV.device
    wide, exact = torch.promote_types(logits_RV.dtype, torch.float32), _exact(logits_RV)
    words = [() if sampler is None else sampler.words for sampler in samplers]
    words_RL = np.full((R, max(map(len, words))), V)
    for row, own in enumerate(words):
        words_RL[row, :len(own)] = own
    words_RL = _there(words_RL, logits_RV)
    given = [(1.0, 0.0, 0.0, 0) if sampler is None else
             (sampler.sampling.repetition_penalty, sampler.sampling.presence_penalty,
              sampler.sampling.frequency_penalty, sampler.prompt_words) for sampler in samplers]
    repetition_R1, presence_R1, frequency_R1, prompt_R1 = _there(given, logits_RV, exact).split(1, -1)

    in_text_RL = (torch.arange(words_RL.shape[1], device=device) >= prompt_R1).to(wide)
    count_RV = torch.zeros(R, V + 1, dtype=wide, device=device).scatter_add_(1, words_RL, in_text_RL)[:, :V]
    seen_RV = torch.zeros(R, V + 1, dtype=torch.bool, device=device).scatter_(1, words_RL, True)[:, :V]
    logits_RV, repetition_R1 = logits_RV.to(wide), repetition_R1.to(wide)
    penalised_RV = (logits_RV / repetition_R1).where(logits_RV > 0, logits_RV * repetition_R1)
    logits_RV = penalised_RV.where(seen_RV, logits_RV)
    logits_RV = (logits_RV.to(exact) - presence_R1 * (count_RV > 0)).to(wide) - frequency_R1.to(wide) * count_RV
    biases = [(row, token, bias) for row, sampler in enumerate(samplers) if sampler is not None
              for token, bias in sampler.sampling.logit_bias.items()]
    if biases:
        where_N2 = _there([place for *place, _ in biases], logits_RV)
        bias_N = _there([bias for *_, bias in biases], logits_RV, exact)
        biased_N = logits_RV[where_N2[:, 0], where_N2[:, 1]].to(exact) + bias_N
        logits_RV = logits_RV.index_put((where_N2[:, 0], where_N2[:, 1]), biased_N.to(wide))
    return logits_RV


def _drawn(logits_RV: Tensor, best_R1: Tensor, likeliest_R1: Tensor, samplers: Sequence[Sampler | None]) -> Tensor:
    """As `candidates` and Sampler do it for one row."""
    filtering, given = False, []
    for sampler in samplers:
        if sampler is None or sampler.sampling.temperature == 0:
            given.append((0.0, 0.0, 0, 1.0, 0.0))
        else:
            options = sampler.sampling
            filtering = filtering or options.top_k > 0 or options.top_p < 1
            given.append((sampler.number(), options.temperature, options.top_k, options.top_p, options.min_p))
    exact = _exact(logits_RV)
    number_R1, temperature_R1, top_k_R1, top_p_R1, min_p_R1 = _there(given, logits_RV, exact).split(1, -1)
    weight_RV = (logits_RV.to(exact) - best_R1.to(exact)).div_(temperature_R1.where(temperature_R1 > 0, 1)).exp_()
    inside_RV = weight_RV >= min_p_R1  # the largest weight is 1
    if filtering:
        inside_RV &= _filtered(logits_RV, weight_RV, top_k_R1, top_p_R1)
    sums_RV = weight_RV.mul_(inside_RV).cumsum(-1)
    beyond_RV = inside_RV & (sums_RV > number_R1 * sums_RV[:, -1:])
    # sums that are made in parts may leave none for a number next to 1
    draws_R1 = (temperature_R1 > 0) & beyond_RV.any(-1, keepdim=True)
    return beyond_RV.to(torch.uint8).argmax(-1, keepdim=True).where(draws_R1, likeliest_R1)  # the first of them


def _filtered(logits_RV: Tensor, weight_RV: Tensor, top_k_R1: Tensor, top_p_R1: Tensor) -> Tensor:
    """Which weights are inside top_k, and inside top_p of what that leaves. Equals stand or fall together under top_k;
    under top_p the smaller number comes first."""
    order_RV = logits_RV.sort(dim=-1, descending=True, stable=True).indices  # of fewer bits than the weights
    falling_RV, size = weight_RV.gather(-1, order_RV), weight_RV.shape[1]
    last_R1 = top_k_R1.where(top_k_R1 > 0, size).clamp(max=size).long() - 1
    inside_RV = falling_RV >= falling_RV.gather(-1, last_R1)
    sums_RV = falling_RV.mul_(inside_RV).cumsum(-1)
    inside_RV &= F.pad(sums_RV[:, :-1], (1, 0)) < top_p_R1 * sums_RV[:, -1:]
    return torch.empty_like(inside_RV).scatter_(-1, order_RV, inside_RV)


def told(tokens: Sequence[int], logits_RV: Tensor, alternatives: Sequence[int]) -> list[Token]:
    """The tokens of rows, each with the natural logarithm of its probability and so many of the likeliest in its
    place."""
    logprob_RV = logits_RV.float().log_softmax(-1)
    # always as many, so that of equals the same ones come first whatever others ask for
    top = logprob_RV.topk(min(MOST_LOGPROBS, logprob_RV.shape[1]) if any(alternatives) else 0)
    own_R1 = logprob_RV.gather(-1, torch.tensor(tokens, device=logits_RV.device)[:, None])
    return [Token(token, own, tuple(zip(numbers[:count], best[:count], strict=True)))
            for token, count, numbers, (own, *best) in zip(
                tokens, alternatives, top.indices.tolist(), torch.cat((own_R1, top.values), -1).tolist(), strict=True)]
