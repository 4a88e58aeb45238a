"""Conversations as tokens: how a dialogue is written, and the token files a chat phase trains on.

    <|bos|>  then for each message  <|im_start|>role\\n content <|im_end|>\\n  then  <|eos|>

The form is ChatML (https://github.com/openai/openai-python/blob/release-v0.28.0/chatml.md). A model learns to write
the assistant's messages and the <|im_end|> after each, save those of weight 0; the mask is 1 there and 0 elsewhere.
Loads no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tryplicity.data.cache import building, cache_root
from tryplicity.data.documents import LONGEST, collect
from tryplicity.data.prepared import Prepared
from tryplicity.data.token_files import Encoded, write_tokens
from tryplicity.data.tokenizer import BOS, EOS, IM_END, IM_START, load_tokenizer, tokenizer_files
from tryplicity.data.vocabulary import vocabulary_of
from tryplicity.errors import UserError
from tryplicity.leftout import LeftOut
from tryplicity.progress import Progress, no_progress

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from tryplicity.components import Conversation, Document, Source
    from tryplicity.data.templates import TemplateFormat

FORMAT = 3                          # raise when the files written here change
ROLES = ("system", "user", "assistant", "tool")

Messages = Sequence[Mapping[str, Any]]


def chat_format(tokenizer: Tokenizer) -> ChatFormat | TemplateFormat:
    """How conversations are written for a tokenizer: in its own template if it came with one."""
    if vocabulary_of(tokenizer).template is None:
        return ChatFormat(tokenizer)
    from tryplicity.data.templates import TemplateFormat

    return TemplateFormat(tokenizer)


class ChatFormat:
    """Writes messages as tokens. Each piece is tokenised by itself, so that a message has the same tokens wherever
    it stands; "<|im_end|>" written inside a message is text and ends nothing."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = type(tokenizer).from_str(tokenizer.to_str())      # a copy: this one reads texts as texts
        self._tokenizer.encode_special_tokens = True
        *heads, self._line_end = self._ids([*(f"{role}\n" for role in ROLES), "\n"])
        self._head = {role: [IM_START, *head] for role, head in zip(ROLES, heads, strict=True)}

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def encode(self, conversations: Sequence[Messages]) -> Iterator[tuple[list[int], list[int]]]:
        """The tokens of each conversation, and its mask."""
        contents = iter(self._ids([message["content"] for messages in conversations for message in messages]))
        for messages in conversations:
            ids, mask = [BOS], [0]
            for message in messages:
                head, written = self._head[message["role"]], [*next(contents), IM_END]
                ids += [*head, *written, *self._line_end]
                mask += [0] * len(head) + [int(_is_learnt(message))] * len(written)
                mask += [0] * len(self._line_end)
            yield [*ids, EOS], [*mask, 0]

    def cost(self, message: Mapping[str, Any]) -> int:
        """How many tokens a message takes, wherever it stands, or a few more."""
        return len(self.prompt([message]))

    def prompt(self, messages: Messages, *, go_on: bool = False) -> list[int]:
        """The tokens after which the assistant's next message begins; or, go_on: after which the last message goes on.
        They depend on the messages alone."""
        ids = [BOS]
        for message, content in zip(messages, self._ids([message["content"] for message in messages]), strict=True):
            ids += [*self._head[message["role"]], *content, IM_END, *self._line_end]
        if go_on:
            return ids[:-1 - len(self._line_end)]
        return [*ids, *self._head["assistant"]]


def _is_learnt(message: Mapping[str, Any]) -> bool:
    return message["role"] == "assistant" and message.get("weight") != 0


def check_messages(messages: Messages, where: str) -> None:
    """Raises UserError, which begins with `where`, for messages that cannot be written."""
    if not messages:
        raise UserError(f"{where}: no messages; a conversation needs at least what the user and the assistant say")
    for number, message in enumerate(messages, 1):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise UserError(f"{where}: message {number}: unknown role {role!r}; it may be {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise UserError(f"{where}: message {number} ({role}): the content is not a string but "
                            f"{type(content).__name__}")
        if not content.strip():
            raise UserError(f"{where}: message {number} ({role}): the content is empty; write it, or leave the "
                            "message out")


def prepare_conversations(source: Source, tokenizer_path: str | Path, vocab_size: int,
                          cache: str | Path | None = None, progress: Progress | None = None) -> Prepared:
    """The token files, with masks, of a source's conversations, made now or found in the cache.

    The folder is as `prepare` makes it, and {part}.mask.bin beside each part; the bytes it counts are the
    assistant's. Split like documents, by the part of the id before `#`. The texts of the collection are the
    messages as JSON. Raises UserError for a source without conversations, an empty one, a mistake in one of them
    (naming it by its id) and a tokenizer unlike `vocab_size`.
    """
    progress = progress or no_progress
    root = cache_root(cache)
    load_tokenizer(tokenizer_path, vocab_size)
    collection = collect(_AsDocuments(source), root, progress, longest=None)
    files = tokenizer_files(tokenizer_path)
    described = json.dumps(["conversations", FORMAT, collection.identity,
                            *(hashlib.sha256(content).hexdigest() for content in files.values())])
    folder = root / "tokens" / hashlib.sha256(described.encode()).hexdigest()[:24]
    if not folder.exists():
        with building(folder) as temporary:
            for name, content in files.items():
                (temporary / name).write_bytes(content)
            tokenizer = load_tokenizer(tokenizer_path)
            write_tokens(collection, tokenizer, temporary, progress, _Encode(tokenizer))
    return Prepared(folder, collection, json.loads((folder / "manifest.json").read_text(encoding="utf-8")))


class _AsDocuments:
    """A source whose documents are the conversations of another, as JSON."""

    def __init__(self, source: Source) -> None:
        self.source, self.name = source, source.name

    @property
    def read_share(self) -> float | None:
        return getattr(self.source, "read_share", None)

    @property
    def left_out(self) -> LeftOut:
        return self.source.left_out

    def fingerprint(self) -> str:
        return f"conversations {FORMAT} {self.source.fingerprint()}"

    def documents(self) -> Iterator[Document]:
        from tryplicity.components import Document

        for conversation in self.source.conversations():
            self._check(conversation)
            messages = [{"role": m["role"], "content": m["content"], **({"weight": 0} if m.get("weight") == 0 else {})}
                        for m in conversation.messages]
            if sum(len(message["content"]) for message in messages) > LONGEST:
                self.left_out.add(f"longer than {LONGEST:,} characters", conversation.id)
            else:
                yield Document(conversation.id, json.dumps(messages, ensure_ascii=False), "chat", conversation.url)

    @staticmethod
    def _check(conversation: Conversation) -> None:
        check_messages(conversation.messages, conversation.id)
        if not any(map(_is_learnt, conversation.messages)):
            raise UserError(f"{conversation.id}: no message of the assistant; it is what a model learns from")


class _Encode:
    """What `write_tokens` calls with the documents of a collection of conversations."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.format = chat_format(tokenizer)

    def __call__(self, tokenizer: Tokenizer, documents: list[Document]) -> Iterator[Encoded]:
        conversations = [json.loads(document.text) for document in documents]
        for messages, (ids, mask) in zip(conversations, self.format.encode(conversations), strict=True):
            learnt = sum(len(m["content"].encode()) for m in messages if _is_learnt(m))
            yield Encoded(ids, learnt, mask)
