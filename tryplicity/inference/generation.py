"""What is asked of an engine and what comes back: requests, pieces of text with their tokens. Loads no torch."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from tryplicity.errors import UserError

if TYPE_CHECKING:
    from tryplicity.inference.sampler import Sampling

Finish = Literal["stop", "length", "cancelled", "error"]

LOOK = 0.5  # seconds between looks whether what is waited for can still come
MOST_LOGPROBS = 20  # of alternatives a token may carry


class Busy(Exception):
    """The engine's queue is full, or it is closing; ask again later."""


@dataclass(frozen=True)
class Request:
    """A prompt and how to go on from it."""

    prompt: tuple[int, ...]
    sampling: Sampling
    max_tokens: int
    #: texts before which the answer ends; never shown, in part or whole
    stop: tuple[str, ...] = ()
    #: None: no probabilities; n: of each token, and of the n likeliest in its place
    logprobs: int | None = None
    #: tokens that end the answer and are no part of it; None: the one that ends a text
    end_tokens: frozenset[int] | None = None
    #: a JSON schema that the text must satisfy
    schema: Mapping[str, Any] | None = None
    #: whether the prompt's own tokens get their probabilities too, as `logprobs` says, in `Generation.scored`; then
    #: max_tokens may be 0
    score_prompt: bool = False

    def __post_init__(self) -> None:
        if not self.prompt:
            raise UserError("the prompt is empty; it needs one token at least")
        if self.max_tokens < (least := 0 if self.score_prompt else 1):
            raise UserError(f"max_tokens is {self.max_tokens}; it must be {least} or more")
        if self.logprobs is not None and not 0 <= self.logprobs <= MOST_LOGPROBS:
            raise UserError(f"logprobs is {self.logprobs}; it must be from 0 to {MOST_LOGPROBS}")


class Token(NamedTuple):
    """A token of an answer. Probabilities are the model's own, before temperature, penalties and filters."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()  # the likeliest, best first


class Scored(NamedTuple):
    """What a model gives the tokens of a prompt, each after those before it."""

    tokens: tuple[Token, ...]  # one for each of the prompt's; the first, which follows nothing, has logprob None
    offsets: tuple[int, ...]  # where in `text` each begins, in characters; all 0 without a tokenizer
    text: str  # of the prompt; special tokens have none


class Piece(NamedTuple):
    """Text as it comes: whole characters, and the tokens they were written with."""

    text: str
    tokens: tuple[Token, ...] = ()
    finish: Finish | None = None


@dataclass
class Generation:
    """One request on its way. The numbers are of now, and final after the piece that has a `finish`."""

    request: Request
    prompt_tokens: int
    #: tokens of the prompt that a kept state had read already
    cached_tokens: int = 0
    #: tokens chosen, the one that ended the answer included
    completion_tokens: int = 0
    finish: Finish | None = None
    #: of the prompt, where the request has `score_prompt`; there before the first piece
    scored: Scored | None = None
    #: what went wrong, where `finish` is "error"
    error: str | None = None
    submitted: float = field(default_factory=time.perf_counter)
    first: float | None = None  # when the first token was chosen
    last: float | None = None  # when the newest was
    _wake: Callable[[], None] | None = field(default=None, repr=False)
    _look: Callable[[], None] | None = field(default=None, repr=False)  # whether anyone still writes it
    _cancelled: bool = False
    _finished: threading.Event = field(default_factory=threading.Event, repr=False)

    def cancel(self) -> None:
        """Ends it before its next token; from any thread, any number of times."""
        self._cancelled = True
        if self._wake is not None:
            self._wake()

    def wait(self, timeout: float | None = None) -> bool:
        """Until it has finished; False when `timeout` seconds were not enough."""
        ends = math.inf if timeout is None else time.monotonic() + timeout
        while not self._finished.wait(max(0.0, min(LOOK, ends - time.monotonic()))):
            if self._look is not None:
                self._look()
            if time.monotonic() >= ends:
                return self._finished.is_set()
        return True

    @property
    def seconds_to_first(self) -> float | None:
        """From submitting to the first token."""
        return None if self.first is None else self.first - self.submitted

    @property
    def tokens_per_second(self) -> float | None:
        """Of the tokens after the first."""
        if self.completion_tokens < 2:
            return None
        return (self.completion_tokens - 1) / max(self.last - self.first, 1e-9)
