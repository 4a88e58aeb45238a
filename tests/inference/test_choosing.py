"""Tokens chosen for many rows at once: the very tokens that each row's own sampler chooses, and as often as they are
probable."""

import math
import random

import pytest
import torch
from scipy.stats import chi2

from tryplicity.inference.choosing import next_tokens, told
from tryplicity.inference.sampler import Sampler, Sampling

NOT_FINITE = (math.nan, math.inf, -math.inf)


def settings(draw, size=3, penalties=False):
    """Any options together, each off as often as not, the extremes among them."""
    def pick(off, *values):
        return draw.choice(values) if draw.random() < 0.5 else off

    return Sampling(temperature=pick(0.8, 0.0, 1e-3, 0.5, 1.0, 3.0, 5e-324), top_k=pick(0, 1, 2, 5, 40, 10_000),
                    top_p=pick(1.0, 1e-6, 0.3, 0.7, 0.95, 0.9999), min_p=pick(0.0, 0.01, 0.2, 1.0),
                    seed=draw.randrange(1 << 30), **(adjusting(draw, size) if penalties else {}))


def adjusting(draw, size):
    """Penalties and biases, together or not."""
    options = {"repetition_penalty": draw.choice([1.3, 0.7]), "presence_penalty": draw.choice([0.4, -0.3]),
               "frequency_penalty": draw.choice([0.35, -0.2]),
               "logit_bias": {draw.randrange(size): draw.uniform(-3, 3) for _ in range(3)}}
    return {name: value for name, value in options.items() if draw.random() < 0.4}


def rows_of_logits(draw, rows, size, dtype):
    """Random ones; some rows with equals, with tokens that may not come, with one candidate, or all alike."""
    generator = torch.Generator().manual_seed(draw.randrange(1 << 30))
    logits_RV = 3 * torch.randn(rows, size, generator=generator)
    for logits_V in logits_RV:
        kind = draw.randrange(6)
        if kind == 1:
            logits_V.copy_(logits_V.round())
        elif kind == 2:
            logits_V[torch.rand(size, generator=generator) < 0.5] = -math.inf
            logits_V[draw.randrange(size)] = 0.5
        elif kind == 3:
            logits_V.fill_(-math.inf)[draw.randrange(size)] = 1.5
        elif kind == 4:
            logits_V.fill_(-2.0)
    return logits_RV.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (1, 300), (2, 7), (5, 1000), (17, 64), (64, 300)])
@pytest.mark.parametrize("penalties", [False, True])
def test_each_row_gets_the_token_of_its_own_sampler(rows, size, dtype, penalties):
    """Those that remember what they chose, too, whoever chose it."""
    draw = random.Random(rows * size)
    options = [settings(draw, size, penalties) for _ in range(rows)]
    prompts = [draw.choices(range(size), k=draw.randrange(5)) for _ in range(rows)]
    alone, together = ([*map(Sampler, options, prompts)] for _ in range(2))
    for step in range(20):
        logits_RV = rows_of_logits(draw, rows, size, dtype)
        wanted = [sampler(logits_V) for sampler, logits_V in zip(alone, logits_RV, strict=True)]
        if step % 5 == 3:  # alone in between
            assert [sampler(logits_V) for sampler, logits_V in zip(together, logits_RV, strict=True)] == wanted
            continue
        assert next_tokens(logits_RV, together).tolist() == wanted
        for sampler, token in zip(together, wanted, strict=True):
            sampler.took(token)
    # one random number for each token that is drawn, as there
    assert [own.number() for own in together] == [own.number() for own in alone]


@pytest.mark.parametrize("number", [0.0, 0.5, math.nextafter(1.0, 0.0)])
def test_at_the_ends_of_the_numbers_no_token_comes_that_may_not(number):
    class Told(Sampler):
        def number(self):
            return number

    draw = random.Random(0)
    logits_RV = torch.cat([torch.full((32, 3), -math.inf), rows_of_logits(draw, 32, 60, torch.float32),
                           torch.full((32, 3), -math.inf)], 1)
    samplers = [Told(settings(draw)) for _ in logits_RV]
    tokens = next_tokens(logits_RV, samplers).tolist()
    assert tokens == [sampler(logits_V) for sampler, logits_V in zip(samplers, logits_RV, strict=True)]
    assert all(logits_V[token] > -math.inf for token, logits_V in zip(tokens, logits_RV, strict=True))


def test_rows_that_need_no_number_take_none():
    logits_RV = torch.tensor([[0.0, 2.0, 1.0]]).repeat(3, 1)
    greedy, drawn = Sampler(Sampling(temperature=0, seed=3)), Sampler(Sampling(temperature=1e-3, seed=3))
    assert next_tokens(logits_RV, [None, greedy, drawn]).tolist() == [1, 1, 1]
    fresh = random.Random(3)
    assert greedy.number() == fresh.random() and drawn.number() == fresh.random()


@pytest.mark.parametrize("options", [{}, {"temperature": 2.0}, {"top_k": 4}, {"top_p": 0.75}, {"min_p": 0.3},
                                     {"temperature": 0.7, "top_k": 4, "top_p": 0.9, "min_p": 0.15}])
def test_tokens_come_as_often_as_they_are_probable(options):
    """Pearson's test at one in a thousand, of fixed seeds; the probabilities worked out one option after the other."""
    probable, draws = [0.4, 0.25, 0.15, 0.1, 0.07, 0.03], 20_000
    options = {"temperature": 1.0} | options
    weights = [p ** (1 / options["temperature"]) for p in probable]  # falling, so that what is left out is at the end
    weights = weights[:options.get("top_k") or None]
    total, kept = sum(weights), []
    for weight in weights:
        if sum(kept) < options.get("top_p", 1.0) * total:
            kept.append(weight)
    kept = [weight for weight in kept if weight >= options.get("min_p", 0.0) * weights[0]]
    expected = [draws * weight / sum(kept) for weight in kept]
    logits_RV = torch.tensor(probable).log().repeat(draws, 1)
    tokens_R = next_tokens(logits_RV, [Sampler(Sampling(seed=seed, **options)) for seed in range(draws)])
    counts = torch.bincount(tokens_R, minlength=len(probable)).tolist()
    assert sum(counts[len(kept):]) == 0
    surprise = sum((count - due) ** 2 / due for count, due in zip(counts, expected, strict=False))
    assert surprise < chi2.ppf(0.999, len(kept) - 1)


@pytest.mark.parametrize("bad", NOT_FINITE)
def test_a_row_without_a_likeliest_token_spoils_no_other(bad):
    logits_RV = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    options = [{"temperature": 0}, {}, {"top_p": 0.9}, {"top_k": 3}]
    wanted = next_tokens(logits_RV, [Sampler(Sampling(seed=1, **own)) for own in options]).tolist()
    for row in range(4):
        spoilt_RV = logits_RV.clone()
        spoilt_RV[row, 7 if bad != -math.inf else slice(None)] = bad
        found = next_tokens(spoilt_RV, [Sampler(Sampling(seed=1, **own)) for own in options]).tolist()
        assert found == [-1 if i == row else token for i, token in enumerate(wanted)]


def test_the_host_looks_at_nothing():
    """Where there are no values, asking for one is an error."""
    samplers = [None, *(Sampler(Sampling(**own)) for own in ({}, {"temperature": 0}, {"top_p": 0.9}, {"top_k": 3},
                                                           {"presence_penalty": 1.0, "logit_bias": {3: 1.0}}))]
    tokens_R = next_tokens(torch.empty(6, 300, device="meta"), samplers)
    assert tokens_R.is_meta and tokens_R.shape == (6,) and tokens_R.dtype == torch.int64


def test_what_is_told_of_rows_is_what_is_told_of_each():
    logits_RV = 3 * torch.randn(3, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens, alternatives = [5, 299, 0], [0, 4, 20]
    for token, count, logits_V, found in zip(tokens, alternatives, logits_RV,
                                             told(tokens, logits_RV, alternatives), strict=True):
        logprob_V = logits_V - logits_V.exp().sum().log()
        best = sorted(range(300), key=lambda i: -logprob_V[i])[:count]
        assert found.id == token and [number for number, _ in found.top] == best
        due = [logprob_V[i] for i in (token, *best)]
        assert [found.logprob, *(value for _, value in found.top)] == pytest.approx([float(x) for x in due], abs=1e-5)
        assert told([token], logits_V[None], [count]) == [found]
