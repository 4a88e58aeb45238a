"""Many at once are as each alone; who leaves, fails or listens badly disturbs nobody. On a packed model the comparison
is of bits; on floats in fp64, where rounding cannot change a token of these."""

import codecs
import gc
import os
import random
import signal
import threading
import time
import weakref

import pytest
import torch

from tryplicity.components import Linear, State
from tryplicity.errors import UserError
from tryplicity.inference.engine import Busy, Engine, Piece, Request, ready_for_decoding
from tryplicity.inference.sampler import Sampling

GREEDY = Sampling(temperature=0)
NO_END = frozenset()


def ask(start, tokens=20, sampling=GREEDY, length=13, **options):
    """A request that ends by its number of tokens."""
    prompt = tuple(random.Random(start).randrange(6, 300) for _ in range(length))
    return Request(prompt, sampling, tokens, **{"end_tokens": NO_END} | options)


class Ear:
    """A listener that keeps what it hears, and can wait for a token."""

    def __init__(self):
        self.pieces, self.heard = [], threading.Condition()

    def __call__(self, piece):
        with self.heard:
            self.pieces.append(piece)
            self.heard.notify_all()

    @property
    def tokens(self):
        return [token.id for piece in self.pieces for token in piece.tokens]

    @property
    def finish(self):
        return self.pieces[-1].finish

    def await_tokens(self, number):
        with self.heard:
            assert self.heard.wait_for(lambda: len(self.tokens) >= number, 30)


def settles(count, wanted):
    """Whether it comes to that: the engine's thread may still be at the end of its round."""
    deadline = time.monotonic() + 20
    while count() != wanted and time.monotonic() < deadline:
        time.sleep(0.05)
    return count() == wanted


def run(engine, requests):
    """All at once; their tokens."""
    ears = [Ear() for _ in requests]
    for generation in [engine.submit(request, ear) for request, ear in zip(requests, ears, strict=True)]:
        assert generation.wait(60)
    return [ear.tokens for ear in ears]


@pytest.fixture
def engine(packed_model):
    """Without text: each token comes at once."""
    engine = Engine(packed_model, None, slots=3, chunk=7)
    yield engine
    engine.close()


MIXED = [GREEDY, Sampling(temperature=1.0, seed=1), Sampling(temperature=0.7, top_p=0.9, seed=2),
         Sampling(temperature=1.0, min_p=0.05, frequency_penalty=0.5, seed=3),
         Sampling(temperature=0, repetition_penalty=1.3), Sampling(temperature=1.0, top_k=20, seed=4,
                                                                   logit_bias={7: 2.0})]


def test_together_as_alone(engine, packed_model, plain):
    """Prompts of many lengths, read by chunks, more of them than slots, each with its own sampling."""
    requests = [ask(i, 12 + i % 5, MIXED[i % len(MIXED)], length=1 + 5 * i) for i in range(12)]
    wanted = [plain(packed_model, request) for request in requests]
    assert run(engine, requests) == wanted
    assert run(engine, requests[::-1]) == wanted[::-1]  # in another order, from kept states
    assert len({tuple(tokens) for tokens in wanted}) == 12


def test_together_as_alone_on_floats(make_packed, plain):
    model = make_packed(linear="linear", dtype=torch.float64)
    requests = [ask(i, 15, length=3 + 4 * i) for i in range(6)]
    engine = Engine(model, None, slots=4, chunk=5)
    assert run(engine, requests) == [plain(model, request) for request in requests]


def test_some_cancelled_at_random_the_rest_as_alone(engine, packed_model, plain):
    dice = random.Random(3)
    requests = [ask(i, dice.randrange(2, 12), Sampling(temperature=1.0, seed=i), length=dice.randrange(1, 30))
                for i in range(40)]
    ears = [Ear() for _ in requests]
    generations = [engine.submit(request, ear) for request, ear in zip(requests, ears, strict=True)]
    for generation in dice.sample(generations, 15):
        time.sleep(dice.random() / 20)
        generation.cancel()
    for request, ear, generation in zip(requests, ears, generations, strict=True):
        assert generation.wait(60)
        wanted = plain(packed_model, request)
        assert ear.finish in ("length", "cancelled") and sum(piece.finish is not None for piece in ear.pieces) == 1
        assert ear.tokens == (wanted if ear.finish == "length" else wanted[:len(ear.tokens)])
    assert engine.statistics()["running"] == engine.statistics()["waiting"] == 0
    assert {ear.finish for ear in ears} == {"length", "cancelled"}


def test_cancelling_frees_the_slot_before_the_next_token(packed_model):
    engine, ear = Engine(packed_model, None, slots=1), Ear()

    def cancel_at_the_third(piece):
        ear(piece)
        if len(ear.tokens) == 3:
            generation.cancel()

    hold = threading.Event()
    first = engine.submit(ask(0, 1), lambda piece: hold.wait(30))  # so that `generation` is there when it is needed
    generation = engine.submit(ask(1, 200), cancel_at_the_third)
    after = Ear()
    waiting = engine.submit(ask(2, 2), after)
    hold.set()
    assert first.wait(30) and generation.wait(30) and waiting.wait(30)
    assert (len(ear.tokens), ear.finish, generation.completion_tokens) == (3, "cancelled", 3)
    assert (len(after.tokens), after.finish) == (2, "length")
    generation.cancel()  # again, and too late: nothing
    assert generation.finish == "cancelled"


def test_waiting_ones_can_be_cancelled_and_the_queue_is_bounded(packed_model):
    engine = Engine(packed_model, None, slots=1, max_waiting=2)
    ear = Ear()
    running = engine.submit(ask(0, 200), ear)
    ear.await_tokens(1)
    queued = [engine.submit(ask(i, 1), Ear()) for i in (1, 2)]
    assert engine.statistics() | {"running": 1, "waiting": 2, "slots": 1} == engine.statistics()
    with pytest.raises(Busy, match="1 answers are being written and 2 wait"):
        engine.submit(ask(3, 1), Ear())
    queued[0].cancel()
    assert queued[0].wait(30) and queued[0].finish == "cancelled" and queued[0].completion_tokens == 0
    later = engine.submit(ask(3, 1), Ear())
    running.cancel()
    assert queued[1].wait(30) and later.wait(30)
    assert [g.finish for g in (running, queued[1], later)] == ["cancelled", "length", "length"]


def test_a_listener_that_raises_is_dropped_and_the_rest_goes_on(engine, packed_model, plain, caplog):
    def deaf(piece):
        raise ValueError("I do not listen")

    good = Ear()
    bad = engine.submit(ask(0, 50), deaf)
    assert engine.submit(ask(1), good).wait(30) and bad.wait(30)
    assert good.tokens == plain(packed_model, ask(1))
    assert bad.finish == "cancelled" and bad.completion_tokens < 50
    assert "a listener failed" in caplog.text


def test_a_failing_step_ends_those_in_it_and_the_engine_goes_on(make_packed, plain, caplog):
    model = make_packed()
    wanted = plain(model, ask(0))
    engine, ears, fail = Engine(model, None, slots=3), [Ear(), Ear()], threading.Event()

    def hook(module, arguments):
        if fail.is_set() and arguments[0].shape[1] == 1:
            raise RuntimeError("a layer broke")

    model.layers[1].register_forward_pre_hook(hook)
    generations = [engine.submit(ask(i, 200), ear) for i, ear in enumerate(ears)]
    for ear in ears:
        ear.await_tokens(2)
    fail.set()
    for generation, ear in zip(generations, ears, strict=True):
        assert generation.wait(30)
        assert (ear.finish, generation.error) == ("error", "RuntimeError: a layer broke")
    with pytest.raises(RuntimeError, match="the engine failed: RuntimeError: a layer broke"):
        list(engine.generate(ask(0)))
    fail.clear()
    assert run(engine, [ask(0)]) == [wanted]
    assert "a step of the engine failed" in caplog.text


def test_a_prompt_that_cannot_be_read_ends_alone(make_packed, plain):
    model, ear = make_packed(), Ear()
    wanted = plain(model, ask(1, 30))
    engine = Engine(model, None)

    def hook(module, arguments):
        if 299 in arguments[0]:
            raise MemoryError("no room")

    other = engine.submit(ask(1, 30), ear)
    ear.await_tokens(1)
    model.embedding.register_forward_pre_hook(hook)
    bad = engine.submit(Request((5, 299, 7), GREEDY, 5), Ear())
    assert bad.wait(30) and other.wait(30)
    assert (bad.finish, bad.error) == ("error", "MemoryError: no room") and ear.tokens == wanted


def test_logits_that_are_no_numbers_end_with_an_error(make_packed):
    model = make_packed()
    model.norm.register_forward_hook(lambda module, arguments, output: output * torch.nan)
    engine = Engine(model, None)
    for sampling in (GREEDY, Sampling(seed=0)):
        generation = engine.submit(ask(0, sampling=sampling), Ear())
        assert generation.wait(30) and generation.finish == "error" and "logits" in generation.error


def test_the_context_is_the_limit(engine):
    ear = Ear()
    generation = engine.submit(ask(0, 1000, length=250), ear)
    assert generation.wait(30)
    assert (ear.finish, len(ear.tokens), generation.prompt_tokens) == ("length", 6, 250)
    with pytest.raises(UserError, match="the prompt has 256 tokens, and the context of this model holds 256"):
        engine.submit(ask(0, length=256), ear)


@pytest.mark.parametrize("what, options, message", [
    ("request", {"max_tokens": 0}, "max_tokens is 0; it must be 1 or more"),
    ("request", {"prompt": ()}, "the prompt is empty"),
    ("request", {"logprobs": 21}, "logprobs is 21"),
    ("request", {"logprobs": -1}, "logprobs is -1"),
    ("submit", {"prompt": (1, 300)}, "the prompt has token 300; the tokens of this model are 0 to 299"),
    ("submit", {"prompt": (-1,)}, "the prompt has token -1"),
    ("submit", {"sampling": Sampling(logit_bias={300: 1.0})}, "logit_bias has token 300"),
    ("submit", {"stop": ("a",)}, "without a tokenizer"),
    ("submit", {"schema": {}}, "without a tokenizer")])
def test_what_cannot_be_done_is_refused(engine, what, options, message):
    arguments = {"prompt": (6,), "sampling": GREEDY, "max_tokens": 1} | options
    with pytest.raises(UserError, match=message):
        request = Request(**arguments)
        assert what == "submit"
        engine.submit(request, Ear())


def test_engine_options_that_cannot_be_are_refused(packed_model):
    with pytest.raises(UserError, match="slots and chunk must be 1 or more"):
        Engine(packed_model, None, slots=0)


def test_probabilities_are_the_models_own(engine, packed_model):
    """Whatever the temperature and the penalties; from one pass over prompt and answer."""
    request = ask(0, 10, Sampling(temperature=0.5, seed=1, presence_penalty=1.0, logit_bias={9: 3.0}), logprobs=3)
    pieces = list(engine.generate(request))
    told = [token for piece in pieces for token in piece.tokens]
    ids = [token.id for token in told]
    with torch.no_grad():
        logits = packed_model(torch.tensor([[*request.prompt, *ids]]))[0]
    wanted = logits[len(request.prompt) - 1:-1].log_softmax(-1)
    assert len(told) == 10
    for token, logprob_V in zip(told, wanted, strict=True):
        assert token.logprob == pytest.approx(float(logprob_V[token.id]), abs=1e-4)
        best = logprob_V.topk(3)
        assert [token for token, _ in token.top] == best.indices.tolist()
        assert [logprob for _, logprob in token.top] == pytest.approx(best.values.tolist(), abs=1e-4)
    chosen_only = [t for piece in engine.generate(ask(0, 3, logprobs=0)) for t in piece.tokens]
    assert all(token.logprob < 0 and token.top == () for token in chosen_only)
    assert all(token.logprob is None for piece in engine.generate(ask(0, 3)) for token in piece.tokens)


def test_text_comes_in_whole_characters_with_its_tokens(packed_model, tokenizer, plain):
    engine = Engine(packed_model, tokenizer)
    request = ask(0, 120, Sampling(temperature=1.5, seed=3))  # among them many bytes that begin no character
    pieces = list(engine.generate(request))
    ids = [token.id for piece in pieces for token in piece.tokens]
    assert ids == plain(packed_model, request)
    whole = b"".join(engine._token_bytes[token] for token in ids)
    assert "".join(piece.text for piece in pieces) == codecs.getincrementaldecoder("utf-8")("replace").decode(whole)
    assert all(piece.text for piece in pieces[:-1]) and pieces[-1].finish == "length"


def test_a_stop_string_and_its_tokens_are_never_given_out(packed_model, tokenizer):
    engine = Engine(packed_model, tokenizer)
    request = ask(5, 60, Sampling(temperature=1.0, seed=5))
    whole = list(engine.generate(request))
    text = "".join(piece.text for piece in whole)
    stop = text[20:24]
    generation_pieces = list(engine.generate(ask(5, 60, Sampling(temperature=1.0, seed=5), stop=(stop,))))
    shown = "".join(piece.text for piece in generation_pieces)
    assert shown == text[:text.index(stop)] and generation_pieces[-1].finish == "stop"
    told = [token.id for piece in generation_pieces for token in piece.tokens]
    everything = [token.id for piece in whole for token in piece.tokens]
    assert told == everything[:len(told)] and len(told) < len(everything)


def test_end_tokens_end_it_and_are_not_given_out(engine, packed_model, plain):
    request = ask(0, 60, Sampling(temperature=1.0, seed=2))
    tokens = plain(packed_model, request)
    end = next(token for i, token in enumerate(tokens) if i > 4 and token not in tokens[:i])
    ear = Ear()
    generation = engine.submit(ask(0, 60, Sampling(temperature=1.0, seed=2), end_tokens=frozenset({end})), ear)
    assert generation.wait(30)
    assert ear.tokens == tokens[:tokens.index(end)] and ear.finish == "stop"
    assert generation.completion_tokens == len(ear.tokens) + 1


def test_closing_an_iterator_cancels(engine):
    pieces = engine.generate(ask(0, 200))
    assert next(pieces).finish is None
    pieces.close()
    assert settles(lambda: engine.statistics()["running"], 0) and engine.statistics()["tokens_total"] < 200


def test_ctrl_c_is_heard_while_waiting(packed_model):
    engine, hold = Engine(packed_model, None, slots=1), threading.Event()
    blocking = engine.submit(ask(0, 1), lambda piece: hold.wait(30))
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        next(engine.generate(ask(1, 5)))
    assert not blocking.wait(0)  # it was heard before there was anything to hear
    hold.set()
    assert blocking.wait(30) and settles(lambda: engine.statistics()["finished_total"], 2)


def test_ctrl_c_ends_the_text_on_the_screen_where_it_stands(capsys):
    from tryplicity.commands.generate import print_pieces

    def pieces():
        yield "half a "
        raise KeyboardInterrupt

    with pytest.raises(SystemExit, match="130"):
        print_pieces(pieces())
    assert capsys.readouterr().out == "half a \n"


def test_the_numbers_of_a_generation(engine):
    ear = Ear()
    generation = engine.submit(ask(0, 10), ear)
    assert generation.wait(30)
    assert (generation.prompt_tokens, generation.completion_tokens, generation.cached_tokens) == (13, 10, 0)
    assert generation.seconds_to_first > 0 and generation.tokens_per_second > 0
    said = engine.statistics()
    assert said | {"tokens_total": 10, "prompt_tokens_total": 13, "finished_total": 1, "running": 0} == said
    assert 0 < said["tokens_per_second"] <= 10 and said["cached_states"] == 2 and said["cached_bytes"] > 0


def test_closing_with_drain_finishes_what_is_there(packed_model, plain):
    engine, ears = Engine(packed_model, None, slots=1), [Ear(), Ear()]
    generations = [engine.submit(ask(i, 15), ear) for i, ear in enumerate(ears)]
    engine.close(drain=True)
    assert [g.finish for g in generations] == ["length"] * 2
    assert [ear.tokens for ear in ears] == [plain(packed_model, ask(i, 15)) for i in range(2)]
    with pytest.raises(Busy, match="closing"):
        engine.submit(ask(0), Ear())
    engine.close()  # again: nothing


def test_closing_without_drain_cancels(packed_model):
    engine, ear = Engine(packed_model, None, slots=1), Ear()
    generations = [engine.submit(ask(0, 200), ear), engine.submit(ask(1, 200), Ear())]
    ear.await_tokens(1)
    engine.close(drain=False)
    assert [g.finish for g in generations] == ["cancelled"] * 2 and generations[0].completion_tokens < 200


def test_an_engine_that_nobody_holds_ends_its_thread(make_packed):
    engine = Engine(make_packed(), None)
    assert len(list(engine.generate(ask(0, 3)))) == 3
    thread, gone = engine.scheduler._thread, weakref.ref(engine)
    del engine
    gc.collect()
    thread.join(30)
    assert gone() is None and not thread.is_alive()


def test_a_thousand_generations_leave_no_states_behind(make_packed):
    model = make_packed("layers=[memory, attention]")
    states = sum(own is not None for layer in model.new_state(1) for own in layer)
    engine = Engine(model, None, slots=32, max_waiting=2000, prefix_bytes=0)

    def alive():
        gc.collect()
        return sum(isinstance(thing, State) for thing in gc.get_objects())

    before = alive()
    ears = [Ear() for _ in range(1000)]
    generations = [engine.submit(ask(i, 2 + i % 3, length=2), ear) for i, ear in enumerate(ears)]
    for generation in generations[::3]:
        generation.cancel()
    for generation in generations:
        assert generation.wait(60)
    assert {g.finish for g in generations} == {"cancelled", "length"}
    assert settles(alive, before) and engine.statistics()["cached_bytes"] == 0

    keeping = Engine(model, None, slots=8, prefix_bytes=1 << 20)
    before = alive()
    run(keeping, [ask(i, 2, length=3) for i in range(60)])
    kept = keeping.statistics()
    assert settles(alive, before + states * kept["cached_states"]) and kept["cached_bytes"] <= 1 << 20
    assert kept["cached_states"] > 5
    keeping.close()
    assert settles(alive, before)


def test_pieces_name_what_they_hold():
    assert Piece("a") == ("a", (), None)


# --- going on from what was read ---

def cached(engine, prompt, tokens=5, **options):
    ear = Ear()
    generation = engine.submit(Request(tuple(prompt), GREEDY, tokens, end_tokens=NO_END, **options), ear)
    assert generation.wait(30)
    return generation.cached_tokens, ear.tokens


def test_the_next_turn_reads_only_what_is_new(engine, packed_model, plain):
    prompt = list(ask(0, length=40).prompt)
    for turn in range(4):
        read_before = engine.statistics()["prompt_tokens_total"]
        found, tokens = cached(engine, prompt)
        new = 40 if turn == 0 else 4  # the answer's last token, which was written and not read, and three more
        assert (found, engine.statistics()["prompt_tokens_total"] - read_before) == (len(prompt) - new, new)
        assert tokens == plain(packed_model, Request(tuple(prompt), GREEDY, 5, end_tokens=NO_END))
        prompt += [*tokens, 50, 60 + turn, 70]


def test_the_same_prompt_again_reads_nothing(engine, packed_model, plain):
    """As for several answers to one question; also one after the other in one round."""
    requests = [ask(0, 8, Sampling(temperature=1.0, seed=seed), length=30) for seed in range(3)]
    assert run(engine, requests) == [plain(packed_model, request) for request in requests]
    assert engine.statistics()["prompt_tokens_total"] == 30 and engine.statistics()["cached_tokens_total"] == 60


def test_an_edited_question_goes_on_from_before_it(engine):
    prompt = list(ask(0, length=40).prompt)
    _, tokens = cached(engine, prompt)
    cached(engine, [*prompt, *tokens, 50, 51])
    assert cached(engine, [*prompt, *tokens, 60, 61, 62])[0] == 44


def test_a_beginning_that_prompts_share_is_kept_once_it_is_seen(engine, packed_model, plain):
    """A system prompt: the second conversation keeps a state at its end, the third goes on from there."""
    system = list(ask(9, length=100).prompt)
    found = []
    for question in range(3):
        prompt = [*system, *range(10 + 30 * question, 30 + 30 * question)]
        cached_tokens, tokens = cached(engine, prompt)
        found.append(cached_tokens)
        assert tokens == plain(packed_model, Request(tuple(prompt), GREEDY, 5, end_tokens=NO_END))
    assert found == [0, 0, 100]


def test_a_slow_model_reads_smaller_chunks(packed_model, plain, monkeypatch):
    from tryplicity.inference import scheduler

    monkeypatch.setattr(scheduler, "SLOW_CHUNK", 0.0)
    engine = Engine(packed_model, None, chunk=128)  # 128 + 64 + 32 + 16 = 240
    request = ask(0, 5, length=240)
    assert run(engine, [request]) == [plain(packed_model, request)] and engine.scheduler.chunk == 16
    monkeypatch.setattr(scheduler, "SLOW_CHUNK", 1e9)  # the machine has time again
    request = ask(1, 5, length=250)  # 16 + 32 + 64 + 128 = 240
    assert run(engine, [request]) == [plain(packed_model, request)] and engine.scheduler.chunk == 128


def test_a_model_without_a_tokenizer_says_that_it_reads_no_text(engine):
    for use in (lambda: engine.encode("text"), lambda: engine.stream("text", GREEDY, 5)):
        with pytest.raises(UserError, match="without a tokenizer"):
            use()


def test_what_cannot_be_streamed_is_said_before_anything_is_shown(packed_model, tokenizer):
    engine = Engine(packed_model, tokenizer)
    with pytest.raises(UserError, match="shorten it"):
        engine.stream("word " * 1000, GREEDY, 5)


def test_only_the_floats_of_linears_are_stored_column_by_column(make_packed):
    """A table that lies in a mapped file stays there, and what C reads stays as C reads it."""
    for linear in ("bitlinear", "linear"):
        model = make_packed("tied_embeddings=false", linear=linear)
        places = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
        values = {name: parameter.clone() for name, parameter in model.named_parameters()}
        moved = {name for name, parameter in ready_for_decoding(model).named_parameters()
                 if parameter.data_ptr() != places[name]}
        tall = {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, Linear)
                and module.weight is not None and module.weight.shape[-2] > module.weight.shape[-1]}
        assert moved == tall and bool(tall) == (linear == "linear")
        assert all(torch.equal(parameter, values[name]) for name, parameter in model.named_parameters())


def test_the_card_of_a_model(packed_model):
    card = Engine(packed_model, None).card
    assert (card.name, card.context_length, card.chat) == ("small", 256, False) and card.parameters > 0


def directly(model, prompt):
    """The logarithms of the probabilities after each token, by one forward of the whole."""
    with torch.no_grad():
        return model(torch.tensor([list(prompt)]))[0].double().log_softmax(-1)


@pytest.mark.parametrize("linear, dtype", [("bitlinear", torch.float32), ("linear", torch.float64)])
def test_the_probabilities_of_a_prompt_are_the_models(make_packed, linear, dtype):
    """In whatever chunks it is read, and with its beginning kept from before: as the model gives them in one go."""
    model = make_packed(linear=linear, dtype=dtype)
    engine, prompt = Engine(model, None, chunk=7), ask(1, length=100).prompt
    run(engine, [ask(1, length=60)])
    wanted_TV = directly(model, prompt)
    scored = engine.score(prompt, alternatives=5)
    assert [token.id for token in scored.tokens] == list(prompt)
    assert scored.tokens[0] == (prompt[0], None, ()) and (scored.offsets, scored.text) == ((0,) * 100, "")
    for i, token in enumerate(scored.tokens[1:]):
        assert abs(token.logprob - float(wanted_TV[i, token.id])) < 1e-4
        best = wanted_TV[i].topk(5)
        assert [token_id for token_id, _ in token.top] == best.indices.tolist()
        assert all(abs(value - want) < 1e-4 for (_, value), want in zip(token.top, best.values.tolist(), strict=True))
    assert engine.score(prompt[:1]).tokens == ((prompt[0], None, ()),)
    engine.close()


def test_a_prompt_is_scored_to_the_end_of_the_context_and_no_further(engine, packed_model):
    assert len(engine.score(ask(2, length=256).prompt).tokens) == 256
    with pytest.raises(UserError, match="257 tokens"):
        engine.score(ask(2, length=257).prompt)
    with pytest.raises(UserError, match="max_tokens is 0; it must be 1 or more"):
        ask(1, 0)


def test_a_prompt_is_scored_and_gone_on_with(engine, packed_model, plain):
    """What comes after it is as without."""
    request = ask(3, 9, logprobs=2, score_prompt=True)
    ear = Ear()
    generation = engine.submit(request, lambda piece: ear(piece) if generation.scored else None)
    assert generation.wait(30) and ear.tokens == plain(packed_model, request)
    assert [token.id for token in generation.scored.tokens] == list(request.prompt)
    assert all(len(token.top) == 2 for token in generation.scored.tokens[1:])


def test_offsets_of_a_prompt_are_where_its_tokens_stand_in_the_text(packed_model, tokenizer):
    engine, text = Engine(packed_model, tokenizer, chunk=5), "def тест(self):  # 日本 🙂 end"
    prompt = engine.encode(text)
    scored = engine.score(prompt)
    assert scored.text == text and scored.offsets[:2] == (0, 0)  # <|begin|> has no text
    sizes = [len(piece) for piece in (engine._token_bytes[token] for token in prompt)]
    for i, offset in enumerate(scored.offsets):  # so many characters are whole in the bytes before it
        assert text[:offset] == text.encode()[:sum(sizes[:i])].decode(errors="ignore")
    engine.close()


def all_at_once(engine, requests, hear=lambda number, piece: None):
    """Requests that the engine finds there in one round, however slowly they are submitted; what each was told."""
    hold, ears = threading.Event(), [Ear() for _ in requests]
    first = engine.submit(ask(99, 1, length=1), lambda piece: hold.wait(30))
    generations = []
    for number, (request, ear) in enumerate(zip(requests, ears, strict=True)):
        def listener(piece, number=number, ear=ear):
            hear(number, piece)
            ear(piece)

        generations.append(engine.submit(request, listener))
    hold.set()
    assert first.wait(30) and all(generation.wait(60) for generation in generations)
    return [ear.tokens for ear in ears]


def test_a_long_prompt_lets_short_ones_pass(packed_model, plain):
    """Counted in tokens that were read before the short ones' first tokens; and the long one is not forgotten."""
    engine = Engine(packed_model, None, slots=4, chunk=16)
    requests = [ask(0, 2, length=230), ask(1, 3, length=5), ask(2, 3, length=4), ask(3, 3, length=5)]
    read = {}

    def hear(number, piece):
        read.setdefault(number, engine.statistics()["prompt_tokens_total"])

    assert all_at_once(engine, requests, hear) == [plain(packed_model, request) for request in requests]
    assert max(read[1], read[2], read[3]) <= 1 + 3 * 16 and read[0] == 1 + 230 + 5 + 4 + 5
    engine.close()


def test_long_prompts_take_turns(packed_model, plain):
    """While one of 60 tokens is read, the two of 200 read as much each, and one that comes later no less."""
    engine, done = Engine(packed_model, None, slots=4, chunk=16), {}
    requests = [ask(0, 1, length=200), ask(1, 1, length=200), ask(2, 1, length=60)]

    def hear(number, piece):
        done.setdefault(number, engine.statistics()["prompt_tokens_total"])

    assert all_at_once(engine, requests, hear) == [plain(packed_model, request) for request in requests]
    # about 229 tokens are read by then, more where it came some rounds later than the others; in turn it would be 461
    assert done[2] < 1 + 60 + 2 * 150 and done[0] > done[2]
    engine.close()


def test_prompts_that_come_together_are_read_once_as_far_as_they_agree(packed_model, plain):
    engine = Engine(packed_model, None, slots=6, chunk=16)
    begin = ask(7, length=100).prompt
    tails = [ask(20 + i, length=7 + i).prompt for i in range(3)]
    requests = [Request(begin + tail, GREEDY, 4, end_tokens=NO_END) for tail in tails]
    requests += [requests[0], Request(begin[:80] + tails[1], Sampling(seed=1), 4, end_tokens=NO_END)]
    assert all_at_once(engine, requests) == [plain(packed_model, request) for request in requests]
    assert engine.statistics()["prompt_tokens_total"] == 1 + 100 + 7 + 8 + 9 + 8
    engine.close()
