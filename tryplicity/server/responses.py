"""OpenAI's newer API for the same: /v1/responses, for text (https://platform.openai.com/docs/api-reference/responses).

Nothing is kept here: each request brings all that was said before, and `store` is answered with false. A stream is of
named events, each with its number; the last is response.completed, response.incomplete or response.failed.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from sanic.response import HTTPResponse, json

from tryplicity.server import routing
from tryplicity.server.asked import IDLE, without_nulls
from tryplicity.server.asked_responses import NO_RESPONSES, WHY, ResponsesBody
from tryplicity.server.errors import ApiError
from tryplicity.server.limits import parse
from tryplicity.server.openai import Words, check_model, check_schema, conversation, obfuscation, room
from tryplicity.server.streams import Answers, EventStream

if TYPE_CHECKING:
    from sanic import Request, Sanic

    from tryplicity.inference.engine import Engine
    from tryplicity.inference.generation import Generation, Piece, Token
    from tryplicity.inference.generation import Request as EngineRequest
    from tryplicity.server.routing import ReadBody
    from tryplicity.server.service import Service

#: what a response repeats of its request, and what it has where the request says nothing
REPEATED = {"instructions": None, "max_output_tokens": None, "max_tool_calls": None, "metadata": {},
            "parallel_tool_calls": True, "prompt_cache_key": None, "safety_identifier": None, "temperature": 1.0,
            "tool_choice": "auto", "tools": [], "top_p": 1.0, "user": None}


def add_routes(app: Sanic, service: Service, read: ReadBody) -> None:
    async def responses(request: Request) -> HTTPResponse | None:
        raw = await read(request)
        body = parse(ResponsesBody, without_nulls(raw, "input"), NO_RESPONSES, IDLE, WHY)
        body.check()
        engine = service.ready_engine()
        check_model(engine, body.model, chat=True)
        return await _answer(request, service, engine, Response(engine, body, service, raw))

    async def kept(request: Request, id: str) -> HTTPResponse:
        raise ApiError(404, f"there is no response {id[:80]!r}: this server keeps none", code="not_found")

    routing.add(app, "POST", "/v1/responses", responses)
    routing.add(app, "GET", "/v1/responses/<id:str>", kept)


async def _answer(request: Request, service: Service, engine: Engine, response: Response) -> HTTPResponse | None:
    with service.gate.enter(), Answers(service) as answers:
        await answers.start(engine, response.requests)
        if not response.body.stream:
            pieces = [event[1] async for event in answers if event is not None]
            return json(response.whole(pieces, answers.generations[0]))
        stream, number = await EventStream(request, service).open(), 0

        async def send(events: Iterator[dict[str, Any]]) -> None:
            nonlocal number
            for event in events:
                await stream.send({**event, "sequence_number": number}, event["type"])
                number += 1

        try:
            await send(response.opening())
            async for event in answers:
                if event is None:
                    await stream.ping()
                else:
                    await send(response.piece(event[1]))
            await send(response.closing(answers.generations[0]))
        except Exception as exception:
            await send(response.failed(stream.told(exception)))
        await stream.close()
    return None


class Response:
    """One response: what the engine is asked, and how the answer is written out."""

    def __init__(self, engine: Engine, body: ResponsesBody, service: Service, raw: dict[str, Any]) -> None:
        self.engine, self.body, self.service = engine, body, service
        self.call = body.call
        self.id = f"resp_{uuid.uuid4().hex}"
        self.item_id = f"{'fc' if self.call else 'msg'}_{uuid.uuid4().hex}"
        self.created = time.time()
        self.words = Words.of(engine)
        self.pieces: list[Piece] = []
        self._repeated = {name: default if raw.get(name) is None else raw[name] for name, default in REPEATED.items()}

    def requests(self) -> list[EngineRequest]:
        from tryplicity.inference.generation import Request as EngineRequest

        body, schema = self.body, self.body.schema()
        check_schema(schema, self.service, "tools" if self.call else "text.format")
        prompt = conversation(self.engine, self.service, body.messages(), "input")
        most = room(self.engine, self.service, prompt, body.max_output_tokens, "input")
        return [EngineRequest(prompt, body.sampling(self.words.size), most, stop=tuple(body.stop),
                              logprobs=body.top_logprobs if body.logprobs else None,
                              end_tokens=self.engine.vocabulary.ends, schema=schema)]

    def whole(self, pieces: Sequence[Piece], generation: Generation) -> dict[str, Any]:
        """The response when all is there."""
        status = "incomplete" if pieces[-1].finish == "length" else "completed"
        text = "".join(piece.text for piece in pieces)
        item = self._item(status, text, [token for piece in pieces for token in piece.tokens])
        return self._response(status, [item], generation)

    def opening(self) -> Iterator[dict[str, Any]]:
        for name in ("response.created", "response.in_progress"):
            yield {"type": name, "response": self._response("in_progress", [], None)}
        yield {"type": "response.output_item.added", "output_index": 0, "item": self._item("in_progress", None, [])}
        if not self.call:
            yield {"type": "response.content_part.added", **self._place(), "part": self._text("", [])}

    def piece(self, piece: Piece) -> Iterator[dict[str, Any]]:
        self.pieces.append(piece)
        if self.call and piece.text:
            yield {"type": "response.function_call_arguments.delta", **self._place(), "delta": piece.text,
                   **obfuscation(self.body, piece.text)}
        elif piece.text or (piece.tokens and self.body.logprobs):
            yield {"type": "response.output_text.delta", **self._place(), "delta": piece.text,
                   "logprobs": self._logprobs(piece.tokens, raw=False), **obfuscation(self.body, piece.text)}

    def closing(self, generation: Generation) -> Iterator[dict[str, Any]]:
        response = self.whole(self.pieces, generation)
        [item] = response["output"]
        if self.call:
            yield {"type": "response.function_call_arguments.done", **self._place(),
                   "arguments": item["arguments"]}
        else:
            [text] = item["content"]
            tokens = [token for piece in self.pieces for token in piece.tokens]
            yield {"type": "response.output_text.done", **self._place(), "text": text["text"],
                   "logprobs": self._logprobs(tokens, raw=False)}
            yield {"type": "response.content_part.done", **self._place(), "part": text}
        yield {"type": "response.output_item.done", "output_index": 0, "item": item}
        yield {"type": f"response.{response['status']}", "response": response}

    def failed(self, error: ApiError) -> Iterator[dict[str, Any]]:
        """As an error and as a response's end: some clients look for one, some for the other."""
        yield {"type": "error", "code": error.code, "message": error.message, "param": error.param}
        yield {"type": "response.failed", "response": {
            **self._response("failed", [], None), "error": {"code": "server_error", "message": error.message}}}

    def _response(self, status: str, output: list[dict[str, Any]], generation: Generation | None) -> dict[str, Any]:
        form = self.body.text.format.model_dump(by_alias=True, exclude_none=True)
        ended, cut = status in ("completed", "incomplete"), status == "incomplete"
        return {"id": self.id, "object": "response", "created_at": int(self.created), "status": status,
                "completed_at": int(time.time()) if status == "completed" else None, "background": False,
                "error": None, "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
                "model": self.engine.card.id, "output": output, "previous_response_id": None,
                "reasoning": {"effort": self.body.reasoning.effort, "summary": None}, "store": False,
                "text": {"format": form, "verbosity": "medium"}, "top_logprobs": self.body.top_logprobs,
                "truncation": "disabled", **self._repeated,
                "usage": _usage(generation) if generation and ended else None}

    def _item(self, status: str, text: str | None, tokens: Sequence[Token]) -> dict[str, Any]:
        """The one thing that a response holds: a message, or where it must be, the call of a function."""
        if self.call:
            return {"id": self.item_id, "type": "function_call", "status": status, "name": self.call.name,
                    "call_id": self.item_id.replace("fc_", "call_"), "arguments": text or ""}
        content = [] if text is None else [self._text(text, tokens)]
        return {"id": self.item_id, "type": "message", "role": "assistant", "status": status, "content": content}

    def _text(self, text: str, tokens: Sequence[Token]) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": self._logprobs(tokens)}

    def _logprobs(self, tokens: Sequence[Token], raw: bool = True) -> list[dict[str, Any]]:
        return self.words.logprobs(tokens, raw) if self.body.logprobs else []

    def _place(self) -> dict[str, Any]:
        content = {} if self.call else {"content_index": 0}
        return {"item_id": self.item_id, "output_index": 0, **content}


def _usage(generation: Generation) -> dict[str, Any]:
    prompt, completion = generation.prompt_tokens, generation.completion_tokens
    return {"input_tokens": prompt, "output_tokens": completion, "total_tokens": prompt + completion,
            "input_tokens_details": {"cached_tokens": generation.cached_tokens, "cache_write_tokens": 0},
            "output_tokens_details": {"reasoning_tokens": 0}}
