"""From tokens to text as it streams: whole characters only, and never a part of a stop string. Loads no torch."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Sequence

from tryplicity.data.vocabulary import size_of


def token_bytes(tokenizer, size: int | None = None) -> list[bytes]:
    """The bytes each token stands for, by id; none for special tokens, and for numbers that no token has.

    A byte-level BPE writes a byte that is no visible Latin-1 character as chr(256 + n), the n-th of these (Radford et
    al., GPT-2, 2019). One of SentencePiece's writes a space as U+2581 and a byte that no token has as <0x0A>. A word
    that was added to the vocabulary is written as it is. size: how many numbers; by default the tokenizer's. Raises
    KeyError for a token that neither can have written.
    """
    added = {number: b"" if token.special else token.content.encode()
             for number, token in tokenizer.get_added_tokens_decoder().items()}
    read = _of_byte_level() if _is_byte_level(tokenizer) else _of_pieces
    size = size_of(tokenizer) if size is None else size
    return [added[number] if number in added else read(tokenizer.id_to_token(number) or "") for number in range(size)]


def _is_byte_level(tokenizer) -> bool:
    """What its decoder says; a Sequence of them is SentencePiece's."""
    return tokenizer.decoder is None or type(tokenizer.decoder).__name__ == "ByteLevel"


def _of_byte_level() -> Callable[[str], bytes]:
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    byte_of = {chr(byte): byte for byte in visible} | {chr(256 + n): byte for n, byte in enumerate(hidden)}
    return lambda token: bytes(byte_of[c] for c in token)


def _of_pieces(token: str) -> bytes:
    if re.fullmatch("<0x[0-9A-F]{2}>", token):
        return bytes([int(token[3:5], 16)])
    return token.replace("\u2581", " ").encode()


class TextStream:
    """Feed tokens, get text that is safe to show.

    A character whose bytes are spread over tokens is held back until whole; text that may be the beginning of a
    stop string is held back until it is clear. `stopped` becomes true at a stop string, of several at the one that is
    whole first, which is never shown, nor is anything after it. The text is the same however it is cut into tokens.
    `decoded` and `shown` count characters: whole ones so far, and those given out.
    """

    def __init__(self, token_bytes: Sequence[bytes], stop: Sequence[str] = ()) -> None:
        """token_bytes: the bytes each token stands for, by id; special tokens stand for none."""
        self.token_bytes, self.stop = token_bytes, [s for s in stop if s]
        self.stopped = False
        self.decoded = self.shown = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""  # whole text that may begin a stop string
        self._beginnings = tuple({stop[:n] for stop in self.stop for n in range(1, len(stop))})

    def feed(self, token: int) -> str:
        return "" if self.stopped else self._release(self._decoder.decode(self.token_bytes[token]))

    def along(self, tokens: Sequence[int]) -> tuple[list[int], str]:
        """Where in the text of tokens by themselves each of them begins, in whole characters; and the text."""
        decoder, offsets, parts, size = codecs.getincrementaldecoder("utf-8")(errors="replace"), [], [], 0
        for token in tokens:
            offsets.append(size)
            parts.append(decoder.decode(self.token_bytes[token]))
            size += len(parts[-1])
        return offsets, "".join(parts) + decoder.decode(b"", final=True)

    def finish(self, cut_off: bool = False) -> str:
        """What was still held back when the tokens ended. cut_off: they might have gone on; then half a character at
        the end is no fault in them, and is left out."""
        if self.stopped:
            return ""
        if cut_off:
            self._decoder.reset()
        shown = self._release(self._decoder.decode(b"", final=True))
        rest, self._held = ("", "") if self.stopped else (self._held, "")
        self.shown += len(rest)
        return shown + rest

    def _release(self, new: str) -> str:
        self.decoded += len(new)
        text = self._safe(self._held + new)
        self.shown += len(text)
        return text

    def _safe(self, text: str) -> str:
        if not self.stop:
            return text
        whole = [(at + len(stop), at) for stop in self.stop if (at := text.find(stop)) >= 0]
        if whole:
            self.stopped, self._held = True, ""
            return text[:min(whole)[1]]
        keep = 0
        if text.endswith(self._beginnings):
            keep = max(len(part) for part in self._beginnings if text.endswith(part))
        self._held = text[len(text) - keep:]
        return text[:len(text) - keep]
