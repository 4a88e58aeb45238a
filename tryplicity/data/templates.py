"""Conversations as a published model writes them: its own Jinja template, in jinja2's sandbox. Loads no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from tryplicity.data.vocabulary import token_text, vocabulary_of
from tryplicity.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

AROUND = 16  # tokens that a template writes around a message, at most
MARK = "\ue000"  # of the private use area: parts what a message says from a special token of the same letters


class TemplateFormat:
    """Writes messages as tokens, as transformers' apply_chat_template does; a special token written inside a message
    is text and ends nothing."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        import jinja2
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        self._vocabulary = vocabulary_of(tokenizer)
        # copies: whoever gave it may have it read special tokens as text, as documents are
        self._tokenizer, self._plain = (type(tokenizer).from_str(tokenizer.to_str()) for _ in range(2))
        self._plain.encode_special_tokens = True
        self._special = {tokenizer.id_to_token(id): id for id in sorted(self._vocabulary.special)}
        room = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        room.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
        room.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
        config = self._vocabulary.config
        room.globals |= {name: text for name, token in config.items()
                         if name.endswith("_token") and (text := token_text(token)) is not None}
        try:
            self._template = room.from_string(self._vocabulary.template)
        except jinja2.TemplateError as error:
            raise UserError(f"chat: the model's template cannot be read: {error}") from None

    def prompt(self, messages: Sequence[Mapping[str, Any]], *, go_on: bool = False) -> list[int]:
        """The tokens after which the assistant's next message begins; or, go_on: after which the last message goes
        on."""
        messages = [{**message, "content": self._marked(message["content"])} for message in messages]
        if not go_on:
            return self._ids(self._written(messages, True))
        text, last = self._written(messages), messages[-1]["content"].strip()
        return self._ids(text[:text.rindex(last) + len(last)] if last in text else text)

    def cost(self, message: Mapping[str, Any]) -> int:
        """How many tokens a message takes, or a few more: a template may refuse it by itself, or say more before it."""
        return len(self._plain.encode(message["content"], add_special_tokens=False).ids) + AROUND

    def encode(self, conversations: Sequence[Sequence[Mapping[str, Any]]]) -> Iterator[tuple[list[int], list[int]]]:
        """The tokens of each conversation, and a mask: 1 where the assistant writes, up to the token that ends it."""
        for conversation in conversations:
            messages = [{"role": m["role"], "content": self._marked(m["content"])} for m in conversation]
            ids, mask = [], []
            for i, message in enumerate(messages):
                if message["role"] != "assistant":
                    continue
                before = self._ids(self._written(messages[:i], True))
                after = self._ids(self._written(messages[:i + 1]))
                if before[:len(ids)] != ids or after[:len(before)] != before:
                    raise UserError("chat: the model's template rewrites earlier messages when others follow, so that "
                                    "nothing can be learnt from a conversation as a whole; cut it after the first "
                                    "answer")
                ended = [at for at in range(len(before), len(after)) if after[at] in self._vocabulary.ends]
                end = ended[-1] + 1 if ended else len(after)
                learnt = int(conversation[i].get("weight") != 0)
                mask += [0] * (len(before) - len(ids)) + [learnt] * (end - len(before)) + [0] * (len(after) - end)
                ids = after
            if not ids or ids[-1] != self._vocabulary.eos:
                ids, mask = [*ids, self._vocabulary.eos], [*mask, 0]
            yield ids, mask

    def _marked(self, text: str) -> str:
        """Its special tokens broken in two, so that they are text."""
        text = text.replace(MARK, "")
        for token in self._special:
            if token in text:
                text = text.replace(token, token[0] + MARK + token[1:])
        return text

    def _written(self, messages: Sequence[Mapping[str, Any]], answer: bool = False) -> str:
        import jinja2

        try:
            return self._template.render(messages=messages, add_generation_prompt=answer)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, ArithmeticError, RecursionError) as error:
            raise UserError(f"chat: the model's own template does not take these messages: {error}") from None

    def _ids(self, text: str) -> list[int]:
        if MARK not in text:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        ids: list[int] = []
        for part in self._parts(text):
            ids += ([self._special[part]] if part in self._special else
                    self._plain.encode(part.replace(MARK, ""), add_special_tokens=False).ids)
        return ids

    def _parts(self, text: str) -> Iterator[str]:
        """Cut at the special tokens, which are parts of their own."""
        import re

        longest_first = sorted(self._special, key=len, reverse=True)
        yield from filter(None, re.split(f"({'|'.join(map(re.escape, longest_first))})", text))


def _refuse(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)
