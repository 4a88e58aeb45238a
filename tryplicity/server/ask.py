"""A question in a conversation: search, prompt, answer as it comes, citations checked, everything kept.

POST /api/conversations/{id}/ask with one of

    {"content": text}                       a question; it comes last, whatever was added meanwhile
    {"content": text, "after": message id, "last": message id}
                                            editing: the question follows `after` (null: it begins the conversation
                                            anew), and what stood behind that is dropped
    {"regenerate": message id, "last": ...} the answer again; the old one, and what follows it, is dropped when the
                                            new one begins. last: by default the answer itself
    {"continue": message id}                go on with an answer that ended too early, if it is the last message

What drops messages says in `last` which one it believes to be the last (null: there is none). Where another tab or
client has gone on meanwhile, nothing is changed, and the answer is 409 with the code conversation_changed.

and "search": bool, "sampling": {temperature, top_k, top_p, min_p, repetition_penalty, max_tokens, seed}; max_tokens is
at most what this server writes. The answer is a stream of events: {"type": "question", "message", "after": id of the
message before it}, {"type": "sources", "sources"}, {"type": "text", "text"} as often as there is text, {"type": "done",
"message"}; or at any point {"type": "error", "error", "retry_after"}, which is the last. Who closes the stream stops
the answer; what was written is kept, its finish "cancelled".

Where the answer rests on no passage, its message has those found, supported false, and a quotation of what they say;
its settings' `passages` is how many of them the model could read. Where passages were found and no model is there to
answer, they are kept in a message without content, its finish "none", which the error event has as `message`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from tryplicity.server import routing
from tryplicity.server.conversations import CitedPassage, Conversation, Message, Store, title_of
from tryplicity.server.errors import ApiError, changed, wrong
from tryplicity.server.limits import Body, parse
from tryplicity.server.streams import Answers, EventStream

if TYPE_CHECKING:
    from sanic import Request, Sanic

    from tryplicity.components import Passage
    from tryplicity.inference.engine import Engine
    from tryplicity.inference.generation import Request as EngineRequest
    from tryplicity.server.routing import ReadBody
    from tryplicity.server.service import Service

PASSAGES = 5            # that an answer may rest on
SMALL_MODEL = 1e9       # parameters
PENALTY = 1.1           # of repetition, where none is asked for
STEP = 8                # messages of a long conversation that are left out at once
STOPPING_SECONDS = 3.0  # for an answer that was just stopped to end
SAVE_SECONDS = 1.0      # of an answer being written that a killed process may lose


class SamplingBody(Body):
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.8
    top_k: Annotated[int, Field(ge=0, le=1 << 31)] = 0
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None     # what suits the model
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 53)] | None = None     # as many digits as a browser keeps


class AskBody(Body):
    content: Annotated[str, Field(max_length=1 << 20)] | None = None
    after: str | None = None
    last: str | None = None
    regenerate: str | None = None
    continue_: Annotated[str | None, Field(alias="continue")] = None
    search: bool = False
    sampling: SamplingBody = SamplingBody()


class Turn:
    """A question, what was said before it, and the answer that is being written."""

    def __init__(self, conversation: Conversation, body: AskBody, given: Collection[str]) -> None:
        """given: the keys of the body that the client sent. Raises ApiError."""
        self.conversation, self.body = conversation.id, body
        self.kept: Message | None = None        # of an answer that no model could write
        asked = [name for name in ("content", "regenerate", "continue_") if getattr(body, name) is not None]
        if len(asked) != 1:
            raise wrong("give one of content, regenerate and continue", "content")
        messages = conversation.messages
        self.is_new, self.is_more = asked == ["content"], asked == ["continue_"]
        self.after: str | bool | None = True
        self.last: str | bool | None = True     # the message that must still be the last; True: any
        settings = {**body.sampling.model_dump(exclude_none=True), "search": body.search}
        if self.is_new:
            if not body.content.strip():
                raise wrong("the question is empty", "content")
            if "after" in given:
                if "last" not in given:
                    raise wrong("say which message you believe is the last one: what follows `after` is dropped",
                                "last", "missing_parameter")
                self.after, self.last = body.after, body.last
                messages = messages[:_index(messages, body.after) + 1] if body.after else []
                self._check_last(conversation)
            self.before, self.question = messages, Message(role="user", content=body.content)
            self.answer = Message(role="assistant", content="", settings=settings)
            return
        wanted = body.regenerate or body.continue_
        at = _index(messages, wanted)
        if messages[at].role != "assistant" or at == 0 or messages[at - 1].role != "user":
            raise wrong("only an answer can be written again or continued", asked[0].rstrip("_"))
        self.last = body.last if "last" in given and not self.is_more else wanted
        self._check_last(conversation)
        self.before, self.question = messages[:at - 1], messages[at - 1]
        self.after = self.question.id
        old = messages[at]
        self.answer = old.model_copy(update={"settings": settings, "finish": None}) if self.is_more else \
            Message(role="assistant", content="", settings=settings)

    def _check_last(self, conversation: Conversation) -> None:
        if self.last != (conversation.messages[-1].id if conversation.messages else None):
            raise changed()

    def begin(self, store: Store) -> None:
        """Keep the question. On the store's thread."""
        if self.is_new:
            store.append(self.conversation, self.question, after=self.after, last=self.last,
                         title=title_of(self.question.content))
            self.last = True

    def begin_answer(self, store: Store) -> None:
        """Keep the answer, still empty. On the store's thread."""
        if self.is_more:
            store.save(self.conversation, self.answer)
        else:
            store.append(self.conversation, self.answer, after=True if self.is_new else self.after, last=self.last)

    def known(self) -> list[Passage]:
        """The passages that an answer to be continued cites, in the order of their numbers."""
        from tryplicity.components import Passage

        return [Passage(s.id, s.title, s.url, s.text, 0.0) for s in self.answer.sources] if self.is_more else []

    def request(self, engine: Engine, passages: Sequence[Passage] | None, limit: int) -> EngineRequest:
        """What the engine is asked. passages None: without search. Off the event loop. Raises ApiError."""
        from tryplicity.inference import chat
        from tryplicity.inference.generation import Request as EngineRequest
        from tryplicity.inference.sampler import Sampling

        asked = self.body.sampling
        limit = min(asked.max_tokens or limit, limit)
        context = engine.card.context_length
        begun = [{"role": "assistant", "content": self.answer.content}] if self.answer.content.strip() else []
        room = min(limit, max(1, context // 3))     # for the answer, before history is given up
        history = [{"role": m.role, "content": m.content} for m in self.before if m.content.strip()]

        def encoded(messages: Sequence[dict[str, str]]) -> tuple[int, ...]:
            return chat.prompt(engine, [*messages, *begun], go_on=bool(begun))

        asking, budget = {"role": "user", "content": self.question.content}, context - room
        history = _latest(history, lambda message: chat.cost(engine, message), budget - len(encoded([asking])))
        messages = [*history, asking]
        if passages is not None:
            from tryplicity.search.answer import fitted

            messages, read = fitted(asking["content"], passages, history, budget=budget,
                                    count=lambda messages: len(encoded(messages)), focused=_focused(engine))
            self.answer.settings["passages"] = read
        prompt = encoded(messages)
        if len(prompt) >= context:
            raise wrong(f"this model's context is {context} tokens, and the question with what belongs to it has "
                        f"{len(prompt)}; ask a shorter one", "content", "context_length_exceeded")
        options = asked.model_dump(exclude={"max_tokens"})
        if options["repetition_penalty"] is None:  # a model of others quotes its sources, whose words it read just now
            options["repetition_penalty"] = PENALTY if engine.vocabulary.template is None else 1.0
        return EngineRequest(prompt, Sampling(**options), min(limit, context - len(prompt)),
                             end_tokens=engine.vocabulary.ends)


def _focused(engine: Engine) -> bool:
    """Whether this is a small model that has learned to answer elsewhere, and not from sources as ours do."""
    return engine.vocabulary.template is not None and engine.card.parameters < SMALL_MODEL


def _latest(history: list[dict[str, str]], cost: Callable[[dict[str, str]], int],
            budget: int) -> list[dict[str, str]]:
    """The last messages that fit, from a question on. What is left out grows by several messages at a time: until it
    does, each turn begins as the one before, whose state can be gone on from."""
    start = len(history)
    while start > 0 and (budget := budget - cost(history[start - 1])) >= 0:
        start -= 1
    start = -(-start // STEP) * STEP
    while start < len(history) and history[start]["role"] != "user":
        start += 1
    return history[start:]


def _index(messages: Sequence[Message], id: str) -> int:
    for index, message in enumerate(messages):
        if message.id == id:
            return index
    raise ApiError(404, "there is no such message in this conversation", code="message_not_found")


def add_routes(app: Sanic, service: Service, read: ReadBody) -> None:
    async def ask(request: Request, id: str) -> None:
        raw = await read(request)
        body = parse(AskBody, raw)
        with service.gate.enter():
            async with _alone(service, id):
                turn = Turn(await service.stored(service.store.get, id), body, given=raw)
                stream = await EventStream(request, service).open()
                try:
                    await _answer(service, turn, stream)
                except Exception as exception:
                    error = stream.told(exception)
                    after = error.headers.get("Retry-After")
                    kept = {"message": turn.kept.model_dump()} if turn.kept is not None else {}
                    await stream.send({"type": "error", **error.as_dict(),
                                       "retry_after": int(after) if after else None, **kept})
                await stream.close()

    routing.add(app, "POST", "/api/conversations/<id:str>/ask", ask)


@asynccontextmanager
async def _alone(service: Service, id: str) -> AsyncIterator[None]:
    """One answer at a time in a conversation. One that was just stopped is waited for."""
    lock, users = service.writing.get(id, (asyncio.Lock(), 0))
    service.writing[id] = lock, users + 1
    try:
        try:
            async with asyncio.timeout(STOPPING_SECONDS):
                await lock.acquire()
        except TimeoutError:
            raise ApiError(409, "an answer is being written in this conversation; stop it first, or wait for it",
                           code="conversation_busy", headers={"x-should-retry": "false"}) from None
        try:
            yield
        finally:
            lock.release()
    finally:
        lock, users = service.writing.pop(id)
        if users > 1:
            service.writing[id] = lock, users - 1


async def _answer(service: Service, turn: Turn, stream: EventStream) -> None:
    store, body = service.store, turn.body
    await service.stored(turn.begin, store)
    await stream.send({"type": "question", "message": turn.question.model_dump(),
                       "after": turn.before[-1].id if turn.before else None})
    passages = None
    if body.search:
        known = turn.known()
        found, _ = await service.search(turn.question.content, PASSAGES)
        passages = [*known, *(p for p in found if p.id not in {k.id for k in known})]
    await stream.send({"type": "sources", "sources": [s.model_dump() for s in _sources(enumerate(passages or (), 1))]})
    try:
        engine = _answerer(service)
    except ApiError as error:
        if error.code != "model_loading" and turn.is_new and passages:
            turn.kept = turn.answer.model_copy(update={"finish": "none", **_found(turn.question.content, passages)})
            await service.stored(store.append, turn.conversation, turn.kept)
        raise
    answer, parts, saved = turn.answer, [turn.answer.content], time.monotonic()
    with Answers(service) as answers:
        await answers.start(engine, lambda: [turn.request(engine, passages, service.options.max_tokens)])
        await service.stored(turn.begin_answer, store)
        finish = "cancelled"
        try:
            async for event in answers:
                if event is None:
                    await stream.ping()
                    continue
                _, piece = event
                if piece.text:
                    parts.append(piece.text)
                    await stream.send({"type": "text", "text": piece.text})
                finish = piece.finish or finish
                if time.monotonic() - saved > SAVE_SECONDS:
                    saved = time.monotonic()
                    store.call(store.save, turn.conversation, answer.model_copy(update={"content": "".join(parts)}))
        finally:
            # without waiting: this may be the end of a cancelled request, and the store keeps the order
            [generation] = answers.generations
            done = _checked(answer, turn.question.content, "".join(parts), passages, finish,
                            generation.tokens_per_second)
            saving = store.call(store.save, turn.conversation, done)
    await asyncio.wrap_future(saving)
    await stream.send({"type": "done", "message": done.model_dump()})


def _answerer(service: Service) -> Engine:
    engine = service.ready_engine()
    if not engine.card.chat:
        raise wrong(f"{engine.card.id} is a base model: it has not learnt to answer; let it continue a text instead",
                    None, "not_a_chat_model")
    return engine


def _found(question: str, passages: Sequence[Passage]) -> dict[str, Any]:
    """What a message has of passages that no answer rests on."""
    from tryplicity.search.answer import quotation

    return {"sources": _sources(enumerate(passages, 1)), "quotation": quotation(question, passages)}


def _sources(numbered: Iterable[tuple[int, Passage]]) -> list[CitedPassage]:
    return [CitedPassage(number=n, id=p.id, title=p.title, url=p.url, text=p.text) for n, p in numbered]


def _checked(answer: Message, question: str, text: str, passages: Sequence[Passage] | None, finish: str,
             tokens_per_second: float | None) -> Message:
    """The answer as it is kept: only marks whose passage bears them out, numbered as they occur. Where there are none,
    it stays as the model wrote it, and what the passages say is quoted beside it."""
    change: dict[str, Any] = {"content": text.strip() if finish != "cancelled" else text.lstrip(), "finish": finish,
                              "tokens_per_second": tokens_per_second}
    if passages is not None:
        from tryplicity.search import citations

        checked = citations.check(change["content"], passages)
        change |= {"content": checked.text, "supported": checked.supported, "quotation": None}
        change |= {"sources": _sources(checked.sources)} if checked.supported else _found(question, passages)
    return answer.model_copy(update=change)
