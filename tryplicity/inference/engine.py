"""A loaded model, ready to write for whoever asks. Shapes: T prompt tokens, V vocabulary."""

from __future__ import annotations

import collections
import gc
import os
import queue
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tryplicity.components import Linear
from tryplicity.data.vocabulary import OURS, vocabulary_of
from tryplicity.errors import UserError
from tryplicity.inference import scheduler
from tryplicity.inference.exactness import why_inexact
from tryplicity.inference.generation import LOOK, Busy, Generation, Piece, Request, Scored, Token
from tryplicity.inference.grammar import Grammars
from tryplicity.inference.packed import Info, Opened, load_model
from tryplicity.inference.sampler import Sampler, Sampling
from tryplicity.inference.speculative import Drafter
from tryplicity.inference.text import TextStream, token_bytes
from tryplicity.model import Model

__all__ = ["Busy", "Engine", "Generation", "ModelCard", "Piece", "Request", "Sampling", "Scored", "Token",
           "decode", "ready_for_decoding", "usable_device"]

SMALL = 128e6  # bytes of floats: see fits_caches


@dataclass(frozen=True)
class ModelCard:
    """What the model is, for people and programs."""

    id: str
    name: str
    format: str  # of the weights in memory
    weights_hash: str  # of the file they came from; "" for a model made by hand
    parameters: int
    active_parameters: int  # that work on one token
    packed_bytes: int  # of the weights in memory
    context_length: int
    chat: bool  # whether it has learned conversations
    layers: tuple[str, ...]
    exact: bool  # whether a token is the same to the bit alone or among others, in one chunk or many
    inexact: str | None  # why it is not, in a line


def decode(model: Model, prompt: Sequence[int], sampler: Sampler) -> Iterator[int]:
    """Token after token, without end, for one sequence alone: what the engine's answers are measured against."""
    device = model.embedding.weight.device
    state = model.new_state(1)
    ids_BT = torch.tensor([list(prompt)], device=device)
    threads, small = torch.get_num_threads(), fits_caches(model)
    try:
        while True:
            with torch.inference_mode():
                token = sampler(model(ids_BT, state=state, last_only=True)[0, -1])
            if small:
                torch.set_num_threads(1)
            yield token
            ids_BT = torch.tensor([[token]], device=device)
    finally:
        torch.set_num_threads(threads)


def usable_device(name: str) -> str:
    """The name, if torch has this device here and can compute on it. Raises UserError."""
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it has no memory")
        (torch.ones(2, device=device) + 1).sum().item()
    except (RuntimeError, AssertionError, NotImplementedError, ValueError, TypeError) as error:
        there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        there += ["mps"] if torch.backends.mps.is_available() else []
        first = str(error).strip().partition("\n")[0]
        raise UserError(f"--device {name}: cannot be used here ({first[:150]}); there is {', '.join(there)}") from None
    return name


def ready_for_decoding(model: Model) -> Model:
    """Put a loaded model in evaluation mode, and on a CPU make decoding fast; shapes and values stay.

    A linear's matrix of floats that has more rows than columns is stored column by column: its product with one token
    then runs up to twice as fast. What Python holds by now is taken out of the garbage collector's rounds, which
    otherwise walk through all of torch again and again.
    """
    model.eval()
    gc.freeze()
    if model.embedding.weight.device.type == "cpu":
        linears = [module for module in model.modules() if isinstance(module, Linear)]
        with torch.no_grad():
            for weight in [linear.weight for linear in linears if linear.weight is not None]:  # None: packed
                if weight.is_floating_point() and weight.shape[-2] > weight.shape[-1]:
                    weight.data = weight.data.mT.contiguous().mT
    return model


def fits_caches(model: Model) -> bool:
    """Whether the weights are so few that a product for one token ends before a second thread has begun: then one
    thread decodes up to 1.5 times as fast as two."""
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    size += sum(module.packed_nbytes() for module in model.modules() if isinstance(module, Linear))
    return model.embedding.weight.device.type == "cpu" and size < SMALL


_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


def _after_fork() -> None:
    for engine in list(_engines):
        engine._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class Engine:
    """A model with its tokenizer. Many may ask at once; what one gets depends on no other: to the bit where
    `card.exact` says so, and else to rounding."""

    def __init__(self, model: Model, tokenizer: Any, info: Info | None = None, *, slots: int = 8, max_waiting: int = 64,
                 chunk: int = 256, prefix_bytes: int = 1 << 30, speculative: bool = False) -> None:
        """tokenizer: of Hugging Face's tokenizers; None: no text, tokens only. slots: answers written at once.
        max_waiting: requests beside them before `submit` raises Busy. chunk: tokens of prompts read between two tokens
        of the answers. prefix_bytes: of states kept to go on from. speculative: guess ahead, where the model has heads
        that can, while one answer is written alone."""
        if slots < 1 or max_waiting < 0 or chunk < 1 or prefix_bytes < 0:
            raise UserError("slots and chunk must be 1 or more, max_waiting and prefix_bytes 0 or more")
        drafter = Drafter(model) if speculative else None
        if drafter is not None and not drafter:
            raise UserError(f"{model.spec.name}: no head of this model can guess ahead; leave speculative off")
        self.model, self.tokenizer = ready_for_decoding(model), tokenizer
        threads = 1 if fits_caches(model) else torch.get_num_threads()
        self.card = _card(model, info, why_inexact(model, torch.get_num_threads(), threads))
        self.scheduler = scheduler.Scheduler(model, slots=slots, max_waiting=max_waiting, chunk=chunk,
                                             prefix_bytes=prefix_bytes, drafter=drafter, decode_threads=threads)
        self.vocabulary = OURS if tokenizer is None else vocabulary_of(tokenizer)
        self._token_bytes = None if tokenizer is None else token_bytes(tokenizer, model.spec.vocab_size)
        self._grammars: Grammars | None = None
        self._making_grammars = threading.Lock()
        _engines.add(self)
        # when nobody holds the engine any more, or the program ends
        self._finalizer = weakref.finalize(self, self.scheduler.close, drain=False)

    def _after_fork(self) -> None:
        self._making_grammars = threading.Lock()
        self.scheduler.after_fork()

    @classmethod
    def load(cls, what: str | Path | Opened, registry, device: str = "cpu", *, ternary: bool = True,
             dtype: torch.dtype | None = None, weights: str | None = None, **options: Any) -> Engine:
        """From a run folder (its model.safetensors, or while it trains its newest checkpoint) or an exported file.

        device: as torch names it: cpu, cuda, cuda:1, mps. ternary: pack the linears of a run that can be packed. dtype:
        of the floats; fp32 by default. weights: "int8" or "bf16": see load_model. options: as the constructor's. Raises
        UserError.
        """
        device = usable_device(device)
        model, _, tokenizer, info = load_model(what, registry, device, ternary=ternary, dtype=dtype, weights=weights)
        return cls(model, tokenizer, info, **options)

    @property
    def context_length(self) -> int:
        return self.model.spec.context_length

    def encode(self, text: str) -> list[int]:
        """The tokens of a text that is to be gone on with. Raises UserError without a tokenizer."""
        if self.tokenizer is None:
            raise UserError(f"{self.card.name}: this model came without a tokenizer, and cannot read text; export it "
                            "again with --tokenizer FILE")
        ids = [*self.vocabulary.begin, *self.tokenizer.encode(text, add_special_tokens=False).ids]
        return ids or [self.vocabulary.bos]

    def submit(self, request: Request, listener: Callable[[Piece], None]) -> Generation:
        """Begin; from any thread. The listener is called from the engine's thread and must not wait; its last piece
        has a `finish`. Raises Busy, and UserError for what cannot be done."""
        self._check(request)
        grammar, vocabulary = None, self.vocabulary
        end_tokens = frozenset({vocabulary.eos}) if request.end_tokens is None else request.end_tokens
        if request.schema is not None:
            with self._making_grammars:
                self._grammars = self._grammars or Grammars(self.tokenizer, self.model.spec.vocab_size)
            grammar, end_tokens = self._grammars.json(request.schema), end_tokens | vocabulary.ends
        # <|im_end|> must not be penalised
        words = [token for token in request.prompt if token not in vocabulary.special]
        generation = Generation(request, len(request.prompt))
        self.scheduler.submit(scheduler.Sequence(
            generation, listener, Sampler(request.sampling, words),
            None if self._token_bytes is None else TextStream(self._token_bytes, request.stop), grammar,
            end_tokens, min(request.max_tokens, self.context_length - len(request.prompt))))
        return generation

    def _check(self, request: Request) -> None:
        size, vocab_size = len(request.prompt), self.model.spec.vocab_size
        if size + min(request.max_tokens, 1) > self.context_length:
            raise UserError(f"the prompt has {size} tokens, and the context of this model holds {self.context_length}, "
                            "the answer included; shorten it")
        for what, ids in (("the prompt", request.prompt), ("logit_bias", request.sampling.logit_bias),
                          ("end_tokens", request.end_tokens or ())):
            if wrong := [token for token in ids if not 0 <= token < vocab_size]:
                raise UserError(f"{what} has token {wrong[0]}; the tokens of this model are 0 to {vocab_size - 1}")
        if self.tokenizer is None and (request.stop or request.schema is not None):
            raise UserError("this model came without a tokenizer: no stop strings and no schema")

    def generate(self, request: Request) -> Iterator[Piece]:
        """The pieces of one answer as they come; closing the iterator cancels it."""
        pieces: queue.SimpleQueue[Piece] = queue.SimpleQueue()
        generation = self.submit(request, pieces.put)
        try:
            yield from _to_the_end(generation, pieces)
        finally:
            generation.cancel()

    def tokens(self, prompt: Sequence[int], sampling: Sampling, max_tokens: int) -> Iterator[int]:
        """At most `max_tokens` tokens after `prompt`, up to and without the end-of-text token."""
        for piece in self.generate(Request(tuple(prompt), sampling, max_tokens)):
            yield from (token.id for token in piece.tokens)

    def score(self, prompt: Sequence[int], alternatives: int = 0) -> Scored:
        """The probabilities of a prompt's own tokens, as OpenAI's `echo` with `logprobs` tells them.

        Gives `Scored(tokens, offsets, text)`: `tokens[i]` is `Token(id, logprob, top)` for `prompt[i]`, with the
        natural logarithm of its probability after `prompt[:i]` and the `alternatives` (0 to 20) likeliest tokens in its
        place as pairs (id, logprob), best first; `tokens[0]` has logprob None and no alternatives. `offsets[i]` is the
        number of whole characters of `text` before token i. Waits its turn among what the engine writes. Raises Busy
        and UserError. To go on after the prompt as well, or not to wait, submit a Request with `score_prompt=True`,
        `logprobs=n` and any max_tokens, and read `Generation.scored` from the first piece on.
        """
        request = Request(tuple(prompt), Sampling(), 0, logprobs=alternatives, score_prompt=True)
        pieces: queue.SimpleQueue[Piece] = queue.SimpleQueue()
        generation = self.submit(request, pieces.put)
        collections.deque(_to_the_end(generation, pieces), maxlen=0)
        if generation.scored is None:
            raise RuntimeError("the engine was closed before the prompt was read")
        return generation.scored

    def stream(self, prompt: str, sampling: Sampling, max_tokens: int, stop: Sequence[str] = ()) -> Iterator[str]:
        """Text after `prompt`, in whole characters, until the text ends, a stop string or `max_tokens`. Raises
        UserError, before anything is iterated over, for what cannot be done."""
        request = Request(tuple(self.encode(prompt)), sampling, max_tokens, tuple(stop))
        self._check(request)
        return (piece.text for piece in self.generate(request) if piece.text)

    def statistics(self) -> dict[str, Any]:
        """Numbers of now: running, waiting, slots, tokens_per_second (of the last seconds), cached_states, ..."""
        return self.scheduler.statistics()

    def close(self, drain: bool = False) -> None:
        """Refuse what comes from now on, and end: with `drain` when all answers are finished; without, they are
        cancelled."""
        self.scheduler.close(drain)


def _to_the_end(generation: Generation, pieces: queue.SimpleQueue[Piece]) -> Iterator[Piece]:
    while True:
        try:
            piece = pieces.get(timeout=LOOK)
        except queue.Empty:
            if not generation.wait(0):
                continue
            # all was given out by now; or it ended where no listener hears of it
            piece = Piece("", (), generation.finish) if pieces.empty() else pieces.get()
        yield piece
        if piece.finish is not None:
            if piece.finish == "error":
                raise RuntimeError(f"the engine failed: {generation.error}")
            return


def _card(model: Model, info: Info | None, inexact: str | None) -> ModelCard:
    if info is None:  # a model made by hand
        size = sum(p.numel() for p in model.parameters())
        spec = model.spec
        return ModelCard(spec.name, spec.name, "by hand", "", size, size, size * model.embedding.weight.element_size(),
                         spec.context_length, any(phase.kind == "chat" for phase in spec.phases), (), not inexact,
                         inexact)
    return ModelCard(info.name, info.name, info.format, info.weights_hash, info.parameters, info.active_parameters,
                     info.packed_bytes, info.context_length, info.chat, info.layers, not inexact, inexact)
