"""Each option of sampling against probabilities computed by hand."""

import math
import warnings

import pytest
import torch

from tryplicity.errors import UserError
from tryplicity.inference.sampler import Sampler, Sampling, candidates, filtered

PROBABILITIES = [0.5, 0.2, 0.15, 0.1, 0.05]
LOGITS = torch.log(torch.tensor(PROBABILITIES))
GREEDY = {"temperature": 0.0}


def frequencies(logits, sampling, draws=4000, size=5):
    """Of single draws, each by a sampler of its own, as penalties change what comes after."""
    sampler = Sampler(sampling)
    counts = torch.bincount(torch.tensor([sampler(logits) for _ in range(draws)]), minlength=size)
    return counts / draws


@pytest.mark.parametrize("options, expected", [
    ({}, PROBABILITIES),
    ({"temperature": 0.5}, [0.25, 0.04, 0.0225, 0.01, 0.0025]),  # squares
    ({"temperature": 2.0}, [p ** 0.5 for p in PROBABILITIES]),
    ({"top_k": 2}, [0.5, 0.2, 0, 0, 0]),
    ({"top_p": 0.8}, [0.5, 0.2, 0.15, 0, 0]),
    ({"min_p": 0.25}, [0.5, 0.2, 0.15, 0, 0]),  # at least 0.125
    ({"min_p": 1.0}, [1, 0, 0, 0, 0]),
    ({"top_k": 4, "top_p": 0.75}, [0.5, 0.2, 0.15, 0, 0]),  # 0.7 of 0.95 is under 0.75
    ({"top_k": 3, "min_p": 0.35}, [0.5, 0.2, 0, 0, 0]),
    ({"top_p": 0.8, "min_p": 0.35}, [0.5, 0.2, 0, 0, 0]),
    ({"logit_bias": {4: math.log(10.0)}}, [0.5, 0.2, 0.15, 0.1, 0.5]),
    ({"logit_bias": {0: -100.0}}, [0, 0.2, 0.15, 0.1, 0.05]),
])
def test_draws_follow_the_distribution(options, expected):
    sampling = Sampling(**{"temperature": 1.0, "seed": 0} | options)
    expected = torch.tensor(expected) / sum(expected)
    got = frequencies(LOGITS, sampling)
    torch.testing.assert_close(got, expected, atol=4 * math.sqrt(0.25 / 4000), rtol=0)
    assert (got[expected == 0] == 0).all()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("options", [
    {}, {"top_k": 7}, {"top_p": 0.6}, {"top_p": 0.999}, {"min_p": 0.1}, {"top_k": 400, "top_p": 0.9, "min_p": 0.01},
    {"top_k": 5, "top_p": 0.5, "min_p": 0.3}, {"top_p": 1e-6}, {"top_k": 1}])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_the_fast_filter_is_the_plain_one(options, temperature, seed):
    logits = 3 * torch.randn(1000, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    logits[500:520] = logits[:20]  # equals
    sampling = Sampling(temperature=temperature, **options)
    tokens, weights = (torch.from_numpy(array) for array in candidates(logits.numpy(), sampling))
    fast = torch.zeros(1000, dtype=torch.float64).scatter(0, tokens, weights / weights.sum())
    torch.testing.assert_close(fast, filtered(logits / temperature, sampling).softmax(-1))


def test_tokens_that_may_not_come_never_do():
    allowed = torch.tensor([False, True, False, False, True])
    sampler = Sampler(Sampling(temperature=1.0, seed=0))
    counts = torch.bincount(torch.tensor([sampler(LOGITS, allowed) for _ in range(2000)]), minlength=5) / 2000
    torch.testing.assert_close(counts, torch.tensor([0, 0.8, 0, 0, 0.2]), atol=0.05, rtol=0)
    assert Sampler(Sampling(temperature=0))(LOGITS, allowed) == 1


def test_presence_counts_once_and_frequency_each_time():
    logits = torch.tensor([3.0, 2.5, 1.8, -9.0])
    presence = Sampler(Sampling(**GREEDY, presence_penalty=1.0))
    assert [presence(logits) for _ in range(4)] == [0, 1, 0, 0]  # 3, 2.5; 2, 1.5 against 1.8; then as it was
    frequency = Sampler(Sampling(**GREEDY, frequency_penalty=1.0))
    # 3 | 2 2.5 | 2 1.5 1.8 | 1 1.5 1.8 | 1 1.5 .8
    assert [frequency(logits) for _ in range(5)] == [0, 1, 0, 2, 1]
    assert Sampler(Sampling(**GREEDY, presence_penalty=-1.0, frequency_penalty=-1.0))(logits) == 0


def test_penalties_of_the_text_leave_the_prompt_alone_and_repetition_does_not():
    logits = torch.tensor([2.0, 1.5])
    assert Sampler(Sampling(**GREEDY, presence_penalty=1.0, frequency_penalty=1.0), [0, 0])(logits) == 0
    assert Sampler(Sampling(**GREEDY, repetition_penalty=2.0), [0, 0])(logits) == 1


def test_bias_is_added_after_the_penalty_on_repetition():
    sampler = Sampler(Sampling(**GREEDY, repetition_penalty=2.0, logit_bias={0: 1.0}), [0])
    assert sampler(torch.tensor([2.0, 1.9])) == 0  # 2 / 2 + 1 = 2
    assert Sampler(Sampling(**GREEDY, logit_bias={1: 0.2}))(torch.tensor([2.0, 1.9])) == 1


def test_a_seed_gives_the_same_tokens_and_another_does_not():
    logits = torch.zeros(1000)
    first, same, other = (Sampler(Sampling(temperature=1.0, seed=seed)) for seed in (7, 7, 8))
    drawn = [[sampler(logits) for _ in range(20)] for sampler in (first, same, other)]
    assert drawn[0] == drawn[1] != drawn[2]
    unseeded = [[sampler(logits) for _ in range(20)] for sampler in (Sampler(Sampling()), Sampler(Sampling()))]
    assert unseeded[0] != unseeded[1]


def test_one_random_number_a_token_whatever_the_options():
    """So that drafted and plain decoding, and greedy steps between, keep the same numbers."""
    plain, filtering = Sampler(Sampling(seed=1)), Sampler(Sampling(seed=1, top_k=3, presence_penalty=0.5))
    for _ in range(5):
        plain(LOGITS), filtering(LOGITS)
    assert plain._random.random() == filtering._random.random()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_an_error(bad):
    with pytest.raises(ArithmeticError, match="logits"):
        Sampler(Sampling())(torch.tensor([0.0, bad, 1.0]))


@pytest.mark.parametrize("options", [{"min_p": -0.1}, {"min_p": 1.1}, {"presence_penalty": math.nan},
                                     {"frequency_penalty": math.inf}, {"temperature": math.nan},
                                     {"top_p": math.nan}, {"logit_bias": {-1: 1.0}}, {"logit_bias": {1: math.inf}},
                                     {"logit_bias": {"a": 1.0}}])
def test_impossible_options_are_refused(options):
    with pytest.raises(UserError, match=next(iter(options))):
        Sampling(**options)


def test_the_smallest_temperature_is_that_of_the_likeliest():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Sampler(Sampling(temperature=5e-324, seed=0))(torch.tensor([1.0, 3.0, -40.0])) == 1
