"""One token more of several sequences as a function of tensors that keep their addresses, for a card to replay.

The launches of a step of decoding cost a card many times what the step itself does. So it is recorded once for each
number of rows (1, 2, 4, ...) in a CUDA graph of compiled blocks, and replayed with one launch: all that changes from
token to token (which token, how many came before, what was read) is in tensors that the graph finds where they were,
and the next token is chosen, and read again by the next step, on the device: the likeliest inside the graph, a drawn
one right behind it. A sequence sits in a row of these tensors while it is written, and takes its state with it when it
leaves.

Before a recorded step is used it is tried on the very sequences that wait for it, beside the ordinary pass. Where a
state cannot be held so, the step cannot be recorded, or differs, all goes on in the ordinary way, and one line says so.

Shapes: R rows, D hidden, V vocabulary.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tryplicity.components import Rows, State, tensors
from tryplicity.errors import UserError
from tryplicity.guard import cause, lacks_memory
from tryplicity.inference.prefix import clone
from tryplicity.model import Block, Model
from tryplicity.training.compiling import compiled, kinds_of

WAYS = ("auto", "eager", "captured", "compiled")
PLACES = 2048  # for the tokens of a sequence, to begin with; twice as many when one has filled them
NEAR = {torch.float32: 0.02, torch.float64: 1e-6}  # of the size of the logits, that they may differ by; others: 0.1

log = logging.getLogger("tryplicity.inference")


def way(device: torch.device) -> str:
    """How steps of decoding are run there. TRYPLICITY_STEPS: eager, the ordinary pass; captured, recorded as it is;
    compiled, recorded with compiled blocks; auto, the default: compiled on a card, else eager. What a device cannot
    record is run again and again, which tests want."""
    wanted = os.environ.get("TRYPLICITY_STEPS") or "auto"
    if wanted not in WAYS:
        raise UserError(f"TRYPLICITY_STEPS={wanted}: it can be {', '.join(WAYS)}")
    if wanted == "auto":
        return "compiled" if device.type == "cuda" and torch.version.hip is None else "eager"
    return wanted


class _Differs(Exception):
    """What a step did that the ordinary pass does not."""


class Written(NamedTuple):
    """What a step gave; the tensors are those of the next step too."""

    rows: list[int]  # of each sequence
    logits_RV: Tensor
    tokens: list[int]  # of each row the next, -1 where the logits are not finite


class FixedSteps:
    """Steps of up to `most` sequences of a model. A sequence has `ids`, `read` and `state`, as the scheduler's."""

    def __init__(self, model: Model, most: int, how: str, say: Callable[[str], None] = log.warning,
                 backend: str = "inductor", places: int = PLACES) -> None:
        self.model, self.most, self.how, self.say, self.backend = model, most, how, say, backend
        self.refused: str | None = None
        self.places, self.least_places = 0, places
        self.seated: list[Any] = []  # by row
        self.room: list[list[State | None]] = []  # by layer and sub-layer
        self.steps: dict[int, Callable[[], None]] = {}
        self._code: dict[tuple[int, int], Callable] = {}  # of a kind of block, for so many rows
        self._kind = {id(model.layers[number]): kind
                      for kind, layers in enumerate(kinds_of(model)) for number in layers}
        table = model.embedding.weight
        self.ids_R = torch.zeros(most, dtype=torch.int64, device=table.device)
        self.likeliest_R = torch.zeros_like(self.ids_R)
        self.logits_RV: Tensor | None = None  # in whatever dtype they come
        self._chosen: list[int] = [0] * most  # what stands in ids_R

    def write(self, sequences: Sequence[Any],
              choose: Callable[[list[Any], Tensor], Tensor] | None = None) -> Written | None:
        """Read the last token of each, which is all that it has not read. None: it is to be done in the ordinary way,
        and the states of the sequences are as they should be for that.

        choose: of sequences and their logits [R, V] the next tokens, int64 [R], -1 where the logits are not finite; by
        default the likeliest. What it chooses is not binding: a sequence's next token is what it has as its last."""
        if self.refused or len(sequences) > self.most:
            self.leave(*self.seated)
            return None
        try:
            here = set(map(id, sequences))
            self.leave(*[own for own in self.seated if id(own) not in here])
            if not self._seat(sequences):
                return None
            rows = min(self.most, 1 << (len(sequences) - 1).bit_length())
            step = self.steps.get(rows) or self._tried(rows)
            if step is None:
                return None
            self._give_ids()
            step()
            tokens = self._next(choose)
        except BaseException:
            self.seated, self.steps, self.room, self.places = [], {}, [], 0  # nobody knows what stands there
            raise
        for own in sequences:
            own.read += 1
        row_of = {id(own): row for row, own in enumerate(self.seated)}
        return Written([row_of[id(own)] for own in sequences], self.logits_RV, tokens)

    def _next(self, choose: Callable[[list[Any], Tensor], Tensor] | None) -> list[int]:
        """The next tokens of the rows, which the next step will find where it reads them; the host waits here alone."""
        next_R = self.likeliest_R[:len(self.seated)]
        if choose is not None:
            next_R = choose(self.seated, self.logits_RV[:len(self.seated)])
            self.ids_R[:len(next_R)].copy_(next_R.clamp(min=0))
        tokens = next_R.tolist()
        self._chosen[:len(tokens)] = [max(token, 0) for token in tokens]
        return tokens

    def leave(self, *sequences: Any) -> None:
        """Bring their states up to date and free their rows, into which those from the end move."""
        for own in sequences:
            if own not in self.seated:
                continue
            row, last = self.seated.index(own), len(self.seated) - 1
            self._take(row, own)
            if row != last:
                self._each(self.room, lambda room, _, row=row, last=last: room.move(last, row))
                self.ids_R[row] = self.ids_R[last]
                self.seated[row], self._chosen[row] = self.seated[last], self._chosen[last]
            self.seated.pop()

    def _each(self, state: list, do: Callable[[State, State], None]) -> None:
        """With the room of each sub-layer and its own part of a state."""
        for layer, own_layer in zip(self.room, state, strict=True):
            for room, own in zip(layer, own_layer, strict=True):
                if room is not None:
                    do(room, own)

    def _seat(self, sequences: Sequence[Any]) -> bool:
        """Everyone in a row, with a place for one more token. False where that cannot be."""
        needed = 1 + max(own.read for own in sequences)
        if needed > self.places:
            self.leave(*self.seated)
            self.steps = {}
            places = max(self.least_places, 1 << (needed - 1).bit_length())
            self.places = min(places, max(needed, self.model.spec.context_length))
            try:
                self.room = [[None if own is None else own.fixed(self.most, self.places) for own in layer]
                             for layer in sequences[0].state]
            except Exception as error:
                if not lacks_memory(error):
                    raise
                self._refuse(_line(error))
                return False
            for number, (made, layer) in enumerate(zip(self.room, sequences[0].state, strict=True)):
                if [room is None for room in made] != [own is None for own in layer]:
                    self._refuse(f"layer {number} has a state that cannot be kept at one address")
                    return False
        seated = set(map(id, self.seated))
        for own in sequences:
            if id(own) not in seated:
                self._put(len(self.seated), own)
                self.seated.append(own)
        return True

    def _put(self, row: int, own: Any) -> None:
        self._each(own.state, lambda room, state: room.put(row, state))

    def _take(self, row: int, own: Any) -> None:
        self._each(own.state, lambda room, state: room.take(row, state))

    def _give_ids(self) -> None:
        """The last token of each to the device, unless it chose that itself."""
        wanted = [own.ids[-1] for own in self.seated]
        if wanted != self._chosen[:len(wanted)]:
            self.ids_R[:len(wanted)].copy_(torch.tensor(wanted), non_blocking=True)

    # --- a step of so many rows ---

    def _tried(self, rows: int) -> Callable[[], None] | None:
        """The step for so many rows, recorded, and compared with the ordinary pass on those who sit there now; None
        where that fails, and they have left."""
        seated = list(self.seated)
        for row, own in enumerate(seated):
            self._take(row, own)
        while True:
            try:
                self.steps[rows] = step = self._made(rows, seated)
                return step
            except Exception as error:
                if self.how == "compiled" and not lacks_memory(error):
                    self.how, self.steps = "captured", {}
                    self.say(f"warning: steps of decoding go on uncompiled: {_line(error)}")
                else:
                    self._refuse(_line(error))
                    return None

    def _made(self, rows: int, seated: list[Any]) -> Callable[[], None]:
        def afresh() -> None:
            for row, own in enumerate(seated):
                self._put(row, own)
            self._chosen = [-1] * self.most
            self._give_ids()

        state = [[None if own is None else own.first(rows) for own in layer] for layer in self.room]
        addresses = [tensor.data_ptr() for tensor in tensors(state)]
        wanted_RV, step = self._ordinary(seated), self._function(rows, state)
        if self.ids_R.is_cuda:
            with torch.cuda.device(self.ids_R.device):
                step = _recorded(step, afresh)
        afresh()
        step()
        if [tensor.data_ptr() for tensor in tensors(state)] != addresses:
            raise _Differs("a layer puts other tensors in the place of its state's")
        found_RV = self.logits_RV[:len(seated)]
        error = float((found_RV.double() - wanted_RV.double()).norm() / wanted_RV.double().norm().clamp(min=1e-30))
        if not error <= NEAR.get(found_RV.dtype, 0.1):
            raise _Differs(f"the logits differ by {error:.2g} of their size from the ordinary pass's")
        afresh()
        return step

    def _ordinary(self, seated: list[Any]) -> Tensor:
        states = [clone(own.state) for own in seated]
        ids_R1 = torch.tensor([own.ids[-1:] for own in seated], device=self.ids_R.device)
        h_RTD, _ = self.model.hidden(ids_R1, state=states[0] if len(states) == 1 else Rows(states))
        return self.model.logits(h_RTD)[:, 0]

    def _function(self, rows: int, state: list[list[State | None]]) -> Callable[[], None]:
        ids_R, likeliest_R, model = self.ids_R[:rows], self.likeliest_R[:rows], self.model
        run = self._compiled(rows) if self.how == "compiled" else torch.nn.Module.__call__

        def step() -> None:
            h_RTD, _ = model.hidden(ids_R[:, None], state=state, run=run)
            logits_RV = model.logits(h_RTD)[:, 0]
            if self.logits_RV is None:
                self.logits_RV = logits_RV.new_empty(self.most, logits_RV.shape[1])
            self.logits_RV[:rows].copy_(logits_RV)
            best_R, token_R = logits_RV.max(-1)
            ids_R.copy_(token_R)
            likeliest_R.copy_(token_R.where(best_R.isfinite(), -1))

        return step

    def _compiled(self, rows: int) -> Callable:
        def run(block: Block, *given: Any) -> Any:
            key = self._kind[id(block)], rows
            if key not in self._code:
                self._code[key] = compiled(Block.forward, self.backend)
            return self._code[key](block, *given)

        return run

    def _refuse(self, why: str) -> None:
        self.refused, self.seated, self.steps, self.room, self._code = why, [], {}, [], {}
        self.say(f"warning: steps of decoding are not recorded: {why}")


def _recorded(step: Callable[[], None], afresh: Callable[[], None]) -> Callable[[], None]:
    """A CUDA graph of a step, on the current device. afresh: brings all that a step changes back to where it was."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # in which kernels are compiled and memory is found
            afresh()
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    return graph.replay


def _line(error: Exception) -> str:
    text = str(error) if isinstance(error, _Differs) else " ".join(cause(error).split())
    return text if len(text) < 300 else f"{text[:297]}..."
