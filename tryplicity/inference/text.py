"""From tokens to text as it streams: whole characters only, and never a part of a stop string. Loads no torch."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextStream:
    """Feed tokens, get text that is safe to show.

    A character whose bytes are spread over tokens is held back until whole; text that may be the beginning of a
    stop string is held back until it is clear. `stopped` becomes true at a stop string, which is never shown.
    """

    def __init__(self, token_bytes: Sequence[bytes], stop: Sequence[str] = ()) -> None:
        """token_bytes: the bytes each token stands for, by id; special tokens stand for none."""
        self.token_bytes, self.stop = token_bytes, [s for s in stop if s]
        self.stopped = False
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""  # whole text that may begin a stop string

    def feed(self, token: int) -> str:
        return self._release(self._decoder.decode(self.token_bytes[token]))

    def finish(self) -> str:
        """What was still held back when the tokens ended."""
        shown = self._release(self._decoder.decode(b"", final=True))
        rest, self._held = ("", "") if self.stopped else (self._held, "")
        return shown + rest

    def _release(self, new: str) -> str:
        text = self._held + new
        cuts = [at for at in (text.find(stop) for stop in self.stop) if at >= 0]
        if cuts:
            self.stopped, self._held = True, ""
            return text[:min(cuts)]
        keep = max((size for stop in self.stop for size in range(1, len(stop)) if text.endswith(stop[:size])), default=0)
        self._held = text[len(text) - keep:]
        return text[:len(text) - keep]
