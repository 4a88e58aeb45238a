"""OpenAI's API: /v1/chat/completions, /v1/completions, /v1/models (https://platform.openai.com/docs/api-reference).

The shapes are theirs, field by field. Beyond them a request may say top_k, min_p and repetition_penalty. A parameter
that cannot be had here is refused by name, never passed over. More tokens asked for than the context has room for end
with finish_reason "length".
"""

from __future__ import annotations

import hashlib
import json as json_text
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from sanic.response import HTTPResponse, json

from tryplicity.server import routing
from tryplicity.server.errors import ApiError, outside, wrong
from tryplicity.server.limits import Body, parse
from tryplicity.server.streams import Answers, EventStream

if TYPE_CHECKING:
    from sanic import Request, Sanic

    from tryplicity.inference.engine import Engine
    from tryplicity.inference.generation import Generation, Piece, Token
    from tryplicity.inference.generation import Request as EngineRequest
    from tryplicity.inference.sampler import Sampling
    from tryplicity.server.routing import ReadBody
    from tryplicity.server.service import Service

#: parameters of OpenAI's that cannot be had here, with the values that ask for nothing
NO_CHAT: dict[str, tuple[Any, ...]] = {
    "audio": (), "function_call": ("none",), "functions": ([],), "metadata": ({},), "modalities": (["text"],),
    "moderation": (), "parallel_tool_calls": (True, False), "prediction": (), "prompt_cache_key": (),
    "prompt_cache_retention": (), "reasoning_effort": ("none",), "safety_identifier": (),
    "service_tier": ("auto", "default"), "store": (False,), "tool_choice": ("none",), "tools": ([],),
    "verbosity": (), "web_search_options": ()}
NO_TEXT: dict[str, tuple[Any, ...]] = {"suffix": ("",), "best_of": (1,)}


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Stop = Annotated[list[Annotated[str, Field(min_length=1, max_length=500)]], BeforeValidator(_listed),
                 Field(max_length=4)]


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: bool = False   # hides lengths from who listens in; asked for, it is refused


class Shared(Body):
    """What both kinds of completion can be told."""

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=128)] = 1
    stop: Stop = []
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0, le=1 << 31)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] = 1.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = {}
    user: str | None = None             # whose request it is: nothing here depends on it

    def check(self) -> None:
        """What no single field shows. Raises ApiError."""
        if self.stream_options is not None and not self.stream:
            raise wrong("stream_options is only for stream: true", "stream_options")
        if self.stream_options is not None and self.stream_options.include_obfuscation:
            raise wrong("obfuscation is not supported by this server; leave it out",
                        "stream_options.include_obfuscation", "unsupported_parameter")

    @property
    def usage_chunk(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, vocab_size: int, index: int = 0) -> Sampling:
        """For the choice `index`, whose seed is the seed plus the index. Raises ApiError."""
        from tryplicity.inference.sampler import Sampling

        bias = {}
        for key, value in self.logit_bias.items():
            if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < vocab_size):
                raise wrong(f"logit_bias: {key[:20]!r} is no token of this model (0 to {vocab_size - 1})",
                            "logit_bias")
            bias[int(key)] = value
        return Sampling(temperature=self.temperature, top_p=max(self.top_p, 1e-9), top_k=self.top_k, min_p=self.min_p,
                        repetition_penalty=self.repetition_penalty, presence_penalty=self.presence_penalty,
                        frequency_penalty=self.frequency_penalty, logit_bias=bias,
                        seed=None if self.seed is None else (self.seed + index) % (1 << 63))


class TextPart(Body):
    type: Literal["text"]
    text: str


def _parts(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class ChatMessage(Body):
    """Text only. Clients send an answer back with all its fields, so that those that say nothing are taken."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[TextPart], BeforeValidator(_parts), Field(min_length=1)]
    refusal: None = None
    audio: None = None
    function_call: None = None
    name: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None

    def plain(self) -> dict[str, str]:
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": "".join(part.text for part in self.content)}


class JsonSchema(Body):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None          # it is always followed to the letter


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatBody(Shared):
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None

    def check(self) -> None:
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise wrong("top_logprobs needs logprobs: true", "top_logprobs")
        form = self.response_format
        if form is not None and (form.type == "json_schema") != (form.json_schema is not None):
            raise wrong("response_format: json_schema belongs to type json_schema, and to no other",
                        "response_format")
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise wrong("give max_completion_tokens or max_tokens, not both", "max_tokens")

    def schema(self) -> dict[str, Any] | None:
        form = self.response_format
        if form is None or form.type == "text":
            return None
        return {"type": "object"} if form.json_schema is None else form.json_schema.schema_


Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class TextBody(Shared):
    prompt: Any
    max_tokens: Annotated[int, Field(ge=1)] = 16
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool = False

    def check(self) -> None:
        super().check()
        if self.echo and self.logprobs is not None:
            raise wrong("echo with logprobs is not supported: a prompt's own probabilities are not kept", "echo",
                        "unsupported_parameter")

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


def add_routes(app: Sanic, service: Service, read: ReadBody) -> None:
    async def models(request: Request) -> HTTPResponse:
        if service.state == "loading":
            service.ready_engine()
        engine = service.engine
        return json({"object": "list", "data": [_model(engine, service)] if engine else []})

    async def model(request: Request, id: str) -> HTTPResponse:
        engine = service.ready_engine()
        _check_model(engine, id)
        return json(_model(engine, service))

    async def chat(request: Request) -> HTTPResponse | None:
        body = parse(ChatBody, _without_nulls(await read(request)), NO_CHAT)
        body.check()
        engine = service.ready_engine()
        _check_model(engine, body.model)
        if not engine.card.chat:
            raise wrong(f"{engine.card.id} is a base model: it has not learnt to chat; use /v1/completions", "model",
                        "not_a_chat_model")
        return await _answer(request, service, engine, ChatShape(engine, body, service))

    async def text(request: Request) -> HTTPResponse | None:
        body = parse(TextBody, await read(request), NO_TEXT)
        body.check()
        engine = service.ready_engine()
        _check_model(engine, body.model)
        return await _answer(request, service, engine, TextShape(engine, body, service))

    for method, path, handler in (("GET", "/v1/models", models), ("GET", "/v1/models/<id:path>", model),
                                  ("POST", "/v1/chat/completions", chat), ("POST", "/v1/completions", text)):
        routing.add(app, method, path, handler)


def _without_nulls(body: dict[str, Any]) -> dict[str, Any]:
    """Messages without the fields that say nothing."""
    messages = body.get("messages")
    if not isinstance(messages, list):
        return body
    return {**body, "messages": [{k: v for k, v in m.items() if v is not None} if isinstance(m, dict) else m
                                 for m in messages]}


def _model(engine: Engine, service: Service) -> dict[str, Any]:
    return {"id": engine.card.id, "object": "model", "created": int(service.started), "owned_by": "tryplicity"}


def _check_model(engine: Engine, name: str) -> None:
    if name != engine.card.id:
        raise ApiError(404, f"the model {name[:100]!r} does not exist; there is {engine.card.id!r}", param="model",
                       code="model_not_found", type="invalid_request_error")


async def _answer(request: Request, service: Service, engine: Engine, shape: Shape) -> HTTPResponse | None:
    """Generate, and send all at the end or each piece as it comes."""
    body = shape.body
    with service.gate.enter(), Answers(service) as answers:
        await answers.start(engine, shape.requests)
        if not body.stream:
            pieces: list[list[Piece]] = [[] for _ in answers.generations]
            async for event in answers:
                if event is not None:
                    pieces[event[0]].append(event[1])
            return json({**shape.head(shape.object), "choices": [shape.whole(i, p) for i, p in enumerate(pieces)],
                         "usage": shape.usage(answers.generations)})
        stream = await EventStream(request, service).open()
        usage = {"usage": None} if body.usage_chunk else {}
        head = {**shape.head(shape.chunk_object), **usage}
        try:
            for choice in shape.first(len(answers.generations)):
                await stream.send({**head, "choices": [choice]})
            async for event in answers:
                if event is None:
                    await stream.ping()
                    continue
                for choice in shape.chunks(*event):
                    await stream.send({**head, "choices": [choice]})
            if body.usage_chunk:
                await stream.send({**head, "choices": [], "usage": shape.usage(answers.generations)})
            await stream.send("[DONE]")
        except Exception as exception:
            await stream.send(stream.told(exception).as_dict())
        await stream.close()
    return None


class Shape:
    """How one kind of completion asks the engine and is written out."""

    object: str
    chunk_object: str
    prefix: str

    def __init__(self, engine: Engine, body: Any, service: Service) -> None:
        self.engine, self.body, self.service = engine, body, service
        self.id, self.created = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())
        self.words = Words.of(engine)

    def requests(self) -> list[EngineRequest]:
        raise NotImplementedError

    def head(self, object: str) -> dict[str, Any]:
        return {"id": self.id, "object": object, "created": self.created, "model": self.engine.card.id,
                "system_fingerprint": fingerprint(self.engine)}

    def first(self, choices: int) -> Iterator[dict[str, Any]]:
        """The choices of the chunks that open a stream."""
        return iter(())

    def chunks(self, index: int, piece: Piece) -> Iterator[dict[str, Any]]:
        raise NotImplementedError

    def whole(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        raise NotImplementedError

    def usage(self, generations: Sequence[Generation]) -> dict[str, Any]:
        """A prompt counts once, however many choices continue it."""
        prompts = generations[::self.body.n]
        prompt = sum(generation.prompt_tokens for generation in prompts)
        completion = sum(generation.completion_tokens for generation in generations)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion,
                "prompt_tokens_details": {"cached_tokens": sum(g.cached_tokens for g in prompts)}}

    def _room(self, prompt: Sequence[int], asked: int | None, param: str) -> int:
        """How many tokens to write at most. Raises ApiError."""
        limit, context = self.service.options.max_tokens, self.engine.card.context_length
        if len(prompt) >= context:
            raise wrong(f"this model's context is {context} tokens and the prompt has {len(prompt)}; shorten it",
                        param, "context_length_exceeded")
        if asked is not None and asked > limit:
            raise outside(f"max_tokens: at most {limit} on this server", "max_tokens")
        return min(asked or limit, limit, context - len(prompt))

    def _check_choices(self, prompts: int) -> None:
        most = self.service.options.choices
        if self.body.n * prompts > most:
            raise outside(f"n: at most {most} choices in one request on this server", "n")


class ChatShape(Shape):
    object, chunk_object, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"
    body: ChatBody

    def requests(self) -> list[EngineRequest]:
        from tryplicity.data.conversations import check_messages
        from tryplicity.inference import chat
        from tryplicity.inference.generation import Request as EngineRequest

        body, limit = self.body, self.service.options.messages
        self._check_choices(1)
        if len(body.messages) > limit:
            raise outside(f"messages: at most {limit} on this server", "messages")
        schema, most_bytes = body.schema(), self.service.options.schema_bytes
        if schema is not None and len(json_text.dumps(schema)) > most_bytes:
            raise outside(f"response_format: a schema of at most {most_bytes:,} bytes on this server",
                          "response_format")
        messages = [message.plain() for message in body.messages]
        check_messages(messages, "messages")
        prompt = tuple(chat.prompt(self.engine, messages))
        most = self._room(prompt, body.max_completion_tokens or body.max_tokens, "messages")
        tops = (body.top_logprobs or 0) if body.logprobs else None
        vocab_size = self.words.size
        return [EngineRequest(prompt, body.sampling(vocab_size, i), most, stop=tuple(body.stop), logprobs=tops,
                              end_tokens=chat.END_TOKENS, schema=schema) for i in range(body.n)]

    def first(self, choices: int) -> Iterator[dict[str, Any]]:
        for index in range(choices):
            yield self._choice(index, {"role": "assistant", "content": "", "refusal": None}, None, None)

    def chunks(self, index: int, piece: Piece) -> Iterator[dict[str, Any]]:
        logprobs = self._logprobs(piece.tokens)
        if piece.text or (logprobs and piece.tokens):
            yield self._choice(index, {"content": piece.text}, logprobs, None)
        if piece.finish:
            yield self._choice(index, {}, None, piece.finish)

    def whole(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        tokens = [token for piece in pieces for token in piece.tokens]
        message = {"role": "assistant", "content": "".join(piece.text for piece in pieces), "refusal": None}
        return {"index": index, "message": message, "logprobs": self._logprobs(tokens),
                "finish_reason": pieces[-1].finish}

    def _choice(self, index: int, delta: dict[str, Any], logprobs: Any, finish: str | None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not self.body.logprobs:
            return None
        content = [{**self._token(token.id, token.logprob),
                    "top_logprobs": [self._token(id, value) for id, value in token.top]} for token in tokens]
        return {"content": content, "refusal": None}

    def _token(self, id: int, logprob: float | None) -> dict[str, Any]:
        return {"token": self.words.text(id), "logprob": _finite(logprob), "bytes": list(self.words.bytes(id))}


class TextShape(Shape):
    object = chunk_object = "text_completion"
    prefix = "cmpl"
    body: TextBody

    def __init__(self, engine: Engine, body: TextBody, service: Service) -> None:
        super().__init__(engine, body, service)
        self.prompts = body.prompts()
        self._check_choices(len(self.prompts))
        self._offset: dict[int, int] = {}

    def requests(self) -> list[EngineRequest]:
        from tryplicity.data.tokenizer import BOS
        from tryplicity.inference.generation import Request as EngineRequest

        body, requests = self.body, []
        vocab_size = self.words.size
        for prompt in self.prompts:
            if isinstance(prompt, str):
                ids = (BOS, *self.engine.tokenizer.encode(prompt, add_special_tokens=False).ids)
            elif all(0 <= id < vocab_size for id in prompt):
                ids = tuple(prompt)
            else:
                raise wrong(f"prompt: a token is none of this model's (0 to {vocab_size - 1})", "prompt")
            most = self._room(ids, body.max_tokens, "prompt")
            requests += [EngineRequest(ids, body.sampling(vocab_size, i), most, stop=tuple(body.stop),
                                       logprobs=body.logprobs) for i in range(body.n)]
        return requests

    def first(self, choices: int) -> Iterator[dict[str, Any]]:
        if self.body.echo:
            for index in range(choices):
                yield self._choice(index, self._echo(index), None, None)

    def chunks(self, index: int, piece: Piece) -> Iterator[dict[str, Any]]:
        logprobs = self._logprobs(index, piece.tokens)
        if piece.text or piece.finish or (logprobs and piece.tokens):
            yield self._choice(index, piece.text, logprobs, piece.finish)

    def whole(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        tokens = [token for piece in pieces for token in piece.tokens]
        text = (self._echo(index) if self.body.echo else "") + "".join(piece.text for piece in pieces)
        return self._choice(index, text, self._logprobs(index, tokens), pieces[-1].finish)

    def _echo(self, index: int) -> str:
        prompt = self.prompts[index // self.body.n]
        return prompt if isinstance(prompt, str) else \
            b"".join(self.words.bytes(id) for id in prompt).decode("utf-8", "replace")

    def _choice(self, index: int, text: str, logprobs: Any, finish: str | None) -> dict[str, Any]:
        return {"text": text, "index": index, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs(self, index: int, tokens: Sequence[Token]) -> dict[str, Any] | None:
        """As parallel lists. An offset counts the characters of the tokens before; the chosen token is always among
        the top ones, so that these can be one more than asked for."""
        if self.body.logprobs is None:
            return None
        offsets = []
        for token in tokens:
            offsets.append(self._offset.setdefault(index, 0))
            self._offset[index] += len(self.words.text(token.id, "bytes:"))
        tops = None
        if self.body.logprobs:
            tops = [{self.words.text(id, "bytes:"): _finite(value)
                     for id, value in (*token.top, (token.id, token.logprob))} for token in tokens]
        return {"tokens": [self.words.text(token.id, "bytes:") for token in tokens],
                "token_logprobs": [_finite(token.logprob) for token in tokens],
                "top_logprobs": tops, "text_offset": offsets}


class Words:
    """What each token of a model stands for."""

    def __init__(self, tokenizer: Any) -> None:
        from tryplicity.inference.text import token_bytes

        self._bytes = token_bytes(tokenizer)
        self._name: Callable[[int], str] = tokenizer.id_to_token
        self.size = len(self._bytes)

    @classmethod
    def of(cls, engine: Engine) -> Words:
        """Made once for each engine."""
        if not hasattr(engine, "_words"):
            engine._words = cls(engine.tokenizer)
        return engine._words

    def bytes(self, id: int) -> bytes:
        """Its bytes; a special token's are those of its name."""
        return self._bytes[id] or self._name(id).encode()

    def text(self, id: int, mark: str = "") -> str:
        """Its text; a part of a character as \\xNN, after `mark`."""
        try:
            return self.bytes(id).decode()
        except UnicodeDecodeError:
            return mark + "".join(f"\\x{byte:02x}" for byte in self.bytes(id))


def _finite(logprob: float | None) -> float | None:
    """JSON has no infinity; OpenAI writes -9999.0 for what is next to impossible."""
    return None if logprob is None else max(logprob, -9999.0)


def fingerprint(engine: Engine) -> str:
    """The same as long as the model and the program are: with it, a seed gives the same text."""
    from tryplicity import __version__

    card = engine.card
    said: Mapping[str, Any] = {"id": card.id, "format": card.format, "parameters": card.parameters,
                               "version": __version__}
    return "fp_" + hashlib.sha256(repr(said).encode()).hexdigest()[:12]
