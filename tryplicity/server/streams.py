"""From the engine's thread to a client: pieces of text through a bounded queue, and server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING, Any

from tryplicity.errors import UserError
from tryplicity.inference.generation import Busy, Generation, Piece
from tryplicity.server import errors

if TYPE_CHECKING:
    from sanic import Request
    from sanic.response import ResponseStream

    from tryplicity.inference.engine import Engine
    from tryplicity.inference.generation import Request as EngineRequest
    from tryplicity.server.service import Service

AT_ONCE = 32            # generations of one request that the engine is given together
AGAIN_SECONDS = 1.0     # until one that found no place asks again, when none of its own is there to make room

log = logging.getLogger("tryplicity.server")


class Answers:
    """The generations of one HTTP request, and their pieces as they come.

        with Answers(service) as answers:
            await answers.start(engine, make_requests)
            async for index, piece in answers: ...

    A request for many gives the engine only so many at once, and the next as one ends, so that a large batch neither
    fills the queue for all others nor is larger than any queue. On the way out, however that happens, whatever still
    runs is cancelled: a client that has gone holds no slot.
    """

    def __init__(self, service: Service) -> None:
        self._service, self._loop = service, asyncio.get_running_loop()
        self._pieces: deque[tuple[int, Piece]] = deque()
        self._arrived = asyncio.Event()
        self._lock, self._closed = threading.Lock(), False
        self._overrun = False
        self._open = self.choices = 0
        self._engine: Engine | None = None
        self._later: deque[EngineRequest] = deque()     # not given to the engine yet
        self.generations: list[Generation] = []

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *exception: object) -> None:
        with self._lock:    # a thread may be submitting at this moment
            self._closed = True
            for generation in self.generations:
                if generation.finish is None:
                    generation.cancel()
        metrics = self._service.metrics
        for generation in self.generations:
            metrics.prompt_tokens.inc(generation.prompt_tokens)
            metrics.cached_tokens.inc(generation.cached_tokens)
            metrics.completion_tokens.inc(generation.completion_tokens)
            metrics.finished.labels(generation.finish or "cancelled").inc()
            if generation.seconds_to_first is not None:
                metrics.first_seconds.observe(generation.seconds_to_first)

    async def start(self, engine: Engine, make_requests: Callable[[], Sequence[EngineRequest]]) -> None:
        """Make the requests (off the event loop: a long prompt takes its time to tokenise) and hand the first of them
        to the engine, all of these or none. Raises ApiError 429 and 400."""
        self._engine = engine
        try:
            await self._service.in_thread(self._begin, make_requests)
        except Busy:
            raise errors.busy(self._service.retry_after()) from None
        except UserError as error:
            raise errors.wrong(str(error), _param_of(str(error))) from None

    def _begin(self, make_requests: Callable[[], Sequence[EngineRequest]]) -> None:
        self._later.extend(make_requests())
        self._open = self.choices = len(self._later)
        self._submit(AT_ONCE)

    def _submit(self, most: int) -> None:
        """Give the engine the next ones. Raises Busy and UserError."""
        for _ in range(min(most, len(self._later))):
            with self._lock:
                if self._closed:
                    return
                request = self._later[0]
                self.generations.append(self._engine.submit(request, self._listener(len(self.generations))))
                self._later.popleft()

    async def _go_on(self) -> None:
        """The next one in the place of one that has ended, unless another was faster. Raises ApiError."""
        if self._later:
            try:
                await self._service.in_thread(self._submit, 1)
            except Busy:
                if self._service.draining:
                    raise errors.draining() from None
            except UserError as error:
                raise errors.wrong(str(error), _param_of(str(error))) from None

    def _listener(self, index: int) -> Callable[[Piece], None]:
        def listen(piece: Piece) -> None:       # on the engine's thread
            with contextlib.suppress(RuntimeError):     # the loop is closed: nobody is left to hear it
                self._loop.call_soon_threadsafe(self._put, index, piece)

        return listen

    def _put(self, index: int, piece: Piece) -> None:
        if self._closed:
            return
        if len(self._pieces) >= self._service.options.backlog * len(self.generations or (0,)) and not piece.finish:
            # who does not read does not get to fill memory
            self._overrun = True
            for generation in self.generations:
                generation.cancel()
            return
        self._pieces.append((index, piece))
        self._arrived.set()

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece] | None]:
        """(choice, piece), each until its piece with a finish; None after `heartbeat` seconds without one.

        Raises ApiError 500 when the engine failed, 503 when the server cut the generation off.
        """
        while self._open:
            if not self._pieces:
                self._arrived.clear()
                heartbeat = self._service.options.heartbeat
                stuck = bool(self._later) and all(generation.finish for generation in self.generations)
                try:
                    async with asyncio.timeout(min(heartbeat, AGAIN_SECONDS) if stuck else heartbeat):
                        await self._arrived.wait()
                except TimeoutError:
                    if stuck:
                        await self._go_on()
                    yield None
                continue
            index, piece = self._pieces.popleft()
            if piece.finish == "error":
                kind, _, said = (self.generations[index].error or "").partition(": ")
                # what is wrong with a schema shows when it is followed
                raise errors.wrong(said, _param_of(said)) if kind == "UserError" else errors.internal()
            if piece.finish == "cancelled":     # not by the client, who would not be here to hear it
                if self._overrun:
                    raise errors.ApiError(503, "the client read too slowly", code="too_slow")
                raise errors.draining()
            if piece.finish is not None:
                self._open -= 1
                await self._go_on()
            yield index, piece


def _param_of(message: str) -> str | None:
    """The parameter that a message about a bad value begins with."""
    first = message.partition(" ")[0].rstrip(":")
    known = {"temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
             "seed", "logit_bias", "max_tokens", "stop", "logprobs", "prompt", "messages"}
    return "response_format" if first == "schema" else first if first in known else None


class EventStream:
    """Server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html). The first byte goes out at
    once, so that neither a proxy nor the server's own timeouts take the wait for a slot for a dead connection."""

    def __init__(self, request: Request, service: Service) -> None:
        self._request, self._service = request, service
        self._response: ResponseStream | None = None

    async def open(self) -> EventStream:
        self._response = await self._request.respond(
            content_type="text/event-stream; charset=utf-8",
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        await self.ping()
        return self

    async def send(self, event: dict[str, Any] | str, name: str | None = None) -> None:
        text = event if isinstance(event, str) else json.dumps(event, ensure_ascii=False, separators=(",", ":"))
        for character in "\x85\u2028\u2029":   # line ends to Python's str.splitlines, and so to some clients
            text = text.replace(character, f"\\u{ord(character):04x}")
        await self._write(f"data: {text}\n\n" if name is None else f"event: {name}\ndata: {text}\n\n")

    async def ping(self) -> None:
        await self._write(": ping\n\n")

    def told(self, exception: Exception) -> errors.ApiError:
        """What the client is told of an exception once the stream has begun; what nobody foresaw goes to the log."""
        error = errors.as_api_error(exception)
        if error.status == 500:
            log.error("%s", self._request.path, exc_info=exception)
        return error

    async def close(self) -> None:
        assert self._response is not None
        async with asyncio.timeout(self._service.options.stall_seconds):
            await self._response.eof()

    async def _write(self, text: str) -> None:
        assert self._response is not None
        try:
            async with asyncio.timeout(self._service.options.stall_seconds):
                await self._response.send(text)
        except TimeoutError:
            self._request.transport.abort()     # it reads nothing: closing politely would wait for it
            raise asyncio.CancelledError from None
