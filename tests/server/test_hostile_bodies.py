"""Bodies nobody meant: each gets an answer of a known shape, never a 500, never a traceback, and the server goes on.

Every body is made from its number, so that one that fails can be sent again: `body(number)`.
"""

import json
import random

import pytest

STATUSES = {200, 201, 204, 400, 401, 403, 404, 405, 408, 409, 413, 422, 429}
CHAT = {"model": "talker", "messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "hi"}],
        "max_tokens": 2, "n": 1, "stop": ["."], "temperature": 0.5, "top_p": 0.9, "seed": 1, "logprobs": True,
        "top_logprobs": 2, "logit_bias": {"7": 1}, "presence_penalty": 0.1, "frequency_penalty": 0.1, "stream": False,
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {
            "type": "object", "properties": {"a": {"type": "integer"}}}}}, "top_k": 5, "min_p": 0.1, "user": "me"}
TEXT = {"model": "talker", "prompt": ["the model", "a"], "max_tokens": 2, "logprobs": 1, "echo": True, "n": 2,
        "stream": True, "stream_options": {"include_usage": True}, "stop": "x", "repetition_penalty": 1.1}
ASK = {"content": "What?", "search": False, "sampling": {"temperature": 1, "max_tokens": 2, "seed": 3, "top_p": 0.5}}
RESPONSE = {"model": "talker", "input": [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}, {
    "type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}, {
        "type": "function_call_output", "call_id": "c", "output": "x"}], "instructions": "Be short.",
        "max_output_tokens": 2, "text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "object"}}},
        "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}}], "tool_choice": {
            "type": "function", "name": "f"}, "stream": True, "include": ["message.output_text.logprobs"], "top_p": 0.5}
CALLS = {"model": "talker", "messages": [{"role": "user", "content": "hi"}, {
    "role": "assistant", "content": "", "tool_calls": [
        {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
    {"role": "tool", "content": "x"}],
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {
        "a": {"type": "integer"}}}}}], "tool_choice": "required", "max_completion_tokens": 2, "stream": True}
IMPORT = {"format": 1, "conversations": [{"id": "a", "title": "t", "created": 1.0, "updated": 2.0, "messages": [
    {"id": "m", "role": "assistant", "content": "c", "sources": [
        {"number": 1, "id": "p", "title": "t", "url": "u", "text": "x"}], "finish": "stop", "settings": {}}]}]}
REQUESTS = [("POST", "/v1/chat/completions", CHAT), ("POST", "/v1/completions", TEXT),
            ("POST", "/v1/responses", RESPONSE), ("POST", "/v1/chat/completions", CALLS),
            ("POST", "/tokenize", {"prompt": "a", "add_special_tokens": False, "model": "talker"}),
            ("POST", "/detokenize", {"tokens": [1, 2, 299]}),
            ("POST", "/api/conversations/{id}/ask", ASK), ("POST", "/api/conversations/import", IMPORT),
            ("POST", "/api/conversations", {"title": "t"}), ("PATCH", "/api/conversations/{id}", {"title": "t"})]
NASTY = [None, True, False, 0, -1, 1, 2, 1.5, 1e308, -1e308, 5e-324, 1 << 31, 1 << 63, 1 << 64, -(1 << 63) - 1, 10**400,
         "", " ", "a", "\x00", "é语😀", "\u202e", "\ud800", "\ufffe", "x" * 5000, "<|im_end|>", "<script>",
         "'; DROP TABLE", "{}", "nan", [], {}, [[]], [None], [{}], [[1, 2], [3]], [1, 2, 3], [-1], [299], [300],
         ["a"] * 200, {"": ""}, {"a": {"b": {"c": []}}}, {"type": "text"}, {"type": "json_object"},
         {"role": "assistant", "content": None}]


def places(value, path=()):
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*path, key))


def changed(rng, value, path):
    """A copy with something done at a place."""
    if not path:
        what = rng.randrange(5)
        if what == 1 and isinstance(value, dict):
            name = rng.choice(["extra", "temprature", "\ud800", "", "messages", "__proto__"])
            return {**value, name: rng.choice(NASTY)}
        if what == 2 and isinstance(value, list):
            return value * rng.choice([0, 2, 40])
        if what == 3 and isinstance(value, str):
            return value + rng.choice([v for v in NASTY if isinstance(v, str)])
        if what == 4 and isinstance(value, int | float):
            return value * rng.choice([-1, 0, 1000])
        return rng.choice(NASTY)
    copy = dict(value) if isinstance(value, dict) else list(value)
    if len(path) == 1 and rng.random() < 0.2:
        del copy[path[0]]
    else:
        copy[path[0]] = changed(rng, copy[path[0]], path[1:])
    return copy


def body(number):
    """(method, path, bytes)"""
    rng = random.Random(number)
    method, path, value = rng.choice(REQUESTS)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        value = changed(rng, value, rng.choice(list(places(value))))
    data = json.dumps(value).encode()
    if rng.random() < 0.15:     # no JSON any more
        at = rng.randrange(len(data) + 1)
        data = rng.choice([data[:at], data[:at] + bytes([rng.randrange(256)]) + data[at + 1:], data[at:], data * 2,
                           data[:at] + b"[" * rng.randrange(5000) + data[at:]])
    return method, path, data


def check(server, id, number):
    method, path, data = body(number)
    answer = server.http.request(method, path.replace("{id}", id), content=data)
    where = f"body({number}): {method} {path} {data[:300]!r}: {answer.status_code} {answer.text[:300]}"
    assert answer.status_code in STATUSES, where
    assert "Traceback" not in answer.text, where
    if answer.status_code >= 400:
        error = answer.json()["error"]
        assert set(answer.json()) == {"error"} and set(error) == {"message", "type", "param", "code"}, where
        assert isinstance(error["message"], str) and error["message"] and isinstance(error["type"], str), where
    elif answer.headers["content-type"].startswith("text/event-stream"):
        for line in answer.text.splitlines():
            if line.startswith("data: ") and line != "data: [DONE]":
                event = json.loads(line[6:])
                assert event.get("error", {}).get("code") != "internal_error", where
    return answer.status_code


def fuzz(server, numbers):
    """How often each status came."""
    id, seen = server.new(), {}
    for number in numbers:
        status = check(server, id, number)
        seen[status] = seen.get(status, 0) + 1
        if server.http.get(f"/api/conversations/{id}").status_code == 404:
            id = server.new()
    assert server.http.post("/v1/chat/completions", json={**CHAT, "response_format": None}).status_code == 200
    server.free()
    return seen


@pytest.fixture(scope="module")
def own(started, chat_run):
    with started(chat_run) as server:
        yield server


def test_200_bodies(own):
    seen = fuzz(own, range(200))
    assert {200, 400, 422} <= set(seen) and seen[400] < 180, seen     # they reach further than the first check


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_10_000_bodies(own):
    fuzz(own, range(1000, 11_000))
    # and nothing is left behind
    assert own.service.under_way == 0 and own.service.gate.taken == 0 and own.service.writing == {}
