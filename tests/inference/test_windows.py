"""Attention that sees a window, served: exact in any company, with a bounded cache, packed or not."""

import pytest
import torch

from tests.inference.test_engine import ask
from tests.inference.test_exactness import differ
from tryplicity.inference.engine import Engine
from tryplicity.inference.prefix import tensors
from tryplicity.inference.sampler import Sampling

OPTIONS = ["blocks.attention.mixer={type: gqa, heads: 4, kv_heads: 2, head_dim: 8, window: 70, rotary_fraction: 0.5, "
           "softcap: 2.0, out_norm: true, qk_norm: true, qk_norm_over: width}",
           "blocks.memory.feed_forward={type: gated_mlp, inner_size: 48, inner_norm: true, gate_multiplier: 0.8}",
           "norms=around", "embedding_multiplier=2.0", "logits_multiplier=0.5"]
POSITIONLESS = ["blocks.attention.mixer={type: gqa, heads: 4, kv_heads: 2, head_dim: 8, rope_base: null, scale: 0.2}",
                "blocks.memory.feed_forward={type: mlp, inner_size: 48}", "residual={type: add, multiplier: 0.5}"]


@pytest.mark.parametrize("settings", [OPTIONS, POSITIONLESS], ids=["windows", "no positions"])
def test_packed_models_are_exact(make_packed, settings):
    card, different = differ(make_packed(*settings))
    assert (card.exact, card.inexact, different) == (True, None, 0)


@pytest.mark.parametrize("speculative", [False, True])
def test_a_long_answer_is_as_plain_decoding_gives_it(make_packed, plain, speculative):
    """Past the window, from a kept prefix, with guesses ahead: the same tokens."""
    model = make_packed(*OPTIONS)
    engine = Engine(model, None, chunk=48, speculative=speculative)
    try:
        for length in (100, 130):
            request = ask(3, 90, Sampling(temperature=0), length=length)
            answer = [token.id for piece in engine.generate(request) for token in piece.tokens]
            assert answer == plain(model, request)
    finally:
        engine.close()


@torch.inference_mode()
def test_the_cache_stays_as_it_was_when_the_window_was_full(make_packed):
    model, sizes = make_packed(*OPTIONS), []
    state = model.new_state(1)
    for read in (192, 64, 64, 640):
        model.hidden(torch.randint(6, 300, (1, read)), state=state)
        sizes.append(sum(tensor.nbytes for tensor in tensors(state[1])))
    assert len(set(sizes)) == 1 and state[1][0]["seen"] == 960
