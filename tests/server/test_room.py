"""How much room a request has, who may ask which model, and how tokens are written out: by hand, without a model."""

import math
from types import SimpleNamespace

import pytest

from tryplicity.inference.generation import Token
from tryplicity.server.asked import ChatBody, TextBody
from tryplicity.server.errors import ApiError
from tryplicity.server.limits import parse
from tryplicity.server.openai import (
    ChatShape,
    TextShape,
    Words,
    _finite,
    check_model,
    check_schema,
    conversation,
    obfuscation,
    room,
)
from tryplicity.server.options import Options
from tryplicity.server.streams import _param_of


def engine(id="m", chat=True, tokenizer=True, context=10):
    return SimpleNamespace(card=SimpleNamespace(id=id, chat=chat, context_length=context),
                           tokenizer=object() if tokenizer else None)


def service(**options):
    return SimpleNamespace(options=Options(**options))


def refused(call, *arguments, **named):
    with pytest.raises(ApiError) as told:
        call(*arguments, **named)
    return told.value.status, told.value.code, told.value.param


@pytest.mark.parametrize("prompt, asked, limit, most", [
    (0, None, 100, 10), (4, None, 100, 6), (4, None, 3, 3), (4, 2, 100, 2), (4, 6, 100, 6), (4, 7, 100, 6),
    (4, 50, 5, 5), (9, None, 100, 1), (9, 1, 100, 1), (9, 0, 100, 0), (10, 0, 100, 0), (10, None, 100, None),
    (10, 1, 100, None), (11, 0, 100, None), (11, None, 100, None)])
def test_how_many_tokens_may_be_written(prompt, asked, limit, most):
    """What is asked for, what the server writes at most, what the context has room for: the least of them; no room for
    a single one is refused, unless none is wanted."""
    given = engine(), service(max_tokens=limit), [0] * prompt, asked, "prompt"
    if most is None:
        assert refused(room, *given) == (400, "context_length_exceeded", "prompt")
    else:
        assert room(*given) == most


def test_which_model_may_be_asked():
    assert check_model(engine(), "m") is check_model(engine(), "m", chat=True) is None
    assert check_model(engine(chat=False, tokenizer=False), "m") is None
    assert refused(check_model, engine(), "x") == (404, "model_not_found", "model")
    assert refused(check_model, engine(chat=False), "m", chat=True) == (400, "not_a_chat_model", "model")
    assert refused(check_model, engine(tokenizer=False), "m", chat=True) == (400, "no_tokenizer", "model")


def test_how_long_a_schema_may_be():
    schema = {"a": "x" * 10}       # 19 characters as JSON
    for most, ok in ((20, True), (19, True), (18, False)):
        if ok:
            assert check_schema(schema, service(schema_bytes=most), "p") is None
        else:
            assert refused(check_schema, schema, service(schema_bytes=most), "p") == (422, "out_of_range", "p")
    assert check_schema(None, service(schema_bytes=0), "p") is None


def test_how_many_messages_there_may_be():
    said = {"role": "user", "content": ""}
    # one too many is told before, as many as may be only after what is in them was looked at
    assert refused(conversation, engine(), service(messages=2), [said] * 3, "messages")[0] == 422
    assert refused(conversation, engine(), service(messages=2), [said] * 2, "messages") == (
        400, None, "messages.0.content")


WORDS = SimpleNamespace(size=10)
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
def words(monkeypatch):
    monkeypatch.setattr(Words, "of", classmethod(lambda cls, engine: WORDS))


@pytest.mark.parametrize("prompts, n, most, param", [
    (1, 2, 2, None), (2, 1, 2, None), (1, 3, 2, "n"), (3, 1, 2, "prompt"), (2, 2, 3, "n"), (2, 2, 4, None),
    (64, 2, 128, None)])
def test_how_many_answers_there_may_be(words, prompts, n, most, param):
    body = parse(TextBody, {"model": "m", "prompt": ["a"] * prompts, "n": n})
    if param is None:
        assert len(TextShape(engine(), body, service(choices=most)).prompts) == prompts
    else:
        assert refused(TextShape, engine(), body, service(choices=most)) == (422, "out_of_range", param)


def test_a_prompt_counts_once_however_many_choices_continue_it(words):
    shape = TextShape(engine(), parse(TextBody, {"model": "m", "prompt": ["a", "b"], "n": 2}), service())
    generations = [SimpleNamespace(prompt_tokens=p, completion_tokens=c, cached_tokens=k)
                   for p, c, k in ((5, 1, 2), (5, 2, 4), (7, 4, 0), (7, 8, 3))]
    assert shape.usage(generations) == {"prompt_tokens": 12, "completion_tokens": 15, "total_tokens": 27,
                                        "prompt_tokens_details": {"cached_tokens": 2}}


@pytest.mark.parametrize("length, filled", [(0, 16), (1, 15), (15, 1), (16, 16), (17, 15), (33, 15)])
def test_an_event_is_filled_up_to_one_of_few_lengths(length, filled):
    body = parse(ChatBody, {**CHAT, "stream": True, "stream_options": {"include_obfuscation": True}})
    noise = obfuscation(body, "x" * length)["obfuscation"]
    assert len(noise) == filled
    assert obfuscation(parse(ChatBody, CHAT), "x") == {}


def test_a_logprob_is_a_number():
    assert [_finite(x) for x in (None, 0.0, -1.5, -9998.5, -9999.5, -math.inf)] == [
        None, 0.0, -1.5, -9998.5, -9999.0, -9999.0]


class Letters:
    """A tokenizer of four tokens: a letter, half of an umlaut, its other half, and a special one."""

    def id_to_token(self, id):
        return ("a", "x", "y", "<|end|>")[id]


@pytest.fixture
def letters(monkeypatch):
    from tryplicity.inference import text

    monkeypatch.setattr(text, "token_bytes", lambda tokenizer, size: [b"a", "ü".encode()[:1], "ü".encode()[1:], b""])
    return Words(Letters(), 4)


def test_what_tokens_stand_for(letters):
    assert letters and not Words(None, 4)
    assert [letters.bytes(id) for id in range(4)] == [b"a", b"\xc3", b"\xbc", b"<|end|>"]
    assert [letters.text(id) for id in range(4)] == ["a", "\\xc3", "\\xbc", "<|end|>"]
    assert letters.text(1, "bytes:") == "bytes:\\xc3" and letters.text(0, "bytes:") == "a"
    assert Words(None, 4).text(3) == "token_id:3" and Words(None, 4).bytes(3) == b""
    tokens = [Token(0, -0.5, ((0, -0.5), (3, -math.inf)))]
    told = {"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": [
        {"token": "a", "logprob": -0.5, "bytes": [97]},
        {"token": "<|end|>", "logprob": -9999.0, "bytes": list(b"<|end|>")}]}
    assert letters.logprobs(tokens) == [told]
    bare = [{"token": "a", "logprob": -0.5, "top_logprobs": [{"token": "a", "logprob": -0.5},
                                                             {"token": "<|end|>", "logprob": -9999.0}]}]
    assert letters.logprobs(tokens, raw=False) == bare


def piece(text, tokens=(), finish=None):
    return SimpleNamespace(text=text, tokens=tokens, finish=finish)


def test_logprobs_of_a_text_are_parallel_lists_and_offsets_count_characters(letters, monkeypatch):
    monkeypatch.setattr(Words, "of", classmethod(lambda cls, engine: letters))
    tokens = [Token(0, -0.5, ((3, -0.1),)), Token(1, None, ()), Token(0, -0.25, ())]
    shape = TextShape(engine(), parse(TextBody, {"model": "m", "prompt": "a", "logprobs": 1}), service())
    first, last = shape.chunks(0, piece("a", tokens[:2]), None), shape.chunks(0, piece("a", tokens[2:], "stop"), None)
    assert [*first, *last] == [
        {"text": "a", "index": 0, "finish_reason": None, "logprobs": {
            "tokens": ["a", "bytes:\\xc3"], "token_logprobs": [-0.5, None], "text_offset": [0, 1],
            "top_logprobs": [{"<|end|>": -0.1, "a": -0.5}, None]}},
        {"text": "a", "index": 0, "finish_reason": "stop", "logprobs": {
            "tokens": ["a"], "token_logprobs": [-0.25], "text_offset": [11], "top_logprobs": [{"a": -0.25}]}}]
    assert list(shape.chunks(0, piece("", ()), None)) == []     # nothing to say
    none = TextShape(engine(), parse(TextBody, {"model": "m", "prompt": "a", "logprobs": 0}), service())
    [only] = none.chunks(0, piece("", tokens[:1]), None)
    assert only["logprobs"]["top_logprobs"] is None and only["logprobs"]["tokens"] == ["a"]
    plain = TextShape(engine(), parse(TextBody, {"model": "m", "prompt": "a"}), service())
    assert list(plain.chunks(0, piece("", tokens[:1]), None)) == []
    assert [c["logprobs"] for c in plain.chunks(0, piece("a", tokens[:1]), None)] == [None]


def test_a_prompt_is_echoed_once_for_each_choice(letters, monkeypatch):
    monkeypatch.setattr(Words, "of", classmethod(lambda cls, engine: letters))
    generation = SimpleNamespace(scored=None)
    for prompt, echoed in (("hello", "hello"), ([[0, 1, 2, 3]], "aü<|end|>")):
        body = parse(TextBody, {"model": "m", "prompt": prompt, "n": 2, "echo": True})
        shape = TextShape(engine(), body, service())
        said = [(c["index"], c["text"]) for i in (0, 1, 0) for c in shape.chunks(i, piece("a"), generation)]
        assert said == [(0, echoed), (0, "a"), (1, echoed), (1, "a"), (0, "a")]
        assert shape.whole(1, [piece("a"), piece("b", (), "stop")], generation)["text"] == echoed + "ab"
    silent = TextShape(engine(), parse(TextBody, {"model": "m", "prompt": "hello"}), service())
    assert [c["text"] for c in silent.chunks(0, piece("a"), generation)] == ["a"]
    assert silent.whole(0, [piece("a"), piece("b", (), "stop")], generation) == {
        "text": "ab", "index": 0, "logprobs": None, "finish_reason": "stop"}


def test_chunks_of_a_chat(words):
    shape = ChatShape(engine(), parse(ChatBody, {**CHAT, "n": 2}), service())
    assert list(shape.first(2)) == [{"index": i, "delta": {"role": "assistant", "content": "", "refusal": None},
                                     "logprobs": None, "finish_reason": None} for i in (0, 1)]
    assert list(shape.chunks(1, piece(""), None)) == []
    assert list(shape.chunks(1, piece("x", (), "length"), None)) == [
        {"index": 1, "delta": {"content": "x"}, "logprobs": None, "finish_reason": None},
        {"index": 1, "delta": {}, "logprobs": None, "finish_reason": "length"}]
    tools = [{"type": "function", "function": {"name": "f"}}]
    called = ChatShape(engine(), parse(ChatBody, {**CHAT, "tools": tools, "tool_choice": "required"}), service())
    [opening] = called.first(1)
    [call] = opening["delta"]["tool_calls"]
    assert opening["delta"]["content"] is None and call["index"] == 0 and call["id"].startswith("call_")
    assert call["function"] == {"name": "f", "arguments": ""} and call["type"] == "function"
    ended = list(called.chunks(0, piece("{}", (), "stop"), None))
    assert ended[0]["delta"] == {"tool_calls": [{"index": 0, "function": {"arguments": "{}"}}]}
    assert ended[1]["finish_reason"] == "tool_calls"
    assert [c["finish_reason"] for c in called.chunks(0, piece("", (), "length"), None)] == ["length"]
    whole = called.whole(0, [piece("{"), piece("}", (), "stop")], None)
    assert whole["message"]["tool_calls"][0]["function"] == {"name": "f", "arguments": "{}"}
    assert whole["message"]["content"] is None and whole["finish_reason"] == "tool_calls" and whole["logprobs"] is None


@pytest.mark.parametrize("message, param", [
    ("temperature must be finite", "temperature"), ("schema: no such type", "response_format"),
    ("stop: too long", "stop"), ("something else", None), ("seed: x", "seed"), ("", None)])
def test_the_parameter_that_a_message_is_about(message, param):
    assert _param_of(message) == param


@pytest.mark.parametrize("asked, scored", [
    ({"echo": True, "logprobs": 1}, True), ({"echo": True, "logprobs": 0}, True), ({"echo": True}, False),
    ({"logprobs": 1}, False), ({}, False), ({"max_tokens": 0}, True), ({"echo": True, "max_tokens": 0}, True)])
def test_a_prompt_is_scored_where_that_is_asked_for_and_nowhere_else(words, asked, scored):
    """Scoring reads all of it, whatever is kept of an earlier one."""
    own = SimpleNamespace(**vars(engine()), encode=lambda text: [1, 2])
    body = parse(TextBody, {"model": "m", "prompt": ["ab", "cd"], "n": 2, "seed": 5, "stop": "x", **asked})
    requests = TextShape(own, body, service()).requests()
    assert [request.score_prompt for request in requests] == [scored] * 4
    assert [request.sampling.seed for request in requests] == [5, 6, 5, 6]
    assert {request.prompt for request in requests} == {(1, 2)} and {request.stop for request in requests} == {("x",)}
    assert {request.logprobs for request in requests} == {asked.get("logprobs")}
    assert {request.max_tokens for request in requests} == {asked.get("max_tokens", 8)}     # of 16, the rest of 10


@pytest.mark.parametrize("tokens, told", [([0, 9], None), ([0, 10], "0 to 9"), ([-1], "0 to 9")])
def test_tokens_that_a_model_has(words, tokens, told):
    shape = TextShape(engine(), parse(TextBody, {"model": "m", "prompt": tokens}), service())
    if told is None:
        assert [request.prompt for request in shape.requests()] == [tuple(tokens)]
    else:
        with pytest.raises(ApiError, match=told):
            shape.requests()
