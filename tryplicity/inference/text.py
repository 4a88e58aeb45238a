"""From tokens to text as it streams: whole characters only, and never a part of a stop string. Loads no torch."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


def token_bytes(tokenizer) -> list[bytes]:
    """The bytes each token of a byte-level BPE stands for, by id; none for special tokens.

    Such a tokenizer writes a byte that is no visible Latin-1 character as chr(256 + n), the n-th of these
    (Radford et al., GPT-2, 2019).
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    byte_of = {chr(byte): byte for byte in visible} | {chr(256 + n): byte for n, byte in enumerate(hidden)}
    special = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    return [b"" if number in special else bytes(byte_of[c] for c in tokenizer.id_to_token(number))
            for number in range(tokenizer.get_vocab_size())]


class TextStream:
    """Feed tokens, get text that is safe to show.

    A character whose bytes are spread over tokens is held back until whole; text that may be the beginning of a
    stop string is held back until it is clear. `stopped` becomes true at a stop string, which is never shown.
    `decoded` and `shown` count characters: whole ones so far, and those given out.
    """

    def __init__(self, token_bytes: Sequence[bytes], stop: Sequence[str] = ()) -> None:
        """token_bytes: the bytes each token stands for, by id; special tokens stand for none."""
        self.token_bytes, self.stop = token_bytes, [s for s in stop if s]
        self.stopped = False
        self.decoded = self.shown = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""  # whole text that may begin a stop string

    def feed(self, token: int) -> str:
        return self._release(self._decoder.decode(self.token_bytes[token]))

    def of(self, tokens: Sequence[int]) -> str:
        """The text of tokens by themselves."""
        return b"".join(self.token_bytes[token] for token in tokens).decode("utf-8", errors="replace")

    def finish(self) -> str:
        """What was still held back when the tokens ended."""
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
        cuts = [at for at in (text.find(stop) for stop in self.stop) if at >= 0]
        if cuts:
            self.stopped, self._held = True, ""
            return text[:min(cuts)]
        beginnings = [len(part) for stop in self.stop for part in (stop[:n] for n in range(1, len(stop)))
                      if text.endswith(part)]
        keep = max(beginnings, default=0)
        self._held = text[len(text) - keep:]
        return text[:len(text) - keep]
