"""OpenAI's API: /v1/chat/completions, /v1/completions, /v1/models (https://platform.openai.com/docs/api-reference).

The shapes are theirs, field by field; `asked` says what a request may hold. More tokens asked for than the context has
room for end with finish_reason "length".
"""

from __future__ import annotations

import hashlib
import json as json_text
import secrets
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sanic.response import HTTPResponse, json

from tryplicity.server import routing
from tryplicity.server.asked import IDLE, NO_CHAT, NO_TEXT, ChatBody, Sampled, TextBody, dialogue, without_nulls
from tryplicity.server.errors import ApiError, outside, wrong
from tryplicity.server.limits import parse
from tryplicity.server.streams import Answers, EventStream

if TYPE_CHECKING:
    from sanic import Request, Sanic

    from tryplicity.inference.engine import Engine
    from tryplicity.inference.generation import Generation, Piece, Token
    from tryplicity.inference.generation import Request as EngineRequest
    from tryplicity.server.routing import ReadBody
    from tryplicity.server.service import Service


def add_routes(app: Sanic, service: Service, read: ReadBody) -> None:
    async def models(request: Request) -> HTTPResponse:
        if service.state == "loading":
            service.ready_engine()
        engine = service.engine
        return json({"object": "list", "data": [_model(engine, service)] if engine else []})

    async def model(request: Request, id: str) -> HTTPResponse:
        engine = service.ready_engine()
        check_model(engine, id)
        return json(_model(engine, service))

    async def chat(request: Request) -> HTTPResponse | None:
        body = parse(ChatBody, without_nulls(await read(request), "messages"), NO_CHAT, IDLE)
        body.check()
        engine = service.ready_engine()
        check_model(engine, body.model, chat=True)
        return await _answer(request, service, engine, ChatShape(engine, body, service))

    async def text(request: Request) -> HTTPResponse | None:
        body = parse(TextBody, await read(request), NO_TEXT, IDLE)
        body.check()
        engine = service.ready_engine()
        check_model(engine, body.model)
        return await _answer(request, service, engine, TextShape(engine, body, service))

    for method, path, handler in (("GET", "/v1/models", models), ("GET", "/v1/models/<id:path>", model),
                                  ("POST", "/v1/chat/completions", chat), ("POST", "/v1/completions", text)):
        routing.add(app, method, path, handler)


def _model(engine: Engine, service: Service) -> dict[str, Any]:
    return {"id": engine.card.id, "object": "model", "created": int(service.started), "owned_by": "tryplicity"}


def check_model(engine: Engine, name: str, chat: bool = False) -> None:
    """Raises ApiError for another model, and where a conversation is wanted of one that cannot hold it."""
    if name != engine.card.id:
        raise ApiError(404, f"the model {name[:100]!r} does not exist; there is {engine.card.id!r}", param="model",
                       code="model_not_found", type="invalid_request_error")
    if chat and not engine.card.chat:
        raise wrong(f"{name} is a base model: it has not learnt to chat; use /v1/completions", "model",
                    "not_a_chat_model")
    if chat and engine.tokenizer is None:
        raise wrong(f"{name} came without a tokenizer and reads no text; send tokens to /v1/completions", "model",
                    "no_tokenizer")


async def _answer(request: Request, service: Service, engine: Engine, shape: Shape) -> HTTPResponse | None:
    """Generate, and send all at the end or each piece as it comes."""
    body = shape.body
    with service.gate.enter(), Answers(service) as answers:
        await answers.start(engine, shape.requests)
        if not body.stream:
            pieces: list[list[Piece]] = [[] for _ in range(answers.choices)]
            async for event in answers:
                if event is not None:
                    pieces[event[0]].append(event[1])
            choices = [shape.whole(i, p, answers.generations[i]) for i, p in enumerate(pieces)]
            return json({**shape.head(shape.object), "choices": choices, "usage": shape.usage(answers.generations)})
        stream = await EventStream(request, service).open()
        usage = {"usage": None} if body.usage_chunk else {}
        head = {**shape.head(shape.chunk_object), **usage}

        async def send(choice: dict[str, Any]) -> None:
            noise = obfuscation(body, choice.get("text") or choice.get("delta", {}).get("content") or "")
            await stream.send({**head, "choices": [choice], **noise})

        try:
            for choice in shape.first(answers.choices):
                await send(choice)
            async for event in answers:
                if event is None:
                    await stream.ping()
                    continue
                for choice in shape.chunks(*event, answers.generations[event[0]]):
                    await send(choice)
            if body.usage_chunk:
                await stream.send({**head, "choices": [], "usage": shape.usage(answers.generations)})
            await stream.send("[DONE]")
        except Exception as exception:
            await stream.send(stream.told(exception).as_dict())
        await stream.close()
    return None


def obfuscation(body: Sampled, text: str) -> dict[str, str]:
    """What fills an event up to one of few lengths, where it is asked for."""
    if not body.stream_options.include_obfuscation:
        return {}
    missing = -len(text) % 16 or 16
    return {"obfuscation": secrets.token_urlsafe(missing)[:missing]}


def room(engine: Engine, service: Service, prompt: Sequence[int], asked: int | None, param: str) -> int:
    """How many tokens to write at most. Raises ApiError."""
    limit, context = service.options.max_tokens, engine.card.context_length
    if len(prompt) + (asked != 0) > context:
        raise wrong(f"this model's context is {context} tokens and the prompt has {len(prompt)}; shorten it",
                    param, "context_length_exceeded")
    return min(limit if asked is None else asked, limit, context - len(prompt))


def check_schema(schema: dict[str, Any] | None, service: Service, param: str) -> None:
    """Raises ApiError."""
    most_bytes = service.options.schema_bytes
    if schema is not None and len(json_text.dumps(schema)) > most_bytes:
        raise outside(f"{param}: a schema of at most {most_bytes:,} bytes on this server", param)


def conversation(engine: Engine, service: Service, messages: list[dict[str, str]], param: str) -> tuple[int, ...]:
    """The tokens of messages, after which the answer begins. Raises ApiError."""
    from tryplicity.inference import chat

    if len(messages) > service.options.messages:
        raise outside(f"{param}: at most {service.options.messages} on this server", param)
    return tuple(chat.prompt(engine, dialogue(messages, param)))


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

    def chunks(self, index: int, piece: Piece, generation: Generation) -> Iterator[dict[str, Any]]:
        raise NotImplementedError

    def whole(self, index: int, pieces: Sequence[Piece], generation: Generation) -> dict[str, Any]:
        raise NotImplementedError

    def usage(self, generations: Sequence[Generation]) -> dict[str, Any]:
        """A prompt counts once, however many choices continue it."""
        prompts = generations[::self.body.n]
        prompt = sum(generation.prompt_tokens for generation in prompts)
        completion = sum(generation.completion_tokens for generation in generations)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion,
                "prompt_tokens_details": {"cached_tokens": sum(g.cached_tokens for g in prompts)}}

    def _check_choices(self, prompts: int) -> None:
        most = self.service.options.choices
        if self.body.n * prompts > most:
            raise outside(f"at most {most} answers in one request on this server, and these are "
                          f"{self.body.n * prompts}", "prompt" if prompts > most else "n")


class ChatShape(Shape):
    object, chunk_object, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"
    body: ChatBody

    def __init__(self, engine: Engine, body: ChatBody, service: Service) -> None:
        super().__init__(engine, body, service)
        self.call = body.call
        self._call_ids = [f"call_{uuid.uuid4().hex}" for _ in range(body.n)] if self.call else []

    def requests(self) -> list[EngineRequest]:
        from tryplicity.inference.generation import Request as EngineRequest

        body, schema = self.body, self.body.schema()
        self._check_choices(1)
        check_schema(schema, self.service, "tools" if self.call else "response_format")
        messages = [message.plain(f"messages.{number}") for number, message in enumerate(body.messages)]
        prompt = conversation(self.engine, self.service, messages, "messages")
        most = room(self.engine, self.service, prompt, body.most, "messages")
        tops = body.top_logprobs if body.logprobs else None
        return [EngineRequest(prompt, body.sampling(self.words.size, i), most, stop=tuple(body.stop), logprobs=tops,
                              end_tokens=self.engine.vocabulary.ends, schema=schema) for i in range(body.n)]

    def first(self, choices: int) -> Iterator[dict[str, Any]]:
        for index in range(choices):
            said = {"content": None, "tool_calls": [{"index": 0, **self._called(index, "")}]} if self.call else \
                {"content": ""}
            yield self._choice(index, {"role": "assistant", **said, "refusal": None}, None, None)

    def chunks(self, index: int, piece: Piece, generation: Generation) -> Iterator[dict[str, Any]]:
        logprobs = self._logprobs(piece.tokens)
        if piece.text or (logprobs and piece.tokens):
            said = {"tool_calls": [{"index": 0, "function": {"arguments": piece.text}}]} if self.call else \
                {"content": piece.text}
            yield self._choice(index, said, logprobs, None)
        if piece.finish:
            yield self._choice(index, {}, None, self._finish(piece))

    def whole(self, index: int, pieces: Sequence[Piece], generation: Generation) -> dict[str, Any]:
        tokens, text = [token for piece in pieces for token in piece.tokens], "".join(piece.text for piece in pieces)
        said = {"content": None, "tool_calls": [self._called(index, text)]} if self.call else {"content": text}
        return {"index": index, "message": {"role": "assistant", **said, "refusal": None},
                "logprobs": self._logprobs(tokens), "finish_reason": self._finish(pieces[-1])}

    def _choice(self, index: int, delta: dict[str, Any], logprobs: Any, finish: str | None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}

    def _called(self, index: int, arguments: str) -> dict[str, Any]:
        return {"id": self._call_ids[index], "type": "function",
                "function": {"name": self.call.name, "arguments": arguments}}

    def _finish(self, piece: Piece) -> str:
        return "tool_calls" if self.call and piece.finish == "stop" else piece.finish

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        return {"content": self.words.logprobs(tokens), "refusal": None} if self.body.logprobs else None


class TextShape(Shape):
    object = chunk_object = "text_completion"
    prefix = "cmpl"
    body: TextBody

    def __init__(self, engine: Engine, body: TextBody, service: Service) -> None:
        super().__init__(engine, body, service)
        self.prompts = body.prompts()
        self._check_choices(len(self.prompts))
        self._offset: dict[int, int] = {}
        self._echoed: set[int] = set()

    def requests(self) -> list[EngineRequest]:
        from tryplicity.inference.generation import Request as EngineRequest

        body, schema, requests = self.body, self.body.schema(), []
        check_schema(schema, self.service, "response_format")
        scored = (body.echo and body.logprobs is not None) or body.max_tokens == 0
        for prompt in self.prompts:
            if isinstance(prompt, str):
                ids = tuple(self.engine.encode(prompt))
            elif all(0 <= id < self.words.size for id in prompt):
                ids = tuple(prompt)
            else:
                raise wrong(f"prompt: a token is none of this model's (0 to {self.words.size - 1})", "prompt")
            most = room(self.engine, self.service, ids, body.max_tokens, "prompt")
            requests += [EngineRequest(ids, body.sampling(self.words.size, i), most, stop=tuple(body.stop),
                                       logprobs=body.logprobs, schema=schema, score_prompt=scored)
                         for i in range(body.n)]
        return requests

    def chunks(self, index: int, piece: Piece, generation: Generation) -> Iterator[dict[str, Any]]:
        if index not in self._echoed and self.body.echo:
            yield self._choice(index, self._echo(index), self._logprobs(index, self._prompt(index, generation)), None)
        self._echoed.add(index)
        logprobs = self._logprobs(index, piece.tokens)
        if piece.text or piece.finish or (logprobs and piece.tokens) or not self.words:
            yield self._choice(index, piece.text, logprobs, piece.finish, piece.tokens)

    def whole(self, index: int, pieces: Sequence[Piece], generation: Generation) -> dict[str, Any]:
        tokens = [token for piece in pieces for token in piece.tokens]
        before = self._prompt(index, generation) if self.body.echo else []
        text = (self._echo(index) if self.body.echo else "") + "".join(piece.text for piece in pieces)
        return self._choice(index, text, self._logprobs(index, [*before, *tokens]), pieces[-1].finish, tokens)

    def _echo(self, index: int) -> str:
        prompt = self.prompts[index // self.body.n]
        return prompt if isinstance(prompt, str) else \
            b"".join(self.words.bytes(id) for id in prompt).decode("utf-8", "replace")

    def _prompt(self, index: int, generation: Generation) -> list[Token]:
        """The prompt's tokens with their probabilities; the first has none, since nothing of the prompt is before it.
        The mark that a text begins with is no part of the text."""
        scored = generation.scored
        if scored is None:
            return []
        if isinstance(self.prompts[index // self.body.n], str):
            first, *rest = scored.tokens[1:] or (None,)
            return [] if first is None else [first._replace(logprob=None, top=()), *rest]
        return list(scored.tokens)

    def _choice(self, index: int, text: str, logprobs: Any, finish: str | None,
                tokens: Sequence[Token] = ()) -> dict[str, Any]:
        ids = {} if self.words else {"token_ids": [token.id for token in tokens]}    # its only form without words
        return {"text": text, "index": index, "logprobs": logprobs, "finish_reason": finish, **ids}

    def _logprobs(self, index: int, tokens: Sequence[Token]) -> dict[str, Any] | None:
        """As parallel lists. An offset counts the characters of the tokens before; the chosen token is always among
        the top ones, so that these can be one more than asked for."""
        if self.body.logprobs is None:
            return None
        offsets, name = [], self.words.text
        for token in tokens:
            offsets.append(self._offset.setdefault(index, 0))
            self._offset[index] += len(name(token.id, "bytes:"))
        tops = None
        if self.body.logprobs:
            tops = [None if token.logprob is None else
                    {name(id, "bytes:"): _finite(value) for id, value in (*token.top, (token.id, token.logprob))}
                    for token in tokens]
        return {"tokens": [name(token.id, "bytes:") for token in tokens],
                "token_logprobs": [_finite(token.logprob) for token in tokens],
                "top_logprobs": tops, "text_offset": offsets}


class Words:
    """What each token of a model stands for; false where nothing says it."""

    def __init__(self, tokenizer: Any, size: int) -> None:
        """size: of the vocabulary."""
        from tryplicity.inference.text import token_bytes

        self.size, self._tokenizer = size, tokenizer
        self._bytes = [b""] * size if tokenizer is None else token_bytes(tokenizer, size)

    def __bool__(self) -> bool:
        return self._tokenizer is not None

    @classmethod
    def of(cls, engine: Engine) -> Words:
        """Made once for each engine."""
        if not hasattr(engine, "_words"):
            engine._words = cls(engine.tokenizer, engine.model.spec.vocab_size)
        return engine._words

    def bytes(self, id: int) -> bytes:
        """Its bytes; a special token's are those of its name."""
        return self._bytes[id] or ((self._tokenizer.id_to_token(id) or "").encode() if self else b"")

    def text(self, id: int, mark: str = "") -> str:
        """Its text; a part of a character as \\xNN, after `mark`."""
        if not self:
            return f"token_id:{id}"
        try:
            return self.bytes(id).decode()
        except UnicodeDecodeError:
            return mark + "".join(f"\\x{byte:02x}" for byte in self.bytes(id))

    def logprobs(self, tokens: Sequence[Token], raw: bool = True) -> list[dict[str, Any]]:
        """Tokens with their likeliest alternatives, as chats and responses tell them; raw: with their bytes."""
        def told(id: int, logprob: float | None) -> dict[str, Any]:
            said = {"token": self.text(id), "logprob": _finite(logprob)}
            return {**said, "bytes": list(self.bytes(id))} if raw else said

        return [{**told(token.id, token.logprob), "top_logprobs": [told(*top) for top in token.top]}
                for token in tokens]


def _finite(logprob: float | None) -> float | None:
    """JSON has no infinity; OpenAI writes -9999.0 for what is next to impossible."""
    return None if logprob is None else max(logprob, -9999.0)


def fingerprint(engine: Engine) -> str:
    """The same as long as the weights and the program are: with it, a seed gives the same text. Made once."""
    if not hasattr(engine, "_fingerprint"):
        import torch

        from tryplicity import __version__, kernels

        card = engine.card
        said: Mapping[str, Any] = {"id": card.id, "format": card.format, "weights": card.weights_hash,
                                   "version": __version__, "torch": torch.__version__,
                                   "compiled": kernels.why_not() is None}
        engine._fingerprint = "fp_" + hashlib.sha256(repr(said).encode()).hexdigest()[:12]
    return engine._fingerprint
