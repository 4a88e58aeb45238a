"""The one thread in which a model runs, for all who ask at once.

Each round: who has come is admitted while slots are free; those whose prompts are unread read a chunk together; all who
write get their next token, in one pass of the model over one token of each. Nobody's tokens depend on who else is
there. Whatever is raised in the thread ends the answers that it concerns, with an error; if the thread itself ends, all
who wait are told, and the next who comes starts another. Shapes: B sequences, T time, V vocabulary, D hidden.
"""

from __future__ import annotations

import collections
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tryplicity.components import Rows
from tryplicity.inference import fixed
from tryplicity.inference.choosing import next_tokens, told
from tryplicity.inference.generation import Busy, Finish, Generation, Piece, Scored, Token
from tryplicity.inference.grammar import Grammar
from tryplicity.inference.prefix import Prefixes, clone
from tryplicity.inference.sampler import Sampler
from tryplicity.inference.speculative import MOST_UNREAD, Drafter
from tryplicity.inference.text import TextStream
from tryplicity.model import Model

Listener = Callable[[Piece], None]

SCORED_AT_ONCE = 32  # tokens of a prompt whose logits are in memory together
SHARED = 64  # tokens that prompts must begin with in common, beyond what is kept, to keep a state there too
SLOW_CHUNK, SMALLEST_CHUNK = 0.5, 16  # seconds that all others wait, and tokens: see `_paced`
WINDOW = 5.0  # seconds of the present in "tokens per second"

log = logging.getLogger("tryplicity.inference")


class Sequence:
    """One request on its way through the scheduler."""

    def __init__(self, generation: Generation, listener: Listener, sampler: Sampler, text: TextStream | None,
                 grammar: Grammar | None, end_tokens: frozenset[int], most_tokens: int) -> None:
        self.generation, self.listener, self.sampler = generation, listener, sampler
        self.text, self.grammar, self.end_tokens, self.most_tokens = text, grammar, end_tokens, most_tokens
        self.ids = list(generation.request.prompt)  # and what was chosen
        self.prompt_size = len(self.ids)
        self.read = 0  # of `ids`, by the state
        self.state: list | None = None
        self.turn = 0  # the round in which it came, or last read a part of a prompt that several share out
        self.pause_at = 0  # in the prompt, to keep a state that other prompts can go on from
        self.scores: list[Token] | None = None  # of the prompt's tokens, where they are asked for
        if generation.request.score_prompt:
            self.scores = [Token(self.ids[0])]
        self.drafts: list[int] = []  # guesses of what comes after the last of `ids`
        self.held: list[tuple[int, Token]] = []  # tokens not given out yet, and where in the text each begins
        self.shown: list[str] = []

    @property
    def reading(self) -> bool:
        """Whether its first token is still to come."""
        return len(self.ids) == self.prompt_size

    @property
    def unread(self) -> int:
        return len(self.ids) - self.read


class Scheduler:
    """Runs sequences through a model in a thread of its own, which starts with the first of them."""

    def __init__(self, model: Model, *, slots: int, max_waiting: int, chunk: int, prefix_bytes: int,
                 drafter: Drafter | None, decode_threads: int) -> None:
        self.model, self.slots, self.max_waiting = model, slots, max_waiting
        self.chunk = self.most_chunk = chunk
        self.drafter = drafter
        self.prefixes = Prefixes(prefix_bytes)
        self.read_threads, self.decode_threads = torch.get_num_threads(), decode_threads
        self.device = model.embedding.weight.device
        self.fixed = self._fixed_steps()
        # where tokens are drawn: on a card for all rows together, on a CPU, where NumPy is faster (see
        # tests.benchmarks.drawing), row by row, unless the steps are those of a card
        self.draws_together = self.device.type == "cuda" or self.fixed is not None
        self.tokens_total = self.prompt_tokens_total = self.cached_tokens_total = self.finished_total = 0
        self._recent: collections.deque[tuple[float, int]] = collections.deque()
        self._waiting: collections.deque[Sequence] = collections.deque()
        self._active: list[Sequence] = []
        self._changed = threading.Condition()
        self._closing = False
        self._thread: threading.Thread | None = None
        self._rounds = 0

    def _fixed_steps(self) -> fixed.FixedSteps | None:
        """None where steps are run as they come, as those that guess ahead are."""
        how = fixed.way(self.device)
        return None if how == "eager" or self.drafter else fixed.FixedSteps(self.model, self.slots, how)

    # --- from any thread ---

    def submit(self, sequence: Sequence) -> None:
        self.look()
        with self._changed:
            if self._closing:
                raise Busy("the engine is closing")
            free = self.slots - len(self._active)
            if len(self._waiting) >= self.max_waiting + free:
                raise Busy(f"{self.slots} answers are being written and {len(self._waiting)} wait; ask again later")
            self._have_thread()
            sequence.generation._wake, sequence.generation._look = self._wake, self.look
            self._waiting.append(sequence)
            self._changed.notify_all()

    def _have_thread(self) -> None:
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="tryplicity-engine", daemon=True)
            try:
                thread.start()
            except (RuntimeError, MemoryError) as error:  # the system has no room for one, perhaps for a while
                raise Busy(f"the engine's thread does not start ({error}); ask again later") from None
            self._thread = thread

    def look(self) -> None:
        """Notice a thread that ended without a word: who waits for it is told. From any thread."""
        with self._changed:
            dead = self._thread is not None and not self._thread.is_alive()
        if dead:
            self._abandon(RuntimeError("the engine's thread has ended"))

    def after_fork(self) -> None:
        """In a child of fork, which has none of its parent's threads: begin anew. What was under way goes on in the
        parent; nobody here will hear of it."""
        orphans = [*self._active, *self._waiting]
        self._changed, self._thread = threading.Condition(), None  # the lock may have been held
        self._active, self._waiting = [], collections.deque()
        self.prefixes = Prefixes(self.prefixes.most_bytes)  # may have been in the middle of a change
        self.fixed = self._fixed_steps()
        for sequence in orphans:
            generation = sequence.generation
            generation._finished = threading.Event()
            generation.error = "RuntimeError: the process was forked; the answer is written in its parent"
            generation.finish = "error"
            generation._finished.set()

    def close(self, drain: bool) -> None:
        """Refuse what comes from now on; finish what is there, or cancel it. Returns when all is done."""
        with self._changed:
            self._closing = True
            if not drain:
                for sequence in [*self._active, *self._waiting]:
                    sequence.generation._cancelled = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()
            self.look()

    def statistics(self) -> dict[str, Any]:
        now = time.perf_counter()
        with self._changed:
            running, waiting = len(self._active), len(self._waiting)
            recent = [tokens for moment, tokens in self._recent if now - moment <= WINDOW]
            begun = next((moment for moment, _ in self._recent if now - moment <= WINDOW), now)
        # over a second at least, so that the first tokens after a rest do not look like a rush
        speed = sum(recent) / max(now - begun, 1.0)
        drafted, accepted = (0, 0) if self.drafter is None else (self.drafter.drafted, self.drafter.accepted)
        return {"running": running, "waiting": waiting, "slots": self.slots, "max_waiting": self.max_waiting,
                "finished_total": self.finished_total, "tokens_total": self.tokens_total, "tokens_per_second": speed,
                "prompt_tokens_total": self.prompt_tokens_total, "cached_tokens_total": self.cached_tokens_total,
                "cached_states": len(self.prefixes), "cached_bytes": self.prefixes.bytes,
                "drafted_total": drafted, "accepted_total": accepted}

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    # --- in the engine's thread ---

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while self._await_work():
                    try:
                        self._round()
                    except BaseException as error:  # a fault of the scheduler itself: nobody must wait for ever
                        log.exception("a round of the engine failed")
                        self._fail(list(self._active), error)
            self.prefixes.clear()
        except BaseException as error:
            log.exception("the engine's thread ends")
            self._abandon(error)

    def _abandon(self, error: BaseException) -> None:
        """The thread has ended: those who wait for it are told, and the next who comes starts another."""
        with self._changed:
            orphans = [*self._active, *self._waiting]
            self._active, self._thread = [], None
            self._waiting.clear()
            self.fixed = self._fixed_steps()  # nobody knows what stands in the rows
        self._fail(orphans, error)

    def _await_work(self) -> bool:
        """Until there is something to do; False when there will be nothing any more."""
        with self._changed:
            while not (self._active or self._waiting):
                if self._closing or self._thread is not threading.current_thread():
                    return False
                self._changed.wait()
            return True

    def _round(self) -> None:
        self._rounds += 1
        self._drop_cancelled()
        with self._changed:
            while self._waiting and len(self._active) < self.slots:
                self._active.append(self._waiting.popleft())
                self._active[-1].turn = self._rounds
        if any(sequence.reading for sequence in self._active):
            self._use_threads(self.read_threads)
            self._read_prompts()
        writing = [sequence for sequence in self._active if not sequence.reading]
        if not writing:
            return
        self._use_threads(self.decode_threads)
        try:
            if len(writing) == 1 and self.drafter:
                self._write_guessing(writing[0])
            else:
                self._write(writing)
        except BaseException as error:
            log.exception("a step of the engine failed")
            self._fail(writing, error)

    @staticmethod
    def _use_threads(threads: int) -> None:
        if torch.get_num_threads() != threads:  # setting it, even to what it is, costs microseconds
            torch.set_num_threads(threads)

    def _drop_cancelled(self) -> None:
        with self._changed:
            gone = [sequence for sequence in [*self._active, *self._waiting] if sequence.generation._cancelled]
            for sequence in gone:
                if sequence in self._waiting:
                    self._waiting.remove(sequence)
        for sequence in gone:
            self._finish(sequence, "cancelled")

    def _read_prompts(self) -> None:
        """Up to a chunk of tokens of the prompts. Who has no more to read than an even share reads it; what that leaves
        goes to the others one after the other, round by round, in pieces as large as can be."""
        begun: list[Sequence] = []
        for sequence in [sequence for sequence in self._active if sequence.reading]:
            if sequence.state is None and self._soon_read(sequence, begun):
                continue
            if sequence.state is None:
                self._or_fail(sequence, self._begin)
            if sequence.reading and sequence.generation.finish is None:
                begun.append(sequence)
        budget, share = self.chunk, self.chunk // max(1, len(begun))
        for sequence in sorted(begun, key=lambda s: (s.unread > share, s.turn)):
            if sequence.unread > share and budget > 0:
                sequence.turn = self._rounds
            while budget > 0 and sequence.reading and sequence.generation.finish is None:
                before = sequence.read
                self._or_fail(sequence, self._read_some, budget)
                budget -= sequence.read - before

    def _soon_read(self, sequence: Sequence, begun: list[Sequence]) -> bool:
        """Whether one of these is about to read what this one begins with, too: it pauses there, and leaves a state."""
        if sequence.scores is not None or not self.prefixes.most_bytes:
            return False
        for other in begun:
            ids = other.ids
            common = next((i for i, (a, b) in enumerate(zip(ids, sequence.ids, strict=False)) if a != b),
                          min(len(ids), len(sequence.ids)))
            if other.read < common and (common >= SHARED or common == len(ids)):
                if common < len(ids) and not other.read < other.pause_at <= common:
                    other.pause_at = common
                return True
        return False

    def _or_fail(self, sequence: Sequence, do: Callable[..., None], *arguments: Any) -> None:
        try:
            do(sequence, *arguments)
        except BaseException as error:
            log.exception("an answer failed")
            self._fail([sequence], error)

    def _read_some(self, sequence: Sequence, most: int) -> None:
        """Read on in a prompt; at its end choose the first token."""
        ids, before = sequence.ids, sequence.read
        end = min(before + most, len(ids))
        if before < sequence.pause_at < end:
            end = sequence.pause_at
        begun = time.perf_counter()
        h_BTD, _ = self._pass([ids[before:end]], [sequence])
        self._paced(end - before, time.perf_counter() - begun)
        self.prompt_tokens_total += end - before
        if sequence.scores is not None:
            self._score(sequence, before, h_BTD[0])
        if end == len(ids):
            last = self.model.logits(h_BTD[:, -1:])[0, 0], h_BTD[0, -1].clone()
            self._keep(ids, sequence.state, last)
            self._have_read(sequence, *last)
        elif end == sequence.pause_at:
            self._keep(ids[:end], sequence.state)

    def _have_read(self, sequence: Sequence, logits_V: Tensor, h_D: Tensor) -> None:
        if sequence.most_tokens == 0:
            self._finish(sequence, "length")
        else:
            self._choose(sequence, logits_V)
            self._guess(sequence, h_D)

    def _score(self, sequence: Sequence, before: int, h_TD: Tensor) -> None:
        """The probabilities of what comes after each of these tokens of a prompt, a few at a time: logits are wide."""
        alternatives = sequence.generation.request.logprobs
        after = sequence.ids[before + 1:min(before + 1 + len(h_TD), sequence.prompt_size)]
        for first in range(0, len(after), SCORED_AT_ONCE):
            tokens = after[first:first + SCORED_AT_ONCE]
            logits_TV = self.model.logits(h_TD[None, first:first + len(tokens)])[0]
            sequence.scores += told(tokens, logits_TV, [alternatives or 0] * len(tokens))
        if len(sequence.scores) == sequence.prompt_size:
            offsets, text = [0] * sequence.prompt_size, ""
            if sequence.text is not None:
                offsets, text = sequence.text.along(sequence.ids[:sequence.prompt_size])
            sequence.generation.scored = Scored(tuple(sequence.scores), tuple(offsets), text)

    def _paced(self, tokens: int, seconds: float) -> None:
        """Chunks that take long are halved; they grow again when they would not: a machine may be busy for a while."""
        if tokens == self.chunk > SMALLEST_CHUNK and seconds > SLOW_CHUNK:
            self.chunk //= 2
        elif tokens == self.chunk < self.most_chunk and seconds < SLOW_CHUNK / 4:
            self.chunk = min(2 * self.chunk, self.most_chunk)

    def _begin(self, sequence: Sequence) -> None:
        """Give a sequence its state: a kept one, or an empty one. Where that leaves nothing to read, its first token is
        chosen."""
        if sequence.scores is not None:  # a kept state does not tell what came before it
            sequence.state = self.model.new_state(1)
            return
        found = self.prefixes.find(sequence.ids)
        sequence.state = self.model.new_state(1) if found.state is None else found.state
        sequence.read = sequence.generation.cached_tokens = found.read
        self.cached_tokens_total += found.read
        if found.shared - found.read >= SHARED:
            sequence.pause_at = found.shared
        if found.last is not None:
            self._have_read(sequence, *found.last)

    def _keep(self, ids: list[int], state: list, last: tuple[Tensor, Tensor] | None = None) -> None:
        if self.prefixes.most_bytes:
            self.prefixes.keep(ids, clone(state), last)

    def _write(self, writing: list[Sequence]) -> None:
        """The next token of each."""
        for sequence in writing:
            self._catch_up(sequence)
        likeliest = all(sequence.sampler.greedy for sequence in writing)
        written = self.fixed.write(writing, None if likeliest else self._next) if self.fixed else None
        if written is not None:
            rows, logits_BV, tokens = written
        else:
            h_BTD, logits_BTV = self._pass([sequence.ids[-1:] for sequence in writing], writing, logits=True)
            rows, logits_BV = list(range(len(writing))), logits_BTV[:, 0]
            tokens = self._next(writing, logits_BV).tolist()
        for row, sequence in zip(rows, writing, strict=True):
            if self._chosen_with_others(sequence):
                sequence.sampler.took(tokens[row])
            else:
                self._or_fail(sequence, self._choose_alone, logits_BV[row], tokens, row)
        self._count(len(writing))
        tellings = self._told(writing, rows, logits_BV, tokens)
        for row, sequence in zip(rows, writing, strict=True):
            if sequence.generation.finish is None:
                self._or_fail(sequence, self._take, tokens[row], tellings.get(row))
                sequence.drafts = []
        if len(writing) == 1 and written is None:
            self._guess(writing[0], h_BTD[0, -1])

    def _chosen_with_others(self, sequence: Sequence) -> bool:
        return sequence.grammar is None and (self.draws_together or sequence.sampler.greedy)

    def _next(self, sequences: list[Sequence], logits_BV: Tensor) -> Tensor:
        """The next tokens of those that are not chosen alone."""
        return next_tokens(logits_BV, [sequence.sampler if self._chosen_with_others(sequence) else None
                                       for sequence in sequences])

    def _choose_alone(self, sequence: Sequence, logits_V: Tensor, tokens: list[int], row: int) -> None:
        grammar = sequence.grammar
        tokens[row] = sequence.sampler(logits_V, grammar.allowed() if grammar else None)

    @staticmethod
    def _told(writing: list[Sequence], rows: list[int], logits_BV: Tensor, tokens: list[int]) -> dict[int, Token]:
        """What those who ask are told of the model's own probabilities, by row."""
        asked = {row: sequence.generation.request.logprobs for row, sequence in zip(rows, writing, strict=True)
                 if sequence.generation.request.logprobs is not None and tokens[row] >= 0}
        if not asked:
            return {}
        found = told([tokens[row] for row in asked], logits_BV[list(asked)], list(asked.values()))
        return dict(zip(asked, found, strict=True))

    def _write_guessing(self, sequence: Sequence) -> None:
        """The next token, and as many after it as were guessed right."""
        if len(sequence.ids) - sequence.read > MOST_UNREAD:
            self._catch_up(sequence)
        unread, drafts = sequence.ids[sequence.read:], sequence.drafts
        drafts = drafts[:sequence.most_tokens - sequence.generation.completion_tokens - 1]
        before = (clone(sequence.state) if drafts else None), sequence.read
        h_BTD, logits_BTV = self._pass([unread + drafts], [sequence], logits=True)
        after = sequence.state, sequence.read
        sequence.state, sequence.read = before
        right, at = 0, len(unread) - 1
        self.drafter.drafted += len(drafts)
        while True:
            if right == len(drafts):  # all that was read stands
                sequence.state, sequence.read = after
            token = self._choose(sequence, logits_BTV[0, at + right])
            if right == len(drafts) or token != drafts[right] or sequence.generation.finish is not None:
                break
            right += 1
            self.drafter.accepted += 1
        self._guess(sequence, h_BTD[0, at + right])

    def _guess(self, sequence: Sequence, h_D: Tensor) -> None:
        if self.drafter and sequence.generation.finish is None:
            sequence.drafts = self.drafter(h_D)

    def _catch_up(self, sequence: Sequence) -> None:
        """Read all but the last token."""
        if len(sequence.ids) - sequence.read > 1:
            self._pass([sequence.ids[sequence.read:-1]], [sequence])

    def _pass(self, ids: list[list[int]], sequences: list[Sequence],
              logits: bool = False) -> tuple[Tensor, Tensor | None]:
        """Read as many tokens for each sequence: the hidden states [B, T, D], and on request the logits [B, T, V]."""
        states = [sequence.state for sequence in sequences]
        state = states[0] if len(states) == 1 else Rows(states)
        h_BTD, _ = self.model.hidden(torch.tensor(ids, device=self.device), state=state)
        for sequence in sequences:
            sequence.read += len(ids[0])
        return h_BTD, self.model.logits(h_BTD) if logits else None

    def _choose(self, sequence: Sequence, logits_V: Tensor) -> int:
        """Choose the next token of one sequence by itself, and take it."""
        tokens, logits_1V = [0], logits_V[None]
        self._choose_alone(sequence, logits_V, tokens, 0)
        self._count(1)
        self._take(sequence, tokens[0], self._told([sequence], [0], logits_1V, tokens).get(0))
        return tokens[0]

    def _take(self, sequence: Sequence, token: int, telling: Token | None) -> None:
        """A token that was chosen: give out what can be shown, and end where it ends."""
        if token < 0:
            raise ArithmeticError("the model's logits are not finite")
        generation, grammar, text = sequence.generation, sequence.grammar, sequence.text
        generation.last = now = time.perf_counter()
        if generation.first is None:
            generation.first = now
        generation.completion_tokens += 1
        self.tokens_total += 1
        if token in sequence.end_tokens:
            self._finish(sequence, "stop")
            return
        if grammar:
            grammar.take(token)
        sequence.ids.append(token)
        sequence.held.append((text.decoded if text else 0, telling or Token(token)))
        shown = text.feed(token) if text else ""
        if (text and text.stopped) or (grammar and grammar.complete):
            self._finish(sequence, "stop", shown)
        elif generation.completion_tokens >= sequence.most_tokens:
            self._finish(sequence, "length", shown)
        elif shown or text is None:
            self._give(sequence, shown, None)

    def _count(self, tokens: int) -> None:
        now = time.perf_counter()
        with self._changed:
            self._recent.append((now, tokens))
            while now - self._recent[0][0] > WINDOW:
                self._recent.popleft()

    def _give(self, sequence: Sequence, shown: str, finish: Finish | None) -> None:
        """A piece for the listener: the text, and the tokens that begin inside what is shown by now."""
        text = sequence.text
        all_of_it = text is None or (finish is not None and not text.stopped)
        given = [token for begins, token in sequence.held if all_of_it or begins < text.shown]
        del sequence.held[:len(given)]
        sequence.shown.append(shown)
        try:
            sequence.listener(Piece(shown, tuple(given), finish))
        except BaseException:  # nobody listens any more
            log.exception("a listener failed; its generation is cancelled")
            sequence.generation.cancel()

    def _finish(self, sequence: Sequence, finish: Finish, shown: str = "") -> None:
        """Free the slot, keep the state, and give out the rest."""
        if self.fixed:
            self.fixed.leave(sequence)
        generation, state = sequence.generation, sequence.state
        with self._changed:
            if sequence in self._active:
                self._active.remove(sequence)
            self.finished_total += 1
            self._changed.notify_all()
        if sequence.text:
            shown += sequence.text.finish(cut_off=finish != "stop")
        sequence.state = None
        if finish != "error" and state is not None and sequence.read >= sequence.prompt_size:
            # before the last piece is given out: the next turn may come at once
            self.prefixes.keep(sequence.ids[:sequence.read], state)
        generation.finish = finish
        self._give(sequence, shown, finish)
        generation._finished.set()

    def _fail(self, sequences: list[Sequence], error: BaseException) -> None:
        for sequence in sequences:
            if sequence.generation.finish is None:
                sequence.generation.error = f"{type(error).__name__}: {error}"
                self._finish(sequence, "error")
