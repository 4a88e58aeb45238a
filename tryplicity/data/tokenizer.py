"""A byte-level BPE tokenizer: every text in, the same text out, no unknown token. Loads no torch."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from tryplicity.data.vocabulary import (
    BOS,
    CONFIG,
    EOS,
    IM_END,
    IM_START,
    PAD,
    SPECIAL_TOKENS,
    UNK,
    attach_file,
    config_text,
    size_of,
)
from tryplicity.errors import UserError
from tryplicity.files import write_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["BOS", "EOS", "IM_END", "IM_START", "PAD", "SPECIAL_TOKENS", "UNK", "load_tokenizer", "save_tokenizer",
           "token_bytes", "train_tokenizer"]

SMALLEST_VOCABULARY = len(SPECIAL_TOKENS) + 256

# Words with the sign before them, numbers by three digits, runs of signs with the line ends after them, white
# space: the pattern of OpenAI's cl100k, which keeps indentation together
# (https://github.com/openai/tiktoken). No piece is longer than LONGEST_PIECE: a run of a million signs is no word, and
# merging it, or looking for its end again from each of its places, takes time and memory without bound.
LONGEST_PIECE = 128         # characters that a token can be made of
LONGEST_TOKEN = 64          # bytes of a token
_PATTERN = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}{1,N}|\p{N}{1,3}| ?[^\s\p{L}\p{N}]{1,N}[\r\n]{0,N}"
            r"|\s{0,N}[\r\n]|\s{1,N}(?!\S)|\s{1,N}").replace(",N}", f",{LONGEST_PIECE}}}")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE of exactly `vocab_size` tokens, the special ones first.

    Raises UserError when the vocabulary has no room for the 256 bytes, or the texts are too few to fill it:
    then it says what size they allow.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < SMALLEST_VOCABULARY:
        raise UserError(f"vocab_size {vocab_size} is too small: the 256 bytes and {len(SPECIAL_TOKENS)} "
                        f"special tokens alone are {SMALLEST_VOCABULARY}; set vocab_size to at least "
                        f"{SMALLEST_VOCABULARY}")
    tokenizer = Tokenizer(models.BPE(unk_token=SPECIAL_TOKENS[UNK]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(_PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS),
                                  show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  max_token_length=LONGEST_TOKEN)
    tokenizer.train_from_iterator(texts, trainer)
    reached = tokenizer.get_vocab_size()
    if reached != vocab_size:
        raise UserError(f"the training text is too small for a vocabulary of {vocab_size}: it yields "
                        f"{reached} tokens; set vocab_size to {reached} or less (--set "
                        f"vocab_size={reached}), or give more text")
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Write tokenizer.json (the format of Hugging Face tokenizers), and beside it what a published one needs, each
    whole or not at all."""
    if config := config_text(tokenizer):
        write_text(path.with_name(CONFIG), config)
    write_text(path, tokenizer.to_str())


def tokenizer_files(path: str | Path) -> dict[str, bytes]:
    """What a tokenizer consists of, by the name of each file: tokenizer.json, and for a published one what stands
    beside it."""
    path = Path(path)
    beside = path.with_name(CONFIG)
    return {"tokenizer.json": path.read_bytes()} | ({CONFIG: beside.read_bytes()} if beside.is_file() else {})


def load_tokenizer(path: str | Path, expected_vocab_size: int | None = None) -> Tokenizer:
    """Read a tokenizer.json, and a published one's tokenizer_config.json beside it. Special tokens written out in a
    text are read as special tokens.

    Raises UserError when there is none, it is cut short or not ours, or its size is unlike the spec's; a published one
    may be smaller.
    """
    from tokenizers import Tokenizer

    if not os.path.isfile(path):
        raise UserError(f"{path}: no tokenizer here; train one, or give the path of a tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:      # tokenizers raises plain Exception for whatever it cannot read
        raise UserError(f"{path}: not a tokenizer.json, or one cut short ({error}); train it "
                        "again") from error
    published = (beside := Path(path).with_name(CONFIG)).is_file()
    if published:
        attach_file(tokenizer, beside)
    for number, token in enumerate(() if published else SPECIAL_TOKENS):
        if tokenizer.token_to_id(token) != number:
            raise UserError(f"{path}: token {number} must be {token} and is {tokenizer.id_to_token(number)}; "
                            "use a tokenizer that tryplicity trained, or one that `tryplicity import` read")
    size = size_of(tokenizer)
    fits = expected_vocab_size is None or size == expected_vocab_size or (published and size < expected_vocab_size)
    if not fits:
        raise UserError(f"{path}: the tokenizer has {size} tokens and the spec's vocab_size is "
                        f"{expected_vocab_size}; set vocab_size to {size} in the spec (--set "
                        f"vocab_size={size}), or train a tokenizer of {expected_vocab_size}")
    return tokenizer


def token_bytes(tokenizer: Tokenizer) -> list[int]:
    """How many bytes of text each token stands for; 0 for special tokens."""
    from tryplicity.inference.text import token_bytes

    return [len(text) for text in token_bytes(tokenizer)]
