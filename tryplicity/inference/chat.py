"""A question to a trained model, and its answer, in the form the chat phase taught it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tryplicity.data.conversations import ChatFormat, Messages, check_messages
from tryplicity.data.tokenizer import IM_END, IM_START
from tryplicity.inference.engine import Engine
from tryplicity.inference.sampler import Sampling
from tryplicity.inference.text import TextStream, token_bytes


def reply(engine: Engine, messages: Messages, sampling: Sampling, max_tokens: int,
          stop: Sequence[str] = ()) -> Iterator[str]:
    """The assistant's next message after `messages`, in whole characters as it comes, until the model ends it, a
    stop string or `max_tokens`. Raises UserError for messages that cannot be written."""
    check_messages(messages, "chat")
    text = TextStream(token_bytes(engine.tokenizer), stop)
    for token in engine.tokens(ChatFormat(engine.tokenizer).prompt(messages), sampling, max_tokens):
        if token in (IM_END, IM_START):     # a model that begins the next message has ended this one
            break
        if piece := text.feed(token):
            yield piece
        if text.stopped:
            return
    if rest := text.finish():
        yield rest


def ask(engine: Engine, question: str, sampling: Sampling, max_tokens: int = 200, system: str | None = None) -> str:
    """The whole answer to one question."""
    return "".join(reply(engine, dialogue(question, system), sampling, max_tokens)).strip()


def dialogue(question: str, system: str | None = None) -> list[dict[str, str]]:
    """The messages of a first question, after what `system` says."""
    first = [{"role": "system", "content": system}] if system else []
    return [*first, {"role": "user", "content": question}]
