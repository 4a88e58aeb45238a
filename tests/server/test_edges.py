"""Both ends of what a request may hold: the last value that is taken, the first that is not, and what is said of it.

Most of it is one `parse`, without a server: the ends of every number are looked at, and not one of a kind."""

import pytest

from tryplicity.server.api import RenameBody
from tryplicity.server.ask import AskBody
from tryplicity.server.asked import (
    ChatBody,
    ResponseFormat,
    TextBody,
    dialogue,
    forced,
    without_nulls,
)
from tryplicity.server.asked_responses import InputItem, ResponsesBody
from tryplicity.server.conversations import CitedPassage, Conversation, Message, title_of
from tryplicity.server.errors import ApiError
from tryplicity.server.limits import parse, read_json
from tryplicity.server.tokens import DetokenizeBody

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "m", "prompt": "a"}
RESPONSE = {"model": "m", "input": "hi"}
SAMPLED = [("temperature", 0, 2), ("top_p", 0, 1), ("min_p", 0, 1), ("presence_penalty", -2, 2),
           ("frequency_penalty", -2, 2), ("top_k", 0, None), ("seed", -2**63, 2**63 - 1),
           ("repetition_penalty", None, 10)]
ENDS = [(model, base, *end) for model, base in ((ChatBody, CHAT), (TextBody, TEXT), (ResponsesBody, RESPONSE))
        for end in SAMPLED]
ENDS += [(ChatBody, CHAT, "n", 1, 128), (TextBody, TEXT, "n", 1, 128), (ChatBody, CHAT, "max_tokens", 1, None),
         (ChatBody, CHAT, "max_completion_tokens", 1, None), (ChatBody, CHAT, "top_logprobs", 0, None),
         (TextBody, TEXT, "max_tokens", 0, None), (TextBody, TEXT, "logprobs", 0, None),
         (ResponsesBody, RESPONSE, "max_output_tokens", 1, None), (ResponsesBody, RESPONSE, "max_tool_calls", 0, None),
         (ResponsesBody, RESPONSE, "top_logprobs", 0, None)]
ENDS += [(AskBody, {"content": "x"}, f"sampling.{name}", low, high) for name, low, high in (
    ("temperature", 0, 2), ("top_k", 0, 2**31), ("top_p", None, 1), ("min_p", 0, 1), ("repetition_penalty", None, 10),
    ("max_tokens", 1, None), ("seed", 0, 2**53 - 1))]


def with_(base, path, value):
    first, _, rest = path.partition(".")
    return {**base, first: with_(base.get(first, {}), rest, value) if rest else value}


@pytest.mark.parametrize("model, base, path, low, high", ENDS, ids=[f"{e[0].__name__}.{e[2]}" for e in ENDS])
def test_every_number_has_the_ends_that_are_documented(model, base, path, low, high):
    """low None: it must be over zero; high None: there is no end, or it is clipped."""
    whole = path.rpartition(".")[2] in ("top_k", "seed", "n", "max_tokens", "max_completion_tokens", "top_logprobs",
                                        "logprobs", "max_output_tokens", "max_tool_calls")
    step = 1 if whole else 1e-3
    good = [low if low is not None else 1e-6, high if high is not None else 10**6]
    bad = [low - step if low is not None else 0] + ([high + step] if high is not None else [])
    for value in good:
        parse(model, with_(base, path, value))
    for value in bad:
        with pytest.raises(ApiError) as told:
            parse(model, with_(base, path, value))
        assert told.value.status == 422 and told.value.param == path and told.value.code == "out_of_range"


@pytest.mark.parametrize("model, base, path, make, least, most", [
    (ChatBody, CHAT, "stop", lambda n: ["x"] * n, 0, 64), (ChatBody, CHAT, "stop", lambda n: ["x" * n], 1, 500),
    (ChatBody, CHAT, "tools", lambda n: [{}] * n, 0, 1000),
    (ChatBody, CHAT, "messages", lambda n: CHAT["messages"] * n, 1, None),
    (ResponsesBody, RESPONSE, "input", lambda n: [{"role": "user", "content": "x"}] * n, 1, None),
    (AskBody, {}, "content", lambda n: "x" * n, 0, 2**20), (RenameBody, {}, "title", lambda n: "x" * n, 0, 200),
    (ChatBody, CHAT, "logit_bias", lambda n: {"1": n}, -100, 100),
    (DetokenizeBody, {}, "tokens", lambda n: [n], 0, None)])
def test_every_length_has_the_ends_that_are_documented(model, base, path, make, least, most):
    for number in (least, most if most is not None else least + 3):
        parse(model, {**base, path: make(number)})
    for number in ([least - 1] if least or path == "tokens" else []) + ([most + 1] if most is not None else []):
        with pytest.raises(ApiError) as told:
            parse(model, {**base, path: make(number)})
        assert told.value.status == 422 and told.value.param.startswith(path)


def test_what_a_request_leaves_out_is_as_openai_has_it():
    """https://platform.openai.com/docs/api-reference; ours beside it ask for nothing."""
    for body in (parse(ChatBody, CHAT), parse(TextBody, TEXT), parse(ResponsesBody, RESPONSE)):
        assert (body.temperature, body.top_p, body.top_k, body.min_p) == (1, 1, 0, 0)
        assert (body.presence_penalty, body.frequency_penalty, body.repetition_penalty) == (0, 0, 1)
        assert (body.seed, body.logit_bias, body.stop, body.stream) == (None, {}, [], False)
        assert not body.stream_options.include_usage and not body.stream_options.include_obfuscation
        assert body.schema() is None
    chat, text, response = parse(ChatBody, CHAT), parse(TextBody, TEXT), parse(ResponsesBody, RESPONSE)
    assert (chat.n, chat.logprobs, chat.top_logprobs, chat.most, chat.call) == (1, False, 0, None, None)
    assert (text.n, text.max_tokens, text.logprobs, text.echo) == (1, 16, None, False)
    assert (response.max_output_tokens, response.logprobs, response.call) == (None, False, None)
    ask = parse(AskBody, {"content": "x"})
    assert ask.sampling.model_dump() == {"temperature": 0.8, "top_k": 0, "top_p": 0.95, "min_p": 0.0,
                                         "repetition_penalty": None, "max_tokens": None, "seed": None}
    assert ask.search is False


def test_what_is_asked_for_reaches_the_sampler():
    asked = {"temperature": 0.3, "top_p": 0.4, "top_k": 7, "min_p": 0.05, "repetition_penalty": 1.2,
             "presence_penalty": -0.5, "frequency_penalty": 0.25, "seed": 11, "logit_bias": {"3": -1.5, "9": 2}}
    body = parse(ChatBody, {**CHAT, **asked})
    sampling = body.sampling(10, 2)
    told = {name: getattr(sampling, name) for name in asked}
    assert told == {**asked, "seed": 13, "logit_bias": {3: -1.5, 9: 2.0}}
    assert body.sampling(10).seed == 11 and parse(ChatBody, CHAT).sampling(10, 4).seed is None
    assert parse(ChatBody, {**CHAT, "seed": 2**63 - 1}).sampling(10, 1).seed == 0       # goes round
    assert parse(ChatBody, {**CHAT, "seed": -1}).sampling(10).seed == 2**63 - 1
    assert parse(ChatBody, {**CHAT, "top_k": 11}).sampling(10).top_k == 10              # as good as the largest
    assert 0 < parse(ChatBody, {**CHAT, "top_p": 0}).sampling(10).top_p < 1e-6          # the likeliest alone
    for key in ("10", "-1", "1.0", "²", "", "0000000001", "a"):
        with pytest.raises(ApiError, match="no token of this model"):
            parse(ChatBody, {**CHAT, "logit_bias": {key: 1}}).sampling(10)


@pytest.mark.parametrize("value, read", [
    ("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]]), ("", [""]),
    ([], None), ([[]], None), ([1, "a"], None), ([[1], []], None), ([[1], "a"], None), ([True], None),
    ([[True]], None), ([1.0], None), (1, None), ({}, None), (True, None), (0, None)])
def test_prompts(value, read):
    body = parse(TextBody, {"model": "m", "prompt": value})
    if read is None:
        with pytest.raises(ApiError) as told:
            body.prompts()
        assert told.value.status == 400 and told.value.param == "prompt"
    else:
        assert body.prompts() == read


def test_the_least_of_two_limits_holds():
    assert parse(ChatBody, {**CHAT, "max_tokens": 5}).most == parse(
        ChatBody, {**CHAT, "max_tokens": 5, "max_completion_tokens": 9}).most == 5
    assert parse(ChatBody, {**CHAT, "max_tokens": 9, "max_completion_tokens": 4}).most == 4


def test_more_alternatives_than_there_may_be_are_as_many_as_there_may_be():
    for given, kept in ((19, 19), (20, 20), (21, 20), (10**6, 20)):
        assert parse(ChatBody, {**CHAT, "logprobs": True, "top_logprobs": given}).top_logprobs == kept
        assert parse(TextBody, {**TEXT, "logprobs": given}).logprobs == kept


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


def test_forms_of_an_answer():
    named = {"name": "x", "schema": SCHEMA}
    for form, schema in (({"type": "text"}, None), ({"type": "json_object"}, {"type": "object"}),
                         ({"type": "json_schema", "json_schema": named}, SCHEMA)):
        read = parse(ResponseFormat, form)
        read.check()
        assert read.schema() == schema
        for model, base in ((ChatBody, CHAT), (TextBody, TEXT)):
            body = parse(model, {**base, "response_format": form})
            body.check()
            assert body.schema() == schema
    for form, schema in (({"type": "text"}, None), ({"type": "json_object"}, {"type": "object"}),
                         ({"type": "json_schema", "name": "x", "schema": SCHEMA}, SCHEMA)):
        body = parse(ResponsesBody, {**RESPONSE, "text": {"format": form}})
        body.check()
        assert body.schema() == schema
    for model, base in ((ChatBody, CHAT), (TextBody, TEXT)):
        for form in ({"type": "json_schema"}, {"type": "text", "json_schema": named},
                     {"type": "json_object", "json_schema": named}):
            with pytest.raises(ApiError, match="json_schema belongs to"):
                parse(model, {**base, "response_format": form}).check()
    for form in ({"type": "json_schema"}, {"type": "text", "schema": SCHEMA}):
        with pytest.raises(ApiError, match="a schema belongs to"):
            parse(ResponsesBody, {**RESPONSE, "text": {"format": form}}).check()
    for name in ("", "x" * 65, "a b", "ä"):
        with pytest.raises(ApiError):
            parse(ChatBody, {**CHAT, "response_format": {"type": "json_schema",
                                                         "json_schema": {"name": name, "schema": SCHEMA}}})


F, G = ({"type": "function", "function": {"name": name, "parameters": SCHEMA}} for name in "fg")
FLAT = {"type": "function", "name": "f", "parameters": SCHEMA}


@pytest.mark.parametrize("tools, choice, called", [
    ([F], "required", "f"), ([FLAT], "required", "f"), ([F, G], {"type": "function", "function": {"name": "g"}}, "g"),
    ([F, G], {"type": "function", "name": "f"}, "f"), ([F], None, None), ([F], "auto", None), ([F], "none", None),
    ([F, G], {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [F]}}, "f"),
    ([F, G], {"type": "allowed_tools", "mode": "required", "tools": [FLAT]}, "f"),
    ([F, G], {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [F]}}, None),
    ([F, {"type": "web_search"}], "required", "f"), ([F, G], "required", ApiError), ([], "required", ApiError),
    ([F], {"type": "function", "function": {"name": "h"}}, ApiError), ([F], "any", ApiError), ([F], 5, ApiError),
    ([F], {"type": "allowed_tools", "allowed_tools": 5}, ApiError), ([{"type": "web_search"}], "required", ApiError)])
def test_which_function_must_be_called(tools, choice, called):
    if called is ApiError:
        with pytest.raises(ApiError) as told:
            forced(tools, choice)
        assert told.value.status == 400 and told.value.param == "tool_choice"
        return
    found = forced(tools, choice)
    assert (found and found.name) == called and (found is None or found.parameters == SCHEMA)
    body = parse(ChatBody, {**CHAT, "tools": tools, "tool_choice": choice})
    body.check()
    assert body.schema() == (SCHEMA if called else None)


def test_a_function_without_parameters_takes_any_object():
    for tool in ({"type": "function", "function": {"name": "f"}}, {"type": "function", "function": {
            "name": "f", "parameters": None}}, {"type": "function", "name": "f"}):
        assert forced([tool], "required").parameters == {"type": "object"}


def test_how_items_of_input_become_messages():
    body = parse(ResponsesBody, {"model": "m", "instructions": "Be short.", "input": [
        {"role": "developer", "content": "a"}, {"role": "user", "content": [{"type": "input_text", "text": "b"}]},
        {"type": "function_call", "name": "f", "arguments": '{"x": 1}', "call_id": "c"},
        {"type": "function_call_output", "call_id": "c", "output": "d"}, {"role": "assistant", "content": "e"}]})
    assert body.messages() == [
        {"role": "system", "content": "Be short."}, {"role": "system", "content": "a"},
        {"role": "user", "content": "b"}, {"role": "assistant", "content": '{"name": "f", "arguments": {"x": 1}}'},
        {"role": "tool", "content": "d"}, {"role": "assistant", "content": "e"}]
    assert parse(ResponsesBody, RESPONSE).messages() == [{"role": "user", "content": "hi"}]
    with pytest.raises(ApiError) as told:
        parse(InputItem, {"content": "x"}).message("input.3")
    assert (told.value.param, told.value.code) == ("input.3.role", "missing_parameter")
    with pytest.raises(ApiError) as told:
        parse(InputItem, {"role": "user", "content": [{"text": "a"}, {"type": "text"}]}).message("input.0")
    assert (told.value.param, told.value.code) == ("input.0.content.1.text", "missing_parameter")


def test_messages_that_say_nothing():
    said = {"role": "user", "content": "x"}
    assert dialogue([{"role": "assistant", "content": " "}, said, {"role": "system", "content": ""}], "m") == [said]
    with pytest.raises(ApiError) as told:
        dialogue([said, {"role": "user", "content": " \n"}], "messages")
    assert told.value.param == "messages.1.content"
    with pytest.raises(ApiError, match="no message says anything"):
        dialogue([{"role": "system", "content": ""}], "messages")


def test_fields_that_are_null_are_left_out_where_clients_send_them():
    body = {"model": None, "messages": [{"role": "user", "content": [{"text": "a", "x": None}], "name": None,
                                         "tool_calls": [{"function": {"name": "f", "arguments": {"a": None}}}]}]}
    assert without_nulls(body, "messages") == {"model": None, "messages": [
        {"role": "user", "content": [{"text": "a"}],
         "tool_calls": [{"function": {"name": "f", "arguments": {"a": None}}}]}]}     # an argument may be null
    assert without_nulls({"messages": 5}, "messages") == {"messages": 5}


def test_a_value_that_asks_for_nothing_is_taken_only_as_the_type_it_is():
    unsupported = {"best_of": (1,), "suffix": ("",)}
    assert parse(TextBody, {**TEXT, "best_of": 1, "suffix": ""}, unsupported).prompt == "a"
    assert parse(TextBody, {**TEXT, "best_of": None}, unsupported).prompt == "a"
    for change in ({"best_of": 2}, {"best_of": True}, {"best_of": 1.0}, {"suffix": "x"}, {"suffix": 0}):
        with pytest.raises(ApiError) as told:
            parse(TextBody, {**TEXT, **change}, unsupported)
        assert (told.value.status, told.value.code) == (400, "unsupported_parameter") and told.value.param in change


@pytest.mark.parametrize("change, status, code, param", [
    ({"model": None}, 400, "missing_parameter", "model"), ({"temperature": "1"}, 400, "invalid_type", "temperature"),
    ({"temperature": 9}, 422, "out_of_range", "temperature"), ({"x": 1}, 400, "unknown_parameter", "x"),
    ({"messages": [{"role": "user", "x": 1}]}, 400, "unknown_parameter", "messages.0.x"),
    ({"messages": [{"role": "king"}]}, 400, "invalid_type", "messages.0.role"),
    ({"messages": []}, 422, "out_of_range", "messages"), ({"n": 1.5}, 400, "invalid_type", "n")])
def test_a_mistake_is_named_by_its_place(change, status, code, param):
    with pytest.raises(ApiError) as told:
        parse(ChatBody, {**CHAT, **change})
    assert (told.value.status, told.value.code, told.value.param) == (status, code, param)


@pytest.mark.parametrize("model, base, path, low, high", [
    (CitedPassage, {"id": "a", "title": "t", "url": "u", "text": "x"}, "number", 1, 2**31 - 1),
    (Conversation, {}, "created", 0, 253_402_300_800), (Message, {"role": "user", "content": ""}, "created", 0,
                                                        253_402_300_800)])
def test_the_ends_of_what_is_kept(model, base, path, low, high):
    for value in (low, high):
        assert getattr(model.model_validate({**base, path: value}), path) == value
    for value in (low - 1, high + 1):
        with pytest.raises(ValueError):
            model.model_validate({**base, path: value})


@pytest.mark.parametrize("name, least, most", [("id", 1, 100), ("title", 1, 200)])
def test_the_lengths_of_what_is_kept(name, least, most):
    for number in (least, most):
        Conversation(**{name: "x" * number})
    for number in (least - 1, most + 1):
        with pytest.raises(ValueError):
            Conversation(**{name: "x" * number})


@pytest.mark.parametrize("question, title", [
    ("x" * 60, "x" * 60), ("x" * 61, "x" * 59 + "…"), (" a \n b ", "a b"), ("", "New conversation"),
    ("a " + "b" * 70, "a …"), ("word, " * 12, "word, " * 9 + "word …")])
def test_titles_of_questions(question, title):
    assert title_of(question) == title and len(title) <= 62


def test_read_json_takes_an_object_alone():
    assert read_json(b'{"a": [1, null, "\xc3\xa9"]}') == {"a": [1, None, "é"]}
    for body, word in ((b"[1]", "object"), (b"\xff", "UTF-8"), (b"{", "not JSON"), (b'{"a": NaN}', "NaN"),
                       (b"[" * 100_000, "deeply"), (b'{"a": "\\ud800"}', "UTF-8")):
        with pytest.raises(ApiError, match=word) as told:
            read_json(body)
        assert told.value.status == 400 and told.value.code == "invalid_json"


@pytest.mark.parametrize("number, kind", [(2**64 - 1, int), (2**64, float), (-2**63, int), (-2**63 - 1, float),
                                          (True, bool), (0.5, float)])
def test_a_setting_that_is_no_whole_number_of_64_bits_is_a_fraction(number, kind):
    """What other programs that read an export can hold."""
    kept = Message(role="assistant", content="", settings={"a": number}).settings["a"]
    assert type(kept) is kind and kept == kind(number)
