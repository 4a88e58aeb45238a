"""The real `openai` client against a real model: what is asked for is what comes, and in OpenAI's own shapes."""

import json
import threading
import time

import jsonschema
import openai
import pytest
import torch
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel

ASK = [{"role": "user", "content": "What is a list?"}]
GREEDY = {"model": "talker", "temperature": 0}
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9},
                                           "kind": {"enum": ["list", "file"]}},
          "required": ["n", "kind"], "additionalProperties": False}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}},
         {"type": "function", "function": {"name": "g", "description": "Another."}}]


@pytest.fixture(scope="module")
def client(server):
    return server.openai()


def chat(client, **options):
    return client.chat.completions.create(**{**GREEDY, "messages": ASK, "max_tokens": 12, **options})


def text(client, **options):
    return client.completions.create(**{**GREEDY, "prompt": "the model", "max_tokens": 12, **options})


def streamed(chunks):
    """(text of each choice, finish of each choice, the chunks)"""
    texts, finishes, kept = {}, {}, list(chunks)
    for chunk in kept:
        for choice in chunk.choices:
            piece = choice.delta.content if hasattr(choice, "delta") else choice.text
            texts[choice.index] = texts.get(choice.index, "") + (piece or "")
            if choice.finish_reason:
                assert choice.index not in finishes
                finishes[choice.index] = choice.finish_reason
    return texts, finishes, kept


# --- what comes ---

def test_a_chat_is_what_the_engine_writes(server, client):
    from tryplicity.inference.chat import ask
    from tryplicity.inference.sampler import Sampling

    reply = chat(client)
    assert reply.choices[0].message.content.strip() == ask(
        server.service.engine, "What is a list?", Sampling(temperature=0), 12)
    assert reply.choices[0].finish_reason == "length" and reply.usage.completion_tokens == 12
    assert reply.choices[0].message.role == "assistant" and reply.id.startswith("chatcmpl-")
    assert abs(reply.created - time.time()) < 60


def test_a_stream_is_the_same_in_order(client):
    whole = chat(client)
    texts, finishes, chunks = streamed(chat(client, stream=True, stream_options={"include_usage": True}))
    assert texts == {0: whole.choices[0].message.content} and finishes == {0: "length"}
    first, *middle, last, usage = chunks
    assert first.choices[0].delta.role == "assistant" and first.choices[0].delta.content == ""
    assert all(c.choices[0].finish_reason is None and c.choices[0].delta.role is None for c in middle)
    assert last.choices[0].delta.content is None and last.choices[0].finish_reason == "length"
    assert usage.choices == [] and usage.usage.total_tokens == whole.usage.total_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({(c.id, c.created, c.model, c.system_fingerprint) for c in chunks}) == 1
    _, _, plain = streamed(chat(client, stream=True))
    assert all("usage" not in chunk.model_fields_set for chunk in plain)


def test_completions_stream_the_same_too(client):
    whole = text(client, n=2, seed=3, temperature=1)
    texts, finishes, _ = streamed(text(client, n=2, seed=3, temperature=1, stream=True))
    assert texts == {c.index: c.text for c in whole.choices} and finishes == {0: "length", 1: "length"}


def test_n_choices_have_the_seeds_that_follow(client):
    several = chat(client, n=3, seed=5, temperature=1.5)
    alone = [chat(client, seed=5 + i, temperature=1.5).choices[0].message.content for i in range(3)]
    assert [c.message.content for c in several.choices] == alone and len(set(alone)) == 3
    assert [c.index for c in several.choices] == [0, 1, 2]
    assert several.usage.completion_tokens == 36 and several.usage.prompt_tokens == chat(client).usage.prompt_tokens
    assert alone[0] == chat(client, seed=5, temperature=1.5).choices[0].message.content


def test_stop_strings_are_never_shown(client):
    whole = text(client, max_tokens=40).choices[0].text
    stop = whole[10:13]
    before = whole[:whole.index(stop)]
    for given in (stop, [stop], ["\x00never", stop]):
        reply = text(client, max_tokens=40, stop=given).choices[0]
        assert (reply.text, reply.finish_reason) == (before, "stop")
    texts, finishes, _ = streamed(text(client, max_tokens=40, stop=stop, stream=True))
    assert (texts[0], finishes[0]) == (before, "stop")


def test_the_end_token_ends_a_message(client):
    from tryplicity.data.tokenizer import IM_END

    reply = chat(client, logit_bias={str(IM_END): 100})
    assert reply.choices[0].message.content == "" and reply.choices[0].finish_reason == "stop"
    _, finishes, chunks = streamed(chat(client, logit_bias={str(IM_END): 100}, stream=True))
    assert finishes == {0: "stop"} and len(chunks) == 2


def test_several_prompts_as_text_and_as_tokens(server, client):
    prompts = ["the model", "a list of"]
    alone = [text(client, prompt=p).choices[0].text for p in prompts]
    assert [c.text for c in text(client, prompt=prompts).choices] == alone
    ids = [server.service.engine.encode(p) for p in prompts]
    assert [c.text for c in text(client, prompt=ids).choices] == alone
    assert text(client, prompt=ids[0]).choices[0].text == alone[0]
    assert text(client, prompt=prompts[0], echo=True).choices[0].text == prompts[0] + alone[0]
    several = text(client, prompt=prompts, n=2, temperature=1, seed=1)
    assert [c.index for c in several.choices] == [0, 1, 2, 3]
    assert several.choices[3].text == text(client, prompt=prompts[1], temperature=1, seed=2).choices[0].text
    assert several.usage.prompt_tokens == sum(map(len, ids))
    assert len(text(client, max_tokens=openai.NOT_GIVEN).choices[0].text) > 3     # 16 tokens unless said


def test_content_may_come_in_parts_and_answers_go_back_as_they_came(client):
    parts = [{"role": "user", "content": [{"type": "text", "text": "What is"}, {"type": "text", "text": " a list?"}]}]
    first = chat(client)
    assert chat(client, messages=parts).choices[0].message == first.choices[0].message
    history = [{"role": "developer", "content": "Be short."}, *ASK, first.choices[0].message.model_dump(),
               {"role": "user", "content": "And a file?"}]
    again = chat(client, messages=history)
    assert again.choices[0].finish_reason == "length"
    system = [{"role": "system", "content": "Be short."}, *history[1:]]
    assert chat(client, messages=system).choices[0].message == again.choices[0].message


def model_logprobs(engine, ids):
    """By one pass over everything: the log-probabilities of each next token."""
    with torch.inference_mode():
        return engine.model(torch.tensor([ids]))[0].log_softmax(-1)


def test_logprobs_are_the_models_own(server, client):
    engine = server.service.engine
    reply = chat(client, logprobs=True, top_logprobs=3)
    content = reply.choices[0].logprobs.content
    from tryplicity.inference import chat as chat_format

    prompt = chat_format.prompt(engine, ASK)
    names = {i: t for i, t in enumerate(engine.tokenizer.id_to_token(n) for n in range(300))}
    assert len(content) == 12 and len(names) == 300
    by_bytes = {bytes(b): i for i, b in enumerate(engine._token_bytes) if b}
    ids = [by_bytes[bytes(token.bytes)] for token in content]
    expected = model_logprobs(engine, [*prompt, *ids])
    for place, token in enumerate(content):
        row = expected[len(prompt) - 1 + place]
        assert token.logprob == pytest.approx(float(row[ids[place]]), abs=1e-3)
        values = [top.logprob for top in token.top_logprobs]
        assert values == pytest.approx(row.topk(3).values.tolist(), abs=1e-3) and values == sorted(values)[::-1]
        assert token.top_logprobs[0].token == token.token      # greedy
    whole = b"".join(bytes(token.bytes) for token in content).decode("utf-8", "replace")
    assert whole == reply.choices[0].message.content
    streamed_tokens = [t for c in chat(client, logprobs=True, top_logprobs=3, stream=True) for choice in c.choices
                       if choice.logprobs for t in choice.logprobs.content]
    assert streamed_tokens == content
    assert chat(client).choices[0].logprobs is None
    assert chat(client, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []


def test_logprobs_of_completions(client):
    chosen = text(client, logprobs=2, temperature=1.2, seed=4, max_tokens=30)
    found = chosen.choices[0].logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == len(found.text_offset) == 30
    for token, value, top in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
        assert top[token] == value and 2 <= len(top) <= 3
    offset = 0
    for token, at in zip(found.tokens, found.text_offset, strict=True):
        assert at == offset
        offset += len(token)
    if not any(token.startswith("bytes:") for token in found.tokens):
        assert "".join(found.tokens) == chosen.choices[0].text
    assert text(client, logprobs=0).choices[0].logprobs.top_logprobs is None
    parts = [c.choices[0].logprobs for c in text(client, logprobs=2, temperature=1.2, seed=4, max_tokens=30,
                                                 stream=True) if c.choices[0].logprobs]
    assert [t for part in parts for t in part.tokens] == found.tokens
    assert [t for part in parts for t in part.text_offset] == found.text_offset


@pytest.mark.parametrize("seed", [0, 1])
def test_a_json_schema_is_followed(client, seed):
    form = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True}}
    reply = chat(client, response_format=form, temperature=1, seed=seed, max_tokens=80)
    assert reply.choices[0].finish_reason == "stop"
    jsonschema.validate(json.loads(reply.choices[0].message.content), SCHEMA)
    written = text(client, extra_body={"response_format": form}, temperature=1, seed=seed, max_tokens=80).choices[0]
    jsonschema.validate(json.loads(written.text), SCHEMA)
    reply = chat(client, response_format={"type": "json_object"}, max_tokens=400,
                 extra_body={"repetition_penalty": 1.5})
    if reply.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(reply.choices[0].message.content), dict)
    assert reply.choices[0].message.content.lstrip().startswith("{")


def test_beyond_openai(client):
    base = chat(client, temperature=1, seed=2).choices[0].message.content
    greedy = chat(client).choices[0].message.content
    assert chat(client, temperature=1, seed=2, extra_body={"top_k": 1}).choices[0].message.content == greedy != base
    assert chat(client, temperature=1, seed=2, extra_body={"min_p": 1.0}).choices[0].message.content == greedy
    assert chat(client, temperature=1, seed=2, top_p=0.0).choices[0].message.content == greedy
    assert chat(client, extra_body={"repetition_penalty": 9.0}).choices[0].message.content != greedy
    plain = text(client, max_tokens=60).choices[0].text
    for penalty in ("presence_penalty", "frequency_penalty"):
        assert text(client, max_tokens=60, **{penalty: 2.0}).choices[0].text != plain


def test_models(client):
    [model] = client.models.list().data
    assert model.id == "talker" and client.models.retrieve("talker") == model
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another/one")


# --- what real clients send ---

@pytest.mark.parametrize("options", [
    {"metadata": {"a": "b"}}, {"store": True}, {"user": "ann"}, {"service_tier": "flex"}, {"prompt_cache_key": "k"},
    {"prompt_cache_retention": "24h"}, {"safety_identifier": "x"}, {"parallel_tool_calls": False},
    {"prediction": {"type": "content", "content": "x"}}, {"modalities": ["text"]}, {"verbosity": "medium"},
    {"stream_options": {"include_usage": True}}, {"reasoning_effort": "minimal"}, {"tools": TOOLS},
    {"tools": TOOLS, "tool_choice": "auto"}, {"tools": TOOLS, "tool_choice": "none"}, {"tool_choice": "auto"},
    {"tools": [{"type": "web_search"}], "tool_choice": {"type": "allowed_tools", "allowed_tools": {
        "mode": "auto", "tools": []}}}, {"functions": [{"name": "f"}], "function_call": "auto"},
    {"max_completion_tokens": 50}, {"extra_body": {"cache_prompt": True, "top_k": 10**9}},
    {"messages": [{**ASK[0], "name": "ann"}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "What is a list?",
                                                "cache_control": {"type": "ephemeral"}}]}]},
    {"messages": [{"role": "system", "content": ""}, *ASK]}])
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_change_the_text_is_taken_and_changes_nothing(client, options, stream):
    plain = chat(client).choices[0].message.content
    reply = chat(client, **options, stream=stream)
    assert (streamed(reply)[0][0] if stream else reply.choices[0].message.content) == plain


def test_an_upper_bound_that_is_too_large_is_as_good_as_the_largest(started, chat_run):
    with started(chat_run, max_tokens=20) as server:
        client, never = server.openai(), {str(special): -100 for special in range(10)}
        for options in ({"max_tokens": 10**6}, {"max_completion_tokens": 10**9}, {"max_tokens": 20}, {}):
            reply = chat(client, **{"max_tokens": openai.NOT_GIVEN, **options}, logit_bias=never)
            assert (reply.usage.completion_tokens, reply.choices[0].finish_reason) == (20, "length")
        assert text(client, max_tokens=10**6, logit_bias=never).usage.completion_tokens == 20
        assert chat(client, max_tokens=3, max_completion_tokens=9, logit_bias=never).usage.completion_tokens == 3
        [token] = chat(client, logprobs=True, top_logprobs=10**4, max_tokens=1).choices[0].logprobs.content
        assert len(token.top_logprobs) == 20
        assert len(text(client, logprobs=10**4, max_tokens=1).choices[0].logprobs.top_logprobs[0]) in (20, 21)
        found = server.http.get("/api/search", params={"q": "x", "limit": 10**5})
        assert found.json()["error"]["code"] == "no_search"      # and not that the limit is too large


def test_a_conversation_with_an_empty_answer_and_with_calls_of_tools_is_read(server, client):
    """As agents send it back: the empty answer says nothing, the calls and what they gave are there to be read."""
    from tryplicity.inference import chat as chat_format

    plain = chat(client, messages=[*ASK, {"role": "user", "content": "And a file?"}])
    gone = chat(client, messages=[*ASK, {"role": "assistant", "content": ""},
                                  {"role": "user", "content": "And a file?"}])
    assert gone.choices == plain.choices
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"word": "list"}'}}
    history = [*ASK, {"role": "assistant", "content": None, "tool_calls": [call]},
               {"role": "tool", "tool_call_id": "c1", "content": "a sequence"}]
    said = [*ASK, {"role": "assistant", "content": '{"name": "look", "arguments": {"word": "list"}}'},
            {"role": "tool", "content": "a sequence"}]
    prompt = chat_format.prompt(server.service.engine, said)
    assert chat(client, messages=history).usage.prompt_tokens == len(prompt)


def test_a_function_that_must_be_called_is(client):
    """Its arguments follow its schema, whole and as they stream; what several of them would need is refused."""
    named = {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "f"}}, "max_tokens": 80}
    only = {"tools": TOOLS[:1], "tool_choice": "required", "max_tokens": 80}
    for options in (named, only):
        reply = chat(client, **options).choices[0]
        [call] = reply.message.tool_calls
        assert (call.function.name, reply.finish_reason, reply.message.content) == ("f", "tool_calls", None)
        jsonschema.validate(json.loads(call.function.arguments), SCHEMA)
        first, *rest = [c.choices[0].delta.tool_calls[0] for c in chat(client, **options, stream=True)
                        if c.choices[0].delta.tool_calls]
        assert first.id.startswith("call_") and first.function.name == "f" and first.function.arguments == ""
        assert "".join(part.function.arguments for part in rest) == call.function.arguments
    assert chat(client, **{**named, "max_tokens": 2}).choices[0].finish_reason == "length"


def test_a_batch_may_be_larger_than_the_queue(started, chat_run):
    """Each answer is what it is alone, in its place, though the engine has room for few of them."""
    with started(chat_run, slots=2, engine={"max_waiting": 33}) as server:
        client = server.openai()
        prompts = [f"{number}. the list" for number in range(70)]
        reply = text(client, prompt=prompts, max_tokens=3)
        assert [choice.index for choice in reply.choices] == list(range(70))
        for number in (0, 33, 69):
            assert reply.choices[number].text == text(client, prompt=prompts[number], max_tokens=3).choices[0].text
        texts, finishes, _ = streamed(text(client, prompt=prompts, max_tokens=3, stream=True))
        assert texts == {choice.index: choice.text for choice in reply.choices} and len(finishes) == 70


def test_events_can_be_padded_so_that_their_lengths_say_little(client):
    chunks = list(chat(client, stream=True, stream_options={"include_obfuscation": True}))
    sizes = {len((c.choices[0].delta.content or "") + c.model_dump()["obfuscation"]) % 16 for c in chunks}
    assert sizes == {0}
    assert not any("obfuscation" in c.model_fields_set or c.model_extra for c in chat(client, stream=True))


def test_what_open_webui_sends(server, client):
    body = {"stream": True, "model": "talker", "messages": [{"role": "system", "content": "Be short."}, *ASK],
            "stream_options": {"include_usage": True}, "temperature": 0.0, "top_p": 0.9, "max_tokens": 12, "seed": 0,
            "frequency_penalty": 0, "presence_penalty": 0, "stop": ["\n\n\n"], "logit_bias": {}, "tools": [
                {"type": "function", "function": {"name": "get_weather", "description": "The weather.", "parameters": {
                    "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}]}
    with server.http.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200
        lines = [line for line in response.iter_lines() if line.startswith("data: ")]
    plain = chat(client, messages=body["messages"], top_p=0.9)
    written = "".join(json.loads(line[6:])["choices"][0]["delta"].get("content") or "" for line in lines[:-2])
    assert written == plain.choices[0].message.content


# --- the prompt's own probabilities ---

@pytest.mark.parametrize("max_tokens", [0, 1, 3])
@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_logprobs_is_the_model_over_the_prompt(server, client, max_tokens, stream):
    """Against one pass of the model; for tokens as they are, for a text without the mark it begins with."""
    engine, prompt = server.service.engine, "the model reads"
    ids = engine.encode(prompt)
    rows = model_logprobs(engine, ids)
    options = {"echo": True, "logprobs": 2, "max_tokens": max_tokens, "stop": ["\x00" + str(n) for n in range(6)]}
    for given, from_ in ((ids, 0), (prompt, 1)):
        reply = text(client, prompt=given, stream=stream, **options)
        parts = [c.choices[0] for c in reply] if stream else [reply.choices[0]]
        said = {name: [value for part in parts if part.logprobs for value in getattr(part.logprobs, name)]
                for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")}
        size = len(ids) - from_
        assert {len(values) for values in said.values()} == {size + max_tokens}
        assert said["token_logprobs"][0] is None and said["top_logprobs"][0] is None
        for place in range(1, size):
            row, id = rows[place + from_ - 1], ids[place + from_]
            assert said["token_logprobs"][place] == pytest.approx(float(row[id]), abs=1e-4)
            best = sorted(said["top_logprobs"][place].values(), reverse=True)
            assert best[:2] == pytest.approx(row.topk(2).values.tolist(), abs=1e-4)
            assert said["top_logprobs"][place][said["tokens"][place]] == said["token_logprobs"][place]
        whole = "".join(part.text for part in parts)
        assert whole.startswith(prompt if from_ else "<|bos|>" + prompt)
        assert [whole[at:at + len(token)] for at, token in zip(said["text_offset"], said["tokens"], strict=True)][
            :size] == said["tokens"][:size]
        assert parts[-1].finish_reason == "length" or max_tokens


def test_no_tokens_may_be_asked_for(client):
    """Which is how the length of a prompt is counted."""
    reply = text(client, max_tokens=0)
    assert (reply.choices[0].text, reply.choices[0].finish_reason) == ("", "length")
    assert reply.usage.completion_tokens == 0 and reply.usage.prompt_tokens > 3
    assert text(client, max_tokens=0, echo=True).choices[0].text == "the model"


def test_the_tokenizer_can_be_asked(server):
    text_, engine = "the model é", server.service.engine
    said = server.http.post("/tokenize", json={"prompt": text_, "add_special_tokens": False}).json()
    assert said["tokens"] == engine.tokenizer.encode(text_, add_special_tokens=False).ids
    assert said["count"] == len(said["tokens"]) and said["max_model_len"] == 512
    assert server.http.post("/tokenize", json={"prompt": text_}).json()["tokens"] == engine.encode(text_)
    assert server.http.post("/detokenize", json={"tokens": said["tokens"]}).json() == {"prompt": text_}
    assert server.http.post("/detokenize", json={"tokens": [300]}).status_code == 400
    info = server.http.get("/tokenizer_info").json()
    assert (info["bos_token"], info["eos_token"]) == ("<|bos|>", "<|eos|>")


def test_the_chat_template_that_is_told_writes_what_a_chat_reads(server):
    import jinja2

    from tryplicity.inference import chat as chat_format

    template = jinja2.Template(server.http.get("/tokenizer_info").json()["chat_template"], keep_trailing_newline=True)
    messages = [{"role": "system", "content": "Be short."}, *ASK]
    written = template.render(messages=messages, add_generation_prompt=True)
    tokens = server.http.post("/tokenize", json={"prompt": written, "add_special_tokens": False}).json()["tokens"]
    engine = server.service.engine
    words = engine.tokenizer.decode(list(chat_format.prompt(engine, messages)), skip_special_tokens=False)
    assert engine.tokenizer.decode(tokens, skip_special_tokens=False) == words == written


# --- errors ---

def test_messages_of_errors_are_ours(client, server):
    """None says what pydantic would."""
    said = set()
    for options in ({"temperature": "hot"}, {"temperature": 9}, {"messages": 5}, {"messages": []}, {"n": 1.5},
                    {"messages": [{"role": "x"}]}, {"messages": [{"role": "user", "content": 5}]}, {"stop": [5]},
                    {"messages": ["x"]}, {"seed": "x"}, {"stream": "yes"}, {"logit_bias": []}, {"stop": "x" * 600},
                    {"response_format": "json"}, {"response_format": {}}, {"tools": [5]},
                    {"response_format": {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}}):
        answer = server.http.post("/v1/chat/completions", json={**GREEDY, "messages": ASK, **options})
        error = answer.json()["error"]
        assert answer.status_code in (400, 422) and error["message"].startswith(error["param"]), error
        said.add(error["message"])
    assert "temperature: must be a number" in said and "temperature: must be 2 or less" in said
    assert not [message for message in said if "nput should" in message or "not what may stand" in message]



@pytest.mark.parametrize("options, error, param, code", [
    ({"model": "gpt-4o"}, openai.NotFoundError, "model", "model_not_found"),
    ({"messages": []}, openai.UnprocessableEntityError, "messages", "out_of_range"),
    ({"messages": [{"role": "user", "content": " "}]}, openai.BadRequestError, "messages.0.content", None),
    ({"messages": [{"role": "assistant", "content": ""}]}, openai.BadRequestError, "messages", None),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, openai.BadRequestError,
     "messages.0.content.0.text", "missing_parameter"),
    ({"messages": [{"role": "oracle", "content": "x"}]}, openai.BadRequestError, "messages.0.role", "invalid_type"),
    ({"messages": [{"role": "user", "contents": "x"}]}, openai.BadRequestError, "messages.0.contents",
     "unknown_parameter"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
     openai.BadRequestError, "messages.0.content.0.type", "invalid_type"),
    ({"messages": [{"role": "user", "content": "hello " * 600}]}, openai.BadRequestError, "messages",
     "context_length_exceeded"),
    ({"temperature": 3}, openai.UnprocessableEntityError, "temperature", "out_of_range"),
    ({"temperature": "hot"}, openai.BadRequestError, "temperature", "invalid_type"),
    ({"n": 129}, openai.UnprocessableEntityError, "n", "out_of_range"),
    ({"n": 0}, openai.UnprocessableEntityError, "n", "out_of_range"),
    ({"max_tokens": 0}, openai.UnprocessableEntityError, "max_tokens", "out_of_range"),
    ({"stop": ["a"] * 65}, openai.UnprocessableEntityError, "stop", "out_of_range"),
    ({"stop": ""}, openai.UnprocessableEntityError, "stop.0", "out_of_range"),
    ({"tools": TOOLS, "tool_choice": "required"}, openai.BadRequestError, "tool_choice", "unsupported_parameter"),
    ({"tools": TOOLS, "tool_choice": {"type": "custom", "custom": {"name": "f"}}}, openai.BadRequestError,
     "tool_choice", "unsupported_parameter"),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "none"}}}, openai.BadRequestError,
     "tool_choice", None),
    ({"functions": [{"name": "f"}], "function_call": {"name": "f"}}, openai.BadRequestError, "function_call",
     "unsupported_parameter"),
    ({"reasoning_effort": "high"}, openai.BadRequestError, "reasoning_effort", "unsupported_parameter"),
    ({"verbosity": "low"}, openai.BadRequestError, "verbosity", "unsupported_parameter"),
    ({"web_search_options": {}}, openai.BadRequestError, "web_search_options", "unsupported_parameter"),
    ({"modalities": ["audio"]}, openai.BadRequestError, "modalities", "unsupported_parameter"),
    ({"extra_body": {"temprature": 1}}, openai.BadRequestError, "temprature", "unknown_parameter"),
    ({"logit_bias": {"300": 1}}, openai.BadRequestError, "logit_bias", None),
    ({"logit_bias": {"5": 101}}, openai.UnprocessableEntityError, "logit_bias.5", "out_of_range"),
    ({"top_logprobs": 2}, openai.BadRequestError, "top_logprobs", None),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}},
     openai.BadRequestError, "response_format", None),
    ({"response_format": {"type": "xml"}}, openai.BadRequestError, "response_format.type", "invalid_type"),
    ({"seed": 1 << 70}, openai.UnprocessableEntityError, "seed", "out_of_range")])
@pytest.mark.parametrize("stream", [False, True])
def test_a_mistake_raises_the_clients_own_error_and_names_the_parameter(client, options, error, param, code, stream):
    with pytest.raises(error) as caught:
        chat(client, **options, stream=stream)
    assert (caught.value.param, caught.value.code) == (param, code)
    assert caught.value.body["message"] and caught.value.body["type"] == "invalid_request_error"
    assert set(caught.value.body) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("options, param", [
    ({"prompt": []}, "prompt"), ({"prompt": [[]]}, "prompt"), ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": [300]}, "prompt"), ({"prompt": [-1]}, "prompt"), ({"prompt": 5}, "prompt"),
    ({"prompt": [True]}, "prompt"), ({"suffix": "x"}, "suffix"), ({"best_of": 2}, "best_of")])
def test_mistakes_in_completions(client, options, param):
    with pytest.raises(openai.BadRequestError) as caught:
        text(client, **options)
    assert caught.value.param == param


def test_a_hint_for_a_misspelt_parameter(client):
    with pytest.raises(openai.BadRequestError, match=r"unknown parameter 'temprature' \(did you mean temperature\?\)"):
        chat(client, extra_body={"temprature": 1})


def test_a_base_model_writes_on_but_does_not_chat(started, base_run):
    with started(base_run) as server:
        client = server.openai()
        assert len(text(client, model="writer").choices[0].text) > 3
        with pytest.raises(openai.BadRequestError, match=r"base model.*/v1/completions") as caught:
            chat(client, model="writer")
        assert caught.value.code == "not_a_chat_model"
        assert server.http.get("/api/model").json()["card"]["chat"] is False


def test_without_a_model(started):
    with started() as server:
        client = server.openai(max_retries=5)
        assert client.models.list().data == [] and server.http.get("/health").status_code == 200
        start = time.monotonic()
        with pytest.raises(openai.InternalServerError) as caught:
            chat(client)
        assert caught.value.code == "no_model" and caught.value.status_code == 503
        assert time.monotonic() - start < 5     # told not to try again


# --- places ---

def test_429_and_the_clients_retry_gets_through(started, chat_run):
    with started(chat_run, slots=1, engine={"max_waiting": 0}) as server:
        client = server.openai()
        running = chat(client, max_tokens=400, stream=True)
        next(iter(running))
        with pytest.raises(openai.RateLimitError) as caught:
            chat(client)
        assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60
        assert caught.value.code == "rate_limit_exceeded"
        threading.Timer(0.5, running.close).start()
        assert chat(server.openai(max_retries=5)).choices[0].finish_reason == "length"


def test_n_choices_get_all_places_or_none(started, chat_run):
    with started(chat_run, slots=1, engine={"max_waiting": 1}) as server:
        with pytest.raises(openai.RateLimitError):
            chat(server.openai(), n=3, max_tokens=200)
        assert server.free()["tokens_total"] < 3 * 200


def test_a_client_that_goes_away_frees_its_slot(started, chat_run):
    with started(chat_run, slots=1) as server:
        for stream in (True, False):
            client, before = server.openai(timeout=0.3), server.service.engine.statistics()["tokens_total"]
            if stream:
                reply = iter(chat(client, max_tokens=480, stream=True))
                next(reply), next(reply)
                reply.close() if hasattr(reply, "close") else None
                client.close()
            else:
                with pytest.raises(openai.APITimeoutError):
                    chat(client, max_tokens=480, n=4)
            written = server.free()["tokens_total"] - before
            assert 0 < written < 480 * (1 if stream else 4)
            time.sleep(0.2)
            assert server.service.engine.statistics()["tokens_total"] - before == written   # nothing goes on


def test_cancelling_takes_effect_before_the_next_token(started, chat_run):
    """From the moment the server hears of it: at most the token being computed is still written."""
    from tryplicity.inference.generation import Generation

    with started(chat_run, slots=1) as server:
        engine, seen = server.service.engine, []
        submit = engine.submit

        def watched(request, listener):
            generation = submit(request, listener)
            cancel = generation.cancel

            def noted():
                seen.append((generation, generation.completion_tokens))
                cancel()

            generation.cancel = noted
            return generation

        engine.submit = watched
        with server.http.stream("POST", "/v1/completions", json={
                **GREEDY, "prompt": "the", "max_tokens": 400, "stream": True,
                "logit_bias": {str(special): -100 for special in range(10)}}) as response:
            lines = (line for line in response.iter_lines() if line.startswith("data: "))
            for _ in range(4):
                next(lines)
        server.until(lambda: seen and seen[0][0].finish)
        server.free()
        [(generation, tokens)] = seen
        assert isinstance(generation, Generation) and generation.finish == "cancelled"
        assert generation.completion_tokens <= tokens + 1


# --- shapes ---

def assert_nothing_extra(value, where="it"):
    """OpenAI's own classes, which let unknown fields pass: here none may be there, at any depth."""
    if isinstance(value, BaseModel):
        assert not value.model_extra, f"{where}: {set(value.model_extra)}"
        for name in value.model_fields_set:
            assert_nothing_extra(getattr(value, name), f"{where}.{name}")
    elif isinstance(value, list):
        for i, item in enumerate(value):
            assert_nothing_extra(item, f"{where}[{i}]")


def exchanges(server, path, body):
    """The JSON values of an answer as they went over the wire."""
    if not body.get("stream"):
        response = server.http.post(path, json=body)
        assert response.status_code == 200, response.text
        assert response.headers["content-type"] == "application/json"
        return [response.json()]
    with server.http.stream("POST", path, json=body) as response:
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        lines = [line for line in response.iter_lines() if line]
    assert lines[0] == ": ping" and lines[-1] == "data: [DONE]" and all(x.startswith("data: ") for x in lines[1:])
    return [json.loads(line[6:]) for line in lines[1:-1]]


CHAT = {**GREEDY, "messages": ASK, "max_tokens": 4}
TEXT = {**GREEDY, "prompt": "the", "max_tokens": 4}
USAGE = {"stream": True, "stream_options": {"include_usage": True}}


@pytest.mark.parametrize("path, body, model", [
    ("/v1/chat/completions", CHAT, ChatCompletion),
    ("/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 2, "n": 2, "temperature": 1}, ChatCompletion),
    ("/v1/chat/completions", {**CHAT, "stream": True}, ChatCompletionChunk),
    ("/v1/chat/completions", {**CHAT, **USAGE, "logprobs": True, "top_logprobs": 1, "n": 2}, ChatCompletionChunk),
    ("/v1/completions", TEXT, Completion), ("/v1/completions", {**TEXT, "logprobs": 2, "n": 2}, Completion),
    ("/v1/completions", {**TEXT, **USAGE, "logprobs": 1}, Completion)])
def test_every_field_is_one_of_openais_with_its_type(server, path, body, model):
    values = exchanges(server, path, body)
    for value in values:
        if model is Completion and body.get("stream"):   # null until the end, as OpenAI sends it and its class forbids
            for choice in value["choices"]:
                assert choice["finish_reason"] in (None, "length")
                choice["finish_reason"] = choice["finish_reason"] or "length"
        parsed = model.model_validate(value, strict=True)
        assert_nothing_extra(parsed)
        required = {name for name, field in model.model_fields.items() if field.is_required()}
        assert required <= set(value)
        assert value["object"] == {ChatCompletion: "chat.completion", ChatCompletionChunk: "chat.completion.chunk",
                                   Completion: "text_completion"}[model]
        for choice in value["choices"]:
            assert {"index", "finish_reason", "logprobs"} <= set(choice)     # null where there is nothing, not absent
        assert value["system_fingerprint"].startswith("fp_")


def test_the_shape_of_a_model(server):
    listed = server.http.get("/v1/models").json()
    assert set(listed) == {"object", "data"} and listed["object"] == "list"
    for value in (*listed["data"], server.http.get("/v1/models/talker").json()):
        assert_nothing_extra(Model.model_validate(value, strict=True))
        assert set(value) == {name for name, field in Model.model_fields.items() if field.is_required()}
