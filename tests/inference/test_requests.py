"""What a request may be, to its limits; and the numbers that a generation and an engine tell, by hand."""

import threading
import types
from pathlib import Path

import pytest
import torch

from tests.inference.test_engine import GREEDY, NO_END, Ear, all_at_once, ask, settles
from tryplicity.components import Linear
from tryplicity.errors import UserError
from tryplicity.inference import scheduler
from tryplicity.inference.engine import Engine, ModelCard, Request, fits_caches
from tryplicity.inference.generation import Generation
from tryplicity.inference.packed import Info
from tryplicity.inference.sampler import Sampling

TOP = {"logprobs": 20}


@pytest.mark.parametrize("options", [{"logprobs": 0}, TOP, {"max_tokens": 1}, {"max_tokens": 0, "score_prompt": True},
                                     {"logprobs": None}])
def test_a_request_may_go_to_its_limits(options):
    Request(**{"prompt": (6,), "sampling": GREEDY, "max_tokens": 1} | options)


@pytest.mark.parametrize("options, said", [
    ({"max_tokens": -1, "score_prompt": True}, "max_tokens is -1; it must be 0 or more"),
    ({"logprobs": 21}, "logprobs is 21; it must be from 0 to 20")])
def test_and_no_further(options, said):
    with pytest.raises(UserError) as told:
        Request(**{"prompt": (6,), "sampling": GREEDY, "max_tokens": 1} | options)
    assert str(told.value) == said


def test_the_first_and_the_last_token_of_a_vocabulary_are_tokens(packed_model):
    engine = Engine(packed_model, None)
    bias = Sampling(temperature=0, logit_bias={0: -1.0, 299: 1.0})
    request = Request((0, 299), bias, 2, end_tokens=frozenset({0, 299}), **TOP)
    [*_, last] = engine.generate(request)
    assert last.finish in ("length", "stop")
    for bad in ({"prompt": (-1,)}, {"prompt": (300,)}, {"end_tokens": frozenset({300})},
                {"end_tokens": frozenset({-1})}):
        with pytest.raises(UserError, match="the tokens of this model are 0 to 299"):
            engine.submit(Request(**{"prompt": (6,), "sampling": GREEDY, "max_tokens": 1} | bad), print)
    engine.close()


def test_a_scored_prompt_tells_its_likeliest_tokens_twenty_of_them_and_none_unasked(packed_model):
    engine, prompt = Engine(packed_model, None), ask(0, length=40).prompt
    assert {len(token.top) for token in engine.score(prompt, 20).tokens[1:]} == {20}
    assert {len(token.top) for token in engine.score(prompt).tokens} == {0}
    before = engine.statistics()["tokens_total"]
    assert len(engine.score(prompt).tokens) == 40 and engine.statistics()["tokens_total"] == before == 0
    engine.close()


def test_a_prompt_that_was_not_read_when_the_engine_closed_has_no_probabilities(packed_model):
    engine, hold, told = Engine(packed_model, None, slots=1), threading.Event(), []

    def score():
        try:
            told.append(engine.score(ask(0).prompt))
        except RuntimeError as error:
            told.append(str(error))

    engine.submit(ask(1, 2), lambda piece: hold.wait(30))
    waits = threading.Thread(target=score)
    waits.start()
    assert settles(lambda: engine.statistics()["running"] + engine.statistics()["waiting"], 2)
    threading.Timer(0.1, hold.set).start()
    engine.close()
    waits.join(30)
    assert told == ["the engine was closed before the prompt was read"]


@pytest.mark.parametrize("options, good", [
    ({"slots": 1, "chunk": 1, "max_waiting": 0, "prefix_bytes": 0}, True), ({"slots": 0}, False), ({"chunk": 0}, False),
    ({"max_waiting": -1}, False), ({"prefix_bytes": -1}, False)])
def test_an_engine_may_be_as_small_as_can_be(packed_model, plain, options, good):
    if not good:
        with pytest.raises(UserError, match="slots and chunk must be 1 or more, max_waiting and prefix_bytes 0 or"):
            Engine(packed_model, None, **options)
        return
    engine = Engine(packed_model, None, **options)
    request = ask(4, 5, length=6)
    assert list(engine.tokens(request.prompt, GREEDY, 5)) == plain(packed_model, Request(request.prompt, GREEDY, 5))
    assert engine.statistics()["cached_states"] == 0
    engine.close()


def test_the_speed_of_a_generation_is_of_the_tokens_after_the_first():
    request = ask(0)
    generation = Generation(request, 13, completion_tokens=5, submitted=1.0, first=1.5, last=3.5)
    assert (generation.seconds_to_first, generation.tokens_per_second) == (0.5, 2.0)
    two = Generation(request, 13, completion_tokens=2, submitted=0.0, first=1.0, last=1.25)
    assert two.tokens_per_second == 4.0
    one = Generation(request, 13, completion_tokens=1, submitted=0.0, first=1.0, last=1.0)
    assert (one.seconds_to_first, one.tokens_per_second) == (1.0, None)
    none = Generation(request, 13)
    assert (none.seconds_to_first, none.tokens_per_second, none.cached_tokens, none.completion_tokens) == (
        None, None, 0, 0)
    assert none.wait(0) is False and none.wait(0.01) is False
    at_once = Generation(request, 13, completion_tokens=3, submitted=0.0, first=1.0, last=1.0)
    assert at_once.tokens_per_second == pytest.approx(2e9)  # a clock that does not move is no division by zero


def test_the_speed_of_an_engine_is_that_of_the_last_five_seconds_over_one_at_least(packed_model, monkeypatch):
    """By a clock of our own: 0.25 s a look, and each token has one."""
    clock = [100.0]

    def now():
        return clock[0]

    monkeypatch.setattr(scheduler, "time", types.SimpleNamespace(perf_counter=now))
    engine, ear = Engine(packed_model, None), Ear()
    assert engine.statistics()["tokens_per_second"] == 0

    def at(seconds):
        clock[0] = 100.0 + seconds
        return engine.statistics()["tokens_per_second"]

    def write(tokens):
        assert engine.submit(ask(len(ear.pieces), tokens), ear).wait(30)

    write(6)
    assert at(0) == at(0.5) == at(1) == 6.0 and at(2) == 3.0 and at(5) == 6 / 5 and at(5.5) == 0
    clock[0] = 103.0
    write(9)
    assert at(3) == 15 / 3 and at(5) == 15 / 5 and at(5.25) == 9 / 2.25 and at(8) == 9 / 5 and at(8.25) == 0
    clock[0] = 120.0
    write(2)
    assert at(20) == 2.0 and engine.statistics()["tokens_total"] == 17
    engine.close()


def test_the_numbers_of_an_engine_are_what_was_done(packed_model):
    """Two that agree in all but the last tokens, one of them twice; three slots, four may wait."""
    engine = Engine(packed_model, None, slots=3, max_waiting=4, chunk=16)
    begin = ask(5, length=70).prompt
    requests = [Request((*begin, 50), GREEDY, 3, end_tokens=NO_END), Request((*begin, 60, 61), GREEDY, 4,
                                                                             end_tokens=NO_END)]
    all_at_once(engine, requests)
    list(engine.generate(requests[0]))
    engine.score(begin[:9])
    said = engine.statistics()
    assert said == said | {
        "running": 0, "waiting": 0, "slots": 3, "max_waiting": 4, "finished_total": 5,  # with what held them up
        "tokens_total": 1 + 3 + 4 + 3, "prompt_tokens_total": 1 + 70 + 1 + 2 + 9, "cached_tokens_total": 70 + 71,
        "drafted_total": 0, "accepted_total": 0}
    engine.close()


def read_by_the_first_token(engine, requests):
    """How many tokens of prompts were read when each of the requests got its first token; and in the end."""
    read = {}
    all_at_once(engine, requests,
                lambda number, piece: read.setdefault(number, engine.statistics()["prompt_tokens_total"]))
    engine.close()
    return sorted(read.values()), engine.statistics()["prompt_tokens_total"]


def test_nobody_waits_for_what_another_will_not_leave_him(packed_model):
    """Equal prompts are read once, and the second waits meanwhile. Where no state is kept, and for who wants the
    probabilities of the prompt, which no state tells, they are read in turn."""
    same, scored = ask(6, 2, length=90), ask(6, 2, length=90, score_prompt=True)
    assert read_by_the_first_token(Engine(packed_model, None, chunk=16), [same, same]) == ([91, 91], 91)
    for requests, prefix_bytes in (([same, same], 0), ([same, scored], 1 << 30), ([scored, scored], 0)):
        (first, second), last = read_by_the_first_token(
            Engine(packed_model, None, chunk=16, prefix_bytes=prefix_bytes), requests)
        assert 91 + 90 - 2 * 16 < first < second == last == 1 + 2 * 90


def test_the_card_is_what_the_file_says_or_what_the_model_holds(packed_model, make_packed):
    info = Info("n", "ternary, tables in bf16", Path("p"), 100, 60, 40, 30, 256, True, ("a + b",), "abc")
    card = Engine(packed_model, None, info).card
    assert card == ModelCard("n", "n", "ternary, tables in bf16", "abc", 100, 60, 40, 256, True, ("a + b",), True, None)
    model = make_packed(linear="linear")
    size = sum(parameter.numel() for parameter in model.parameters())
    card = Engine(model, None).card
    assert (card.id, card.format, card.parameters, card.active_parameters) == ("small", "by hand", size, size)
    assert card.packed_bytes == 4 * size and card.exact == (card.inexact is None)


def test_small_is_under_128_million_bytes_of_weights(make_packed):
    """Packed ones counted as they are packed."""
    model = make_packed()
    others = sum(module.packed_nbytes() for module in model.modules() if isinstance(module, Linear))
    others += sum(p.numel() * p.element_size() for p in model.parameters()) - model.embedding.weight.numel() * 4
    for size, small in ((128_000_000, False), (127_999_999, True)):
        model.embedding.weight = torch.nn.Parameter(torch.empty(size - others, dtype=torch.uint8), requires_grad=False)
        assert fits_caches(model) == small


class Fixed:
    """In place of a model's logits: the same for ever."""

    def __init__(self, model, values):
        self.logits_V = torch.full((300,), -9.0)
        for token, value in values.items():
            self.logits_V[token] = value
        model.logits = lambda h_BTD: self.logits_V.expand(*h_BTD.shape[:-1], 300)


def test_words_of_the_prompt_are_penalised_and_marks_of_messages_are_not(make_packed):
    """The first token that is a word has the number 6; <|im_end|> must stay as likely as it was."""
    model = make_packed()
    Fixed(model, {5: 2.0, 6: 1.9, 7: 1.5})
    engine, penalty = Engine(model, None), Sampling(temperature=0, repetition_penalty=1.5)
    assert list(engine.tokens((5, 6), penalty, 3)) == [5, 7, 5]     # once written, it is a word like any other: 1.33
    Fixed(model, {6: 2.0, 7: 1.5})
    assert list(engine.tokens((6,), penalty, 1)) == [7] and list(engine.tokens((8,), penalty, 1)) == [6]
    engine.close()


@pytest.mark.parametrize("tokens, penalty, text, finish", [
    (3, 0.0, "\ufffd\ufffd", "length"),  # what would have come may have made the last one whole
    (9, 1.0, "\ufffd", "stop")])         # the model has ended in the middle of a character
def test_half_a_character_is_a_fault_only_where_the_model_has_ended(make_packed, tokenizer, tokens, penalty, text,
                                                                  finish):
    model = make_packed()
    engine = Engine(model, tokenizer)
    half = engine._token_bytes.index(b"\xf0")
    Fixed(model, {half: 5.0, 9: 4.5})
    request = Request((6,), Sampling(temperature=0, frequency_penalty=penalty), tokens, end_tokens=frozenset({9}))
    pieces = list(engine.generate(request))
    assert "".join(piece.text for piece in pieces) == text and pieces[-1].finish == finish
    engine.close()


@pytest.mark.parametrize("order", [1, -1])
def test_a_prompt_that_begins_another_is_read_with_it(packed_model, plain, order):
    engine, begin = Engine(packed_model, None, chunk=16), ask(7, length=90).prompt
    requests = [Request(begin[:size], GREEDY, 3, end_tokens=NO_END) for size in (70, 90)][::order]
    assert all_at_once(engine, requests) == [plain(packed_model, request) for request in requests]
    if order == 1:
        assert engine.statistics()["prompt_tokens_total"] == 1 + 90
    engine.close()


def test_who_shares_less_is_not_forgotten_for_who_shares_more(packed_model, plain):
    """A state is kept where the second leaves the first, and again where the third does."""
    engine, begin = Engine(packed_model, None, slots=4, chunk=16), ask(7, length=100).prompt
    tails = [ask(20 + i, length=7).prompt for i in range(3)]
    requests = [Request(begin[:size] + tail, GREEDY, 3, end_tokens=NO_END)
                for size, tail in zip((100, 80, 100), tails, strict=True)]
    assert all_at_once(engine, requests) == [plain(packed_model, request) for request in requests]
    assert engine.statistics()["prompt_tokens_total"] == 1 + 100 + 3 * 7
    engine.close()
