"""What OpenAI's three ways to ask for text can be told (of /v1/responses: `asked_responses`), and what messages say.

Three kinds of parameters. What cannot change the text (whose request it is, where its bill goes, hints for caches) is
taken, whatever it is. What would change it and is not done here is refused by its name; the values that ask for nothing
are taken. The rest is done, an upper bound that is too large being as good as the largest.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, Field

from tryplicity.server.errors import wrong
from tryplicity.server.limits import Body

if TYPE_CHECKING:
    from tryplicity.inference.sampler import Sampling

MOST_TOP_LOGPROBS = 20
#: cannot change the text
IDLE = frozenset({
    "cache_prompt", "metadata", "parallel_tool_calls", "prediction", "prompt_cache_key", "prompt_cache_options",
    "prompt_cache_retention", "safety_identifier", "service_tier", "store", "user"})
#: would change it: each with the values that ask for nothing
NO_CHAT: dict[str, tuple[Any, ...]] = {
    "audio": (), "modalities": (["text"],), "moderation": (), "reasoning_effort": ("none", "minimal"),
    "verbosity": ("medium",), "web_search_options": ()}
NO_TEXT: dict[str, tuple[Any, ...]] = {"suffix": ("",), "best_of": (1,)}


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _clipped(value: Any) -> Any:
    return min(value, MOST_TOP_LOGPROBS) if type(value) is int else value


Stop = Annotated[list[Annotated[str, Field(min_length=1, max_length=500)]], BeforeValidator(_listed),
                 Field(max_length=64)]
Tops = Annotated[int, Field(ge=0), BeforeValidator(_clipped)]
UpTo = Annotated[int, Field(ge=1)]      # tokens to be written
Tools = Annotated[list[dict[str, Any]], Field(max_length=1000)]


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: bool = False   # lengthens events by noise, so that who listens in does not see words' lengths


class Sampled(Body):
    """How the next token is chosen."""

    model: str
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] = 1.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = {}
    stop: Stop = []

    def check(self) -> None:
        """What no single field shows. Raises ApiError."""

    def sampling(self, vocab_size: int, index: int = 0) -> Sampling:
        """For the choice `index`, whose seed is the seed plus the index. Raises ApiError."""
        from tryplicity.inference.sampler import Sampling

        bias = {}
        for key, value in self.logit_bias.items():
            if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < vocab_size):
                raise wrong(f"logit_bias: {key[:20]!r} is no token of this model (0 to {vocab_size - 1})",
                            "logit_bias")
            bias[int(key)] = value
        return Sampling(temperature=self.temperature, top_p=max(self.top_p, 1e-9), top_k=min(self.top_k, vocab_size),
                        min_p=self.min_p, repetition_penalty=self.repetition_penalty,
                        presence_penalty=self.presence_penalty, frequency_penalty=self.frequency_penalty,
                        logit_bias=bias, seed=None if self.seed is None else (self.seed + index) % (1 << 63))


# --- forms of an answer ---

class JsonSchema(Body):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None          # it is always followed to the letter


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def check(self) -> None:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise wrong("response_format: json_schema belongs to type json_schema, and to no other",
                        "response_format")

    def schema(self) -> dict[str, Any] | None:
        if self.type == "text":
            return None
        return {"type": "object"} if self.json_schema is None else self.json_schema.schema_


# --- messages ---

class Part(Body):
    """Of a message's content: text alone."""

    type: Literal["text", "input_text", "output_text", "refusal"] = "text"
    text: str | None = None
    refusal: str | None = None
    annotations: Any = None
    logprobs: Any = None
    cache_control: Any = None           # a hint for caches
    prompt_cache_breakpoint: Any = None


def _parts(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


Content = Annotated[list[Part], BeforeValidator(_parts)]


def plain(content: list[Part], place: str) -> str:
    """Raises ApiError for a part that has no text."""
    texts = [part.refusal if part.type == "refusal" else part.text for part in content]
    if None in texts:
        raise wrong(f"{place}.{texts.index(None)}.text: is missing", f"{place}.{texts.index(None)}.text",
                    "missing_parameter")
    return "".join(texts)


class Call(Body):
    """That a function be called, as the assistant said it."""

    name: str
    arguments: str | dict[str, Any] = ""

    def plain(self) -> str:
        """As text, for a model that knows nothing else."""
        arguments = self.arguments
        if isinstance(arguments, str):
            with contextlib.suppress(ValueError):
                arguments = json.loads(arguments)
        return json.dumps({"name": self.name, "arguments": arguments}, ensure_ascii=False)


class ToolCall(Body):
    id: str | None = None
    index: int | None = None
    type: Literal["function"] = "function"
    function: Call


class ChatMessage(Body):
    """Clients send an answer back with all its fields, so that those that say nothing are taken."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Content = []
    name: str | None = None
    tool_calls: list[ToolCall] = []
    function_call: Call | None = None
    tool_call_id: str | None = None
    refusal: str = ""
    audio: None = None
    annotations: Any = None
    reasoning: Literal[""] = ""
    reasoning_content: Literal[""] = ""
    provider_specific_fields: Any = None
    cache_control: Any = None

    def plain(self, place: str) -> dict[str, str]:
        """Raises ApiError."""
        role = {"developer": "system", "function": "tool"}.get(self.role, self.role)
        calls = [call.function for call in self.tool_calls]
        calls += [self.function_call] if self.function_call else []
        text = plain(self.content, f"{place}.content") or self.refusal
        return {"role": role, "content": "\n".join([*([text] if text else []), *(call.plain() for call in calls)])}


def dialogue(messages: list[dict[str, str]], param: str) -> list[dict[str, str]]:
    """The messages that say something. Raises ApiError for a question that asks nothing."""
    for number, message in enumerate(messages):
        if message["role"] == "user" and not message["content"].strip():
            raise wrong(f"{param}.{number}.content: is empty; write it, or leave the message out",
                        f"{param}.{number}.content")
    said = [message for message in messages if message["content"].strip()]
    if not said:
        raise wrong(f"{param}: no message says anything", param)
    return said


# --- tools: a model that does not know them declines, unless it is given no choice ---

class Function(NamedTuple):
    """What must be called: the answer is its arguments, held to their schema."""

    name: str
    parameters: dict[str, Any]


def forced(tools: list[dict[str, Any]], choice: Any, param: str = "tool_choice") -> Function | None:
    """The one function that a choice leaves. Raises ApiError for a choice among several that must be made, which needs
    a model that knows tools, and for one that is not there."""
    kind = choice.get("type") if isinstance(choice, Mapping) else choice
    functions, names = [_function(tool) for tool in tools if tool.get("type") == "function"], None
    if kind == "function":
        kind, names = "required", {_function(choice).name}
    elif kind == "allowed_tools":
        allowed = choice.get("allowed_tools", choice)
        kind = allowed.get("mode") if isinstance(allowed, Mapping) else "no object"
        names = {_function(tool).name for tool in allowed.get("tools") or () if isinstance(tool, Mapping)} \
            if isinstance(allowed, Mapping) else None
    if kind in (None, "auto", "none"):
        return None
    if kind != "required":
        said = kind if isinstance(kind, str) else "this value"
        raise wrong(f"{param}: {said[:40]!r} is not supported by this server", param, "unsupported_parameter")
    found = [function for function in functions if names is None or function.name in names]
    if not found:
        raise wrong(f"{param}: there is no such function among the tools", param)
    if len(found) > 1:
        raise wrong(f"{param}: 'required' among several functions is not supported by this server: the model has not "
                    "learnt to choose; name the function, or say auto", param, "unsupported_parameter")
    return found[0]


def _function(tool: Mapping[str, Any]) -> Function:
    said = tool.get("function", tool)       # chats put it one level deeper than responses do
    said = said if isinstance(said, Mapping) else {}
    parameters = said.get("parameters")
    return Function(str(said.get("name")), parameters if isinstance(parameters, dict) else {"type": "object"})


class Shared(Sampled):
    """What both kinds of completion can be told."""

    n: Annotated[int, Field(ge=1, le=128)] = 1
    response_format: ResponseFormat | None = None

    def check(self) -> None:
        if self.response_format is not None:
            self.response_format.check()

    @property
    def usage_chunk(self) -> bool:
        return self.stream and self.stream_options.include_usage

    def schema(self) -> dict[str, Any] | None:
        return None if self.response_format is None else self.response_format.schema()


class ChatBody(Shared):
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: UpTo | None = None
    max_completion_tokens: UpTo | None = None
    logprobs: bool = False
    top_logprobs: Tops = 0
    tools: Tools = []
    tool_choice: Any = None
    functions: Tools = []               # what tools were called before 2023
    function_call: Any = None

    def check(self) -> None:
        super().check()
        if self.top_logprobs and not self.logprobs:
            raise wrong("top_logprobs needs logprobs: true", "top_logprobs")
        forced(self.tools, self.tool_choice)
        if self.function_call not in (None, "auto", "none"):
            raise wrong("function_call is not supported by this server; say tool_choice instead", "function_call",
                        "unsupported_parameter")

    @property
    def call(self) -> Function | None:
        return forced(self.tools, self.tool_choice)

    def schema(self) -> dict[str, Any] | None:
        return self.call.parameters if self.call else super().schema()

    @property
    def most(self) -> int | None:
        return min((n for n in (self.max_tokens, self.max_completion_tokens) if n is not None), default=None)


class TextBody(Shared):
    prompt: Any
    max_tokens: Annotated[int, Field(ge=0)] = 16
    logprobs: Tops | None = None
    echo: bool = False

    def prompts(self) -> list[str] | list[list[int]]:
        """One or more, each text or tokens. Raises ApiError."""
        value = self.prompt
        if isinstance(value, str):
            return [value]
        if isinstance(value, list) and value:
            if all(isinstance(part, str) for part in value):
                return value
            if all(type(part) is int for part in value):
                return [value]
            if all(isinstance(part, list) and part and all(type(i) is int for i in part) for part in value):
                return value
        raise wrong("prompt must be a string, a list of strings, a list of tokens or a list of such lists", "prompt",
                    "invalid_type")


def without_nulls(body: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The body, its messages (under `name`) without the fields that say nothing."""
    return {**body, name: _without_nulls(body[name], 4)} if isinstance(body.get(name), list) else dict(body)


def _without_nulls(value: Any, depth: int) -> Any:
    if depth and isinstance(value, dict):
        return {key: _without_nulls(inner, depth - 1) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner, depth - 1) for inner in value] if depth and isinstance(value, list) else value
