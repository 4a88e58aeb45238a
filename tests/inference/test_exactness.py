"""What an engine says of its own exactness is so."""


import pytest
import torch

from tests.inference.test_engine import ask
from tryplicity.inference.engine import Engine
from tryplicity.inference.sampler import Sampling


def probabilities(engine, requests):
    """Of each request's tokens, all at once, with what the model gave them."""
    heard = [[] for _ in requests]
    generations = [engine.submit(request, lambda piece, into=into: into.extend(piece.tokens))
                   for request, into in zip(requests, heard, strict=True)]
    assert all(generation.wait(60) for generation in generations)
    return heard


def differ(model, **options):
    """Answers whose probabilities are others among others than alone."""
    requests = [ask(number, 6, Sampling(seed=number), length=5 + 9 * number, logprobs=2) for number in range(6)]
    engine = Engine(model, None, slots=4, chunk=16, prefix_bytes=0)
    together = probabilities(engine, requests)
    alone = Engine(model, None, slots=1, prefix_bytes=0)
    return engine.card, sum(probabilities(alone, [request])[0] != those
                            for request, those in zip(requests, together, strict=True))


def test_packed_models_are_exact(packed_model):
    card, different = differ(packed_model)
    assert (card.exact, card.inexact, different) == (True, None, 0)


@pytest.mark.parametrize("linear, dtype", [("linear", torch.float32), ("bitlinear", torch.bfloat16)])
def test_a_model_that_rounds_otherwise_in_company_says_so(make_packed, linear, dtype):
    """Plain linears, bf16: if it calls itself exact, its answers are."""
    card, different = differ(make_packed(linear=linear, dtype=dtype))
    assert card.exact == (card.inexact is None)
    if card.exact:
        assert different == 0
    else:
        assert "differently in other company" in card.inexact


def test_one_part_that_is_not_exact_is_named(make_packed):
    """The second layer's norm in an order that depends on the number of tokens."""
    model = make_packed()
    norm = model.layers[1].feed_forward.norm
    forward = norm.forward
    norm.forward = lambda x: forward(x) * (1 if x.shape[1] < 30 else 1 + 2.0**-22)
    assert "layer 1 (" in Engine(model, None).card.inexact
    table = make_packed()
    logits = table.logits
    table.logits = lambda h: logits(h) * (1 if h.shape[0] == 1 else 1 + 2.0**-22)
    assert "the output table" in Engine(table, None).card.inexact
