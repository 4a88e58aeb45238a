"""A question to a trained model, and its answer, in the form the chat phase taught it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tryplicity.data.conversations import Messages, chat_format, check_messages
from tryplicity.errors import UserError
from tryplicity.inference.generation import Request

if TYPE_CHECKING:
    from tryplicity.data.conversations import ChatFormat
    from tryplicity.data.templates import TemplateFormat
    from tryplicity.inference.engine import Engine
    from tryplicity.inference.sampler import Sampling


def prompt(engine: Engine, messages: Messages, go_on: bool = False) -> tuple[int, ...]:
    """The tokens after which the assistant's next message begins; or, go_on: after which its last one goes on.

    They depend on the messages alone: an answer is tokenised as any text is, and not as it was once written, so that a
    conversation goes on alike in any process. The engine goes on from what it has read as far as the tokens agree.
    Raises UserError for messages that cannot be written.
    """
    check_messages(messages, "chat")
    if engine.tokenizer is None:
        raise UserError("chat: this model came without a tokenizer")
    if go_on and messages[-1]["role"] != "assistant":
        raise UserError("chat: only a message of the assistant can be gone on with, and the last is of the "
                        f"{messages[-1]['role']}")
    return tuple(_format(engine).prompt(messages, go_on=go_on))


def cost(engine: Engine, message: Mapping[str, Any]) -> int:
    """How many tokens a message takes in a longer conversation, or a few more."""
    return _format(engine).cost(message)


def _format(engine: Engine) -> ChatFormat | TemplateFormat:
    """The engine's, made once: it copies the tokenizer."""
    found = engine.__dict__.get("_chat_format")
    if found is None:
        found = engine.__dict__["_chat_format"] = chat_format(engine.tokenizer)
    return found


def request(engine: Engine, messages: Messages, sampling: Sampling, max_tokens: int, stop: Sequence[str] = (),
            **options) -> Request:
    """What to submit for the assistant's next message. options: as Request's."""
    return Request(prompt(engine, messages), sampling, max_tokens, tuple(stop), end_tokens=engine.vocabulary.ends,
                   **options)


def reply(engine: Engine, messages: Messages, sampling: Sampling, max_tokens: int,
          stop: Sequence[str] = ()) -> Iterator[str]:
    """The assistant's next message after `messages`, in whole characters as it comes, until the model ends it, a
    stop string or `max_tokens`. Raises UserError for messages that cannot be written."""
    for piece in engine.generate(request(engine, messages, sampling, max_tokens, stop)):
        if piece.text:
            yield piece.text


def ask(engine: Engine, question: str, sampling: Sampling, max_tokens: int = 200, system: str | None = None) -> str:
    """The whole answer to one question."""
    return "".join(reply(engine, dialogue(question, system), sampling, max_tokens)).strip()


def dialogue(question: str, system: str | None = None) -> list[dict[str, str]]:
    """The messages of a first question, after what `system` says."""
    first = [{"role": "system", "content": system}] if system else []
    return [*first, {"role": "user", "content": question}]
