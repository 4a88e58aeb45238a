"""/v1/responses with OpenAI's own client: the text of a chat, in their newer shapes."""

import json

import jsonschema
import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from tests.server.test_openai import SCHEMA, assert_nothing_extra

ASK = "What is a list?"
GREEDY = {"model": "talker", "temperature": 0}
FUNCTION = {"type": "function", "name": "f", "parameters": SCHEMA, "strict": False}


@pytest.fixture(scope="module")
def client(server):
    return server.openai()


def respond(client, **options):
    return client.responses.create(**{**GREEDY, "input": ASK, "max_output_tokens": 12, **options})


def chat(client, messages):
    return client.chat.completions.create(messages=messages, max_tokens=12, **GREEDY)


def test_a_response_is_what_a_chat_says(client):
    plain = chat(client, [{"role": "user", "content": ASK}])
    reply = respond(client)
    assert reply.output_text == plain.choices[0].message.content
    assert reply.status == "incomplete" and reply.incomplete_details.reason == "max_output_tokens"
    assert (reply.usage.input_tokens, reply.usage.output_tokens) == (plain.usage.prompt_tokens, 12)
    assert reply.model_dump()["store"] is False


def test_input_is_text_or_items_and_instructions_come_first(client):
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": ASK},
                {"role": "assistant", "content": "A sequence."}, {"role": "user", "content": "And a file?"}]
    text = chat(client, messages).choices[0].message.content
    plain = [{"role": "user", "content": ASK}, {"role": "assistant", "content": "A sequence."},
             {"role": "user", "content": "And a file?"}]
    parts = [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": ASK}]},
             {"type": "message", "id": "msg_1", "status": "completed", "role": "assistant", "content": [
                 {"type": "output_text", "text": "A sequence.", "annotations": []}]},
             {"role": "user", "content": [{"type": "input_text", "text": "And a "}, {"type": "input_text",
                                                                                    "text": "file?"}]}]
    for items in (plain, parts):
        assert respond(client, input=items, instructions="Be short.").output_text == text
        assert respond(client, input=[{"role": "developer", "content": "Be short."}, *items]).output_text == text


def test_what_came_out_goes_in_again(client):
    first = respond(client)
    items = [{"role": "user", "content": ASK}, *(item.model_dump() for item in first.output),
             {"role": "user", "content": "And a file?"}]
    said = [{"role": "user", "content": ASK}, {"role": "assistant", "content": first.output_text},
            {"role": "user", "content": "And a file?"}]
    assert respond(client, input=items).output_text == chat(client, said).choices[0].message.content


@pytest.mark.parametrize("options", [{}, {"include": ["message.output_text.logprobs"], "top_logprobs": 2},
                                     {"tools": [FUNCTION], "tool_choice": "required", "max_output_tokens": 80},
                                     {"max_output_tokens": 1}, {"instructions": "Be short.", "metadata": {"a": "b"}}])
def test_a_stream_is_the_same_in_openais_events(server, client, options):
    """Every event parses as theirs, without a field of ours; they are numbered, named, and give the whole response."""
    body = {**GREEDY, "input": ASK, "max_output_tokens": 12, **options}
    whole = server.http.post("/v1/responses", json=body).json()
    with server.http.stream("POST", "/v1/responses", json={**body, "stream": True}) as response:
        lines = [line for line in response.iter_lines() if line and not line.startswith(":")]
    names, data = [x[7:] for x in lines[::2]], [json.loads(x[6:]) for x in lines[1::2]]
    assert names == [event["type"] for event in data] and all(x.startswith("event: ") for x in lines[::2])
    assert [event["sequence_number"] for event in data] == list(range(len(data)))
    for event in data:
        assert_nothing_extra_but(TypeAdapter(ResponseStreamEvent).validate_python(event), {"store"})
    call = "tools" in options
    assert names[:3] == ["response.created", "response.in_progress", "response.output_item.added"]
    assert names[-2:] == ["response.output_item.done", f"response.{whole['status']}"]
    [item] = data[-1]["response"]["output"]
    for one in (whole, data[-1]["response"]):
        for name in ("id", "created_at", "completed_at", "usage"):
            one.pop(name)
        for each in one["output"]:
            each.pop("id"), each.pop("call_id", None)
    assert data[-1]["response"] == whole
    delta = "response.function_call_arguments.delta" if call else "response.output_text.delta"
    written = "".join(event["delta"] for event in data if event["type"] == delta)
    assert written == (item["arguments"] if call else item["content"][0]["text"])
    if call:
        assert item["type"] == "function_call" and item["name"] == "f"
        jsonschema.validate(json.loads(written), SCHEMA)
    elif options.get("top_logprobs"):
        given = [each for event in data if event["type"] == delta for each in event["logprobs"]]
        kept = item["content"][0]["logprobs"]
        assert [(t["token"], t["logprob"]) for t in given] == [(t["token"], t["logprob"]) for t in kept]
        assert len(kept) == 12 and len(kept[0]["top_logprobs"]) == 2 and isinstance(kept[0]["bytes"], list)


def assert_nothing_extra_but(value, names):
    """`store` is a field that OpenAI sends and its class does not have."""
    for inner in (value, getattr(value, "response", None)):
        for name in names & set((inner is not None and inner.model_extra) or ()):
            del inner.__pydantic_extra__[name]
            inner.model_fields_set.discard(name)
    assert_nothing_extra(value)


def test_the_shape_of_a_response(server):
    value = server.http.post("/v1/responses", json={**GREEDY, "input": ASK, "max_output_tokens": 3}).json()
    parsed = Response.model_validate(value)
    assert_nothing_extra_but(parsed, {"store"})
    assert {name for name, field in Response.model_fields.items() if field.is_required()} <= set(value)


def test_a_schema_is_followed(client):
    form = {"format": {"type": "json_schema", "name": "thing", "schema": SCHEMA, "strict": True}}
    reply = respond(client, text=form, max_output_tokens=80, temperature=1)
    assert reply.status == "completed"
    jsonschema.validate(json.loads(reply.output_text), SCHEMA)
    assert respond(client, text={"format": {"type": "json_object"}}).output_text.startswith("{")


@pytest.mark.parametrize("options", [
    {"store": True}, {"metadata": {"a": "b"}}, {"user": "ann"}, {"service_tier": "auto"}, {"truncation": "disabled"},
    {"parallel_tool_calls": False}, {"tools": [FUNCTION]}, {"tools": [{"type": "web_search"}], "tool_choice": "auto"},
    {"reasoning": {"effort": None, "summary": "auto"}}, {"include": ["reasoning.encrypted_content"]},
    {"background": False}, {"prompt_cache_key": "x"}, {"safety_identifier": "x"}, {"max_tool_calls": 3},
    {"text": {"format": {"type": "text"}, "verbosity": "medium"}}, {"top_logprobs": 10**6}])
def test_what_cannot_change_the_text_changes_nothing(client, options):
    assert respond(client, **options).output_text == respond(client).output_text


@pytest.mark.parametrize("options, param", [
    ({"previous_response_id": "resp_1"}, "previous_response_id"), ({"conversation": "conv_1"}, "conversation"),
    ({"background": True}, "background"), ({"truncation": "auto"}, "truncation"), ({"prompt": {"id": "x"}}, "prompt"),
    ({"reasoning": {"effort": "high"}}, "reasoning.effort"), ({"text": {"verbosity": "low"}}, "text.verbosity"),
    ({"tools": [{"type": "web_search"}], "tool_choice": {"type": "web_search"}}, "tool_choice"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0.type"),
    ({"input": [{"content": "x"}]}, "input.0.role"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input.0.content.0.type"),
    ({"input": " "}, "input.0.content"), ({"extra_body": {"n": 2}}, "n")])
@pytest.mark.parametrize("stream", [False, True])
def test_what_would_change_it_is_refused_by_name(client, options, param, stream):
    with pytest.raises(openai.BadRequestError) as caught:
        respond(client, **options, stream=stream)
    assert caught.value.param == param and param in caught.value.body["message"]


def test_nothing_is_kept(client):
    with pytest.raises(openai.NotFoundError, match="keeps none"):
        client.responses.retrieve("resp_1")
    with pytest.raises(openai.BadRequestError, match="send what was said before as items of input"):
        respond(client, previous_response_id="resp_1")
