"""What a tokenizer's special tokens are for: its own file, or that of a published model beside it. Loads no torch.

A tokenizer that tryplicity trained has its six special tokens first and needs no more. A published one comes with a
tokenizer_config.json in transformers' form: the names of its special tokens, and how it writes a conversation.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tryplicity.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPECIAL_TOKENS = ("<|pad|>", "<|eos|>", "<|bos|>", "<|unk|>", "<|im_start|>", "<|im_end|>")
PAD, EOS, BOS, UNK, IM_START, IM_END = range(len(SPECIAL_TOKENS))
CONFIG = "tokenizer_config.json"
#: of CONFIG, beside transformers' own keys: names of all tokens that end an answer
END_TOKENS = "end_tokens"


@dataclass(frozen=True)
class Vocabulary:
    """The tokens with a meaning of their own."""

    begin: tuple[int, ...] = (BOS,)  # before every text
    bos: int = BOS  # stands before a text where one token must; the end-of-text token in a vocabulary without one
    eos: int = EOS  # after every text
    ends: frozenset[int] = frozenset({EOS, IM_END, IM_START})  # of an answer: a model that begins the next message, too
    special: frozenset[int] = frozenset(range(len(SPECIAL_TOKENS)))
    template: str | None = None  # how a conversation is written, in Jinja; None: as `ChatFormat` does
    config: Mapping[str, Any] = field(default_factory=dict, compare=False)  # the file's content


OURS = Vocabulary()


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    """Of a loaded tokenizer."""
    return getattr(tokenizer, "vocabulary", OURS)


def config_text(tokenizer: Tokenizer) -> str:
    """What has to stand beside the tokenizer's own file; "" for one of ours."""
    config = vocabulary_of(tokenizer).config
    return json.dumps(config, indent=1, ensure_ascii=False) if config else ""


def attach(tokenizer: Tokenizer, config: Mapping[str, Any], where: str) -> Tokenizer:
    """Give a published tokenizer its vocabulary. Raises UserError, which begins with `where`, for names of tokens that
    it does not have."""
    def number(name: str, wanted: bool = False) -> int | None:
        token = token_text(config.get(name))
        found = None if token is None else tokenizer.token_to_id(token)
        if found is None and (wanted or token is not None):
            raise UserError(f"{where}: {name} is {token!r}, which the tokenizer does not have; give the {CONFIG} that "
                            "belongs to it")
        return found

    eos = number("eos_token", wanted=True)
    bos = number("bos_token")
    ends = [token_text(token) for token in config.get(END_TOKENS) or ()]
    if missing := [token for token in ends if tokenizer.token_to_id(token) is None]:
        raise UserError(f"{where}: {END_TOKENS} names {missing[0]!r}, which the tokenizer does not have")
    begin = tuple(tokenizer.encode("", add_special_tokens=True).ids)
    begin = begin if begin == (bos,) else ()
    template = config.get("chat_template")
    if isinstance(template, list) and all(isinstance(one, dict) for one in template):  # several by name
        template = next((one.get("template") for one in template if one.get("name") == "default"), None)
    if not (template is None or isinstance(template, str)):
        raise UserError(f"{where}: chat_template is no text; leave it out, or mend it")
    special = frozenset(id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special)
    tokenizer.vocabulary = Vocabulary(begin, begin[0] if begin else eos, eos,
                                      frozenset({eos, *map(tokenizer.token_to_id, ends)}), special, template,
                                      dict(config))
    return tokenizer


def attach_file(tokenizer: Tokenizer, path: Path) -> Tokenizer:
    """`attach` from a tokenizer_config.json."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); import the model again") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: not a mapping of names; import the model again")
    return attach(tokenizer, config, str(path))


def token_text(token: Any) -> str | None:
    """Of a token as transformers writes it: a text, or a mapping with the text as `content`."""
    token = token.get("content") if isinstance(token, Mapping) else token
    return token if isinstance(token, str) else None


def size_of(tokenizer: Tokenizer) -> int:
    """One more than the highest number of a token."""
    return 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
