"""Rows of packed documents as a pure function of (seed, state).

Every epoch the documents of the training part are put in a new order and joined into one stream of tokens; the
stream is cut into rows of T tokens, and these are delivered in an order of their own, so that the rows of a batch
are of different documents even where documents are long. The last row of an epoch is filled up with the beginning of
the next, which is not delivered again: every token is, once an epoch, whatever T. Where T changes inside an epoch, what
is left of it is cut anew and put in a new order: a row may then hold pieces that do not follow one another, and
these are told apart like documents.

The state of a stream is the epoch, how much of it the row before it took, and how many rows of which length were
delivered since: any batch size or number of ranks goes on from there with the same rows. As long as T is the same,
that is how many tokens were delivered. Where several ranks share the rows of a step, each asks for all of them and says
which it wants made (`World.part`): the order is the same on any number of ranks, and all go on behind the step's last.

Shapes: B rows, T time (tokens of a row), N tokens in a run of the stream, M those of all rows, S stretches, P pieces.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tryplicity.data.ordering import AT_ONCE, filled, numbers, permutation, slices, sums
from tryplicity.data.remainder import Runs, without
from tryplicity.data.stretches import Stretches, joined_stretches, stretches
from tryplicity.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

IGNORE = -100   # the target of a position that has none; the same as tryplicity.IGNORE
DOCUMENT = np.dtype([("end", "<u8"), ("bytes", "<u8"), ("domain", "<u2")])


class Batch(NamedTuple):
    """Rows for one step, on the CPU."""

    ids_BT: Tensor          # int64
    targets_BT: Tensor      # int64: the next token; IGNORE where there is none in the document, or it is masked
    doc_ids_BT: Tensor      # int32: 0, 1, ... along each row, a new number for each document
    bytes: int              # bytes of UTF-8 text that the targets stand for
    documents: tuple[np.ndarray, ...] = ()  # a row's: the TokenFile's number of each doc_id's document; -1: padding


class TokenFile:
    """The tokens of one part (train or heldout) of a prepared folder, memory-mapped; each document is
    <|bos|> text <|eos|>.

    mask_N: uint8, 1 where the token is one that a model must learn to write; None: all are.
    """

    def __init__(self, folder: Path, part: str) -> None:
        self.folder, self.part = Path(folder), part
        manifest = json.loads((self.folder / "manifest.json").read_text(encoding="utf-8"))
        self.counts = manifest["parts"][part]
        self.domains: list[str] = manifest["domains"]
        self.token_bytes_V = np.load(self.folder / "token_bytes.npy")
        self.tokens_N = self._mapped(f"{part}.bin", manifest["dtype"])
        mask = f"{part}.mask.bin"
        self.mask_N = self._mapped(mask, "u1") if (self.folder / mask).exists() else None
        index = self.folder / f"{part}.documents.npy"
        documents = np.load(index, mmap_mode="r" if index.stat().st_size > AT_ONCE else None)
        self.bytes_D, self.domain_D = np.asarray(documents["bytes"]), np.asarray(documents["domain"])
        self.end_D = filled(len(documents), lambda some: documents["end"][some], self.folder)
        self.start_D = filled(len(documents), lambda some: np.append(
            self.end_D[some.start - 1] if some.start else 0, self.end_D[some.start:some.stop - 1]), self.folder)

    def _mapped(self, name: str, dtype: str) -> np.ndarray:
        """A file with one entry for each token."""
        path, expected = self.folder / name, self.counts["tokens"] * np.dtype(dtype).itemsize
        found = path.stat().st_size if path.exists() else 0
        if found != expected:
            raise UserError(f"{path}: {found} bytes where the manifest says {expected}; delete {self.folder} "
                            "and prepare the data again")
        return np.asarray(np.memmap(path, dtype=dtype, mode="r"))

    def __len__(self) -> int:
        return len(self.tokens_N)

    def names(self, documents: Sequence[int]) -> list[str]:
        """The ids of documents by their numbers."""
        wanted, found = set(documents), {}
        with open(self.folder / f"{self.part}.ids.jsonl", encoding="utf-8") as lines:
            for number, line in enumerate(lines):
                if number in wanted:
                    found[number] = json.loads(line)
        return [found[number] for number in documents]

    def describe(self, rows: Sequence[np.ndarray], most: int = 5) -> str:
        """The documents of a batch in words: "the documents a, b, c and 4 more"."""
        numbers = list(dict.fromkeys(int(number) for row in rows for number in row if number >= 0))
        more = f" and {len(numbers) - most} more" if len(numbers) > most else ""
        return f"the document{'s' if len(numbers) > 1 else ''} {', '.join(self.names(numbers[:most]))}{more}"

    def choose(self, domains: Sequence[str] | None, documents: np.ndarray | None = None) -> np.ndarray:
        """The numbers of the documents of these domains (None: all), and of them only those that are among `documents`
        (None: all), in the file's order."""
        unknown = [domain for domain in domains or () if domain not in self.domains]
        if unknown:
            raise UserError(f"the corpus has no domain {unknown[0]!r}; it has: {', '.join(self.domains)}")
        wanted = None if domains is None else [self.domains.index(domain) for domain in domains]
        among_D = None
        if documents is not None:
            among_D = np.zeros(len(self.end_D), dtype=bool)
            for some in slices(len(documents)):
                among_D[documents[some]] = True

        def chosen(some: slice) -> np.ndarray:
            found = np.ones(some.stop - some.start, dtype=bool)
            if wanted is not None:
                found &= np.isin(self.domain_D[some], wanted)
            return found if among_D is None else found & among_D[some]

        return numbers(len(self.end_D), chosen, self.folder)

    def lengths(self, documents: np.ndarray) -> np.ndarray:
        """Tokens of these documents: int64."""
        return self.end_D[documents] - self.start_D[documents]

    def size_of(self, documents: np.ndarray) -> int:
        """Tokens of these documents together."""
        return sum(int(self.lengths(documents[some]).sum()) for some in slices(len(documents)))


class Piece(NamedTuple):
    """Tokens of an epoch that follow one another in it."""

    epoch: int
    start: int
    end: int


#: where a stream stands: {"epoch", "start": tokens of it that were delivered before it began, "rows": [[T, rows], ...]
#: delivered since}; {} at the beginning
StreamState = Mapping[str, Any]


class PackedStream:
    """The endless training stream of a part's documents, or of some of them."""

    def __init__(self, tokens: TokenFile, seed: int, domains: Sequence[str] | None = None,
                 documents: np.ndarray | None = None) -> None:
        """domains, documents: only these domains, and of them only the documents of these numbers, each once;
        None: all. Raises UserError when that leaves nothing."""
        self.tokens, self.seed = tokens, seed
        self.chosen = tokens.choose(domains, documents)
        self.tokens_per_epoch = tokens.size_of(self.chosen)
        if self.tokens_per_epoch == 0:
            among = "" if documents is None else f" among the {len(documents)} documents asked for"
            raise UserError(f"no training text in the domains {', '.join(domains or tokens.domains)}{among}")
        self._epoch = functools.lru_cache(maxsize=2)(self._order_of)
        self._row_order = functools.lru_cache(maxsize=2)(functools.partial(permutation, folder=tokens.folder))
        # the last answer of `_left`: of which epoch, start and cuts, and what was left
        self._known_left: tuple[Any, Runs | None] = ((-1, 0, ()), None)

    def _order_of(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The documents in an epoch's order, and where in the epoch each ends."""
        folder = self.tokens.folder
        order = permutation(len(self.chosen), self.seed, epoch, folder)
        documents = filled(len(order), lambda some: self.chosen[order[some]], folder)
        return documents, sums(len(order), lambda some: self.tokens.lengths(documents[some]), folder)

    # --- which tokens come next ---

    def at(self, position: int, context_length: int) -> StreamState:
        """The state after `position` tokens in rows of `context_length`."""
        row = position // context_length
        epoch = row * context_length // self.tokens_per_epoch
        first = -(-epoch * self.tokens_per_epoch // context_length)     # the first row that begins in this epoch
        return {"epoch": epoch, "start": first * context_length - epoch * self.tokens_per_epoch,
                "rows": [[context_length, row - first]]}

    def take(self, state: StreamState, rows: int, context_length: int,
             made: slice = slice(None)) -> tuple[Batch, StreamState]:
        """Of the `rows` rows that come after a state those that are to be `made`, and the state after all of them."""
        found, wanted = [], range(rows)[made]
        for number in range(rows):
            pieces, state = self.next_row(state, context_length)
            found += [pieces] if number in wanted else []
        return self.rows(found, context_length), state

    def batch(self, position: int, rows: int, context_length: int, made: slice = slice(None)) -> Batch:
        """Of the `rows` rows that are delivered from `position` (in tokens) on, where all rows are of one length, those
        that are to be `made`."""
        return self.take(self.at(position, context_length), rows, context_length, made)[0]

    def next_row(self, state: StreamState, context_length: int) -> tuple[list[Piece], StreamState]:
        """The pieces of the epoch that make up the next row, and the state after it."""
        epoch, start = state.get("epoch", 0), state.get("start", 0)
        rows = [list(cut) for cut in state.get("rows", ())]
        if not rows or rows[-1][0] != context_length:
            rows = [cut for cut in rows if cut[1]] + [[context_length, 0]]
        left_at, left_end = self._left(epoch, start, tuple(map(tuple, rows[:-1])))
        total, done = int(left_end[-1]) if len(left_end) else 0, rows[-1][1]
        if done < total // context_length:
            rows[-1][1] += 1
            place = int(self._row_order(total // context_length, self.seed + len(rows), epoch)[done])
            pieces = _pieces(epoch, left_at, left_end, place * context_length, (place + 1) * context_length)
            return pieces, {"epoch": epoch, "start": start, "rows": rows}
        # what is left is shorter than a row; the next epoch begins in it
        pieces = _pieces(epoch, left_at, left_end, done * context_length, total)
        missing = context_length - (total - done * context_length)
        while missing > 0:
            epoch, start = epoch + 1, min(missing, self.tokens_per_epoch)
            pieces.append(Piece(epoch, 0, start))
            missing -= start
        return pieces, {"epoch": epoch, "start": start, "rows": []}

    def _left(self, epoch: int, start: int, cuts: tuple[tuple[int, int], ...]) -> Runs:
        """What of an epoch was not delivered. cuts: (length, rows delivered) from its `start` on."""
        known, found = self._known_left
        if found is None or known[:2] != (epoch, start) or cuts[:len(known[2])] != known[2]:
            known, found = (epoch, start, ()), (np.array([start]), np.array([self.tokens_per_epoch - start]))
        for number in range(len(known[2]), len(cuts)):
            length, rows = cuts[number]
            order = self._row_order(int(found[1][-1] if len(found[1]) else 0) // length, self.seed + number + 1, epoch)
            found = without(found, length, order[:rows], self.tokens.folder)
        self._known_left = (epoch, start, cuts), found
        return found

    # --- the tokens ---

    def run(self, position: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """`count` tokens of the stream from `position` on, and for each the number of its document in the file. int64
        [N] both."""
        pieces = []
        while count:
            epoch, start = divmod(position, self.tokens_per_epoch)
            end = min(start + count, self.tokens_per_epoch)
            pieces.append(Piece(epoch, start, end))
            position, count = position + end - start, count - (end - start)
        found = self.stretches(pieces)
        return self.tokens.tokens_N[found.places()].astype(np.int64), found.document_S.repeat(found.size_S)

    def stretches(self, pieces: Sequence[Piece]) -> Stretches:
        """Where in the file these pieces stand, which come in the order of their epochs."""
        epoch_P, begin_P, end_P = np.array(pieces).T
        return joined_stretches([
            stretches(self.tokens.end_D, *self._epoch(epoch), begin_P[epoch_P == epoch], end_P[epoch_P == epoch])
            for epoch in dict.fromkeys(epoch_P.tolist())])

    def rows(self, rows: Sequence[Sequence[Piece]], context_length: int) -> Batch:
        """The rows that are made of these pieces each; each row's come after those of the one before."""
        if not rows:
            return joined([], context_length)
        found = self.stretches([piece for row in rows for piece in row])
        row_P = np.arange(len(rows)).repeat([len(row) for row in rows])
        return _rows(self.tokens, found, row_P[found.piece_S], len(rows), context_length)


def _pieces(epoch: int, left_at: np.ndarray, left_end: np.ndarray, begin: int, end: int) -> list[Piece]:
    """The part `begin` to `end` of what is left of an epoch, see `PackedStream._left`."""
    pieces, run = [], int(np.searchsorted(left_end, begin, side="right"))
    while begin < end:
        before = int(left_end[run - 1]) if run else 0
        taken = min(end, int(left_end[run])) - begin
        start = int(left_at[run]) + begin - before
        pieces.append(Piece(epoch, start, start + taken))
        begin, run = begin + taken, run + 1
    return pieces


class HeldOut:
    """The held-out part in a fixed order: every token is in exactly one row.

    Bits per byte are `sum of the targets' nats / ln 2 / sum of Batch.bytes`. The end of a document is a
    target that stands for no byte: a model pays for it, as for saying where a text ends.
    """

    def __init__(self, tokens: TokenFile, domains: Sequence[str] | None = None) -> None:
        self.tokens = tokens
        self.chosen = tokens.choose(domains)
        self.end_D = sums(len(self.chosen), lambda some: tokens.lengths(self.chosen[some]), tokens.folder)
        self.length = int(self.end_D[-1]) if len(self.end_D) else 0

    def rows(self, context_length: int) -> int:
        return -(-self.length // context_length)

    def batches(self, rows: int, context_length: int, max_rows: int | None = None) -> Iterator[Batch]:
        """The part in batches of `rows` rows (the last may have fewer); with `max_rows`, only so many rows,
        spread evenly over it.

        The last row is filled up with <|pad|>, whose targets are IGNORE.
        """
        total = self.rows(context_length)
        taken = range(total)
        if max_rows is not None and max_rows < total:
            taken = [number * total // max_rows for number in range(max_rows)]
        for first in range(0, len(taken), rows):
            begin_P = np.array(taken[first:first + rows]) * context_length
            found = stretches(self.tokens.end_D, self.chosen, self.end_D, begin_P,
                              np.minimum(begin_P + context_length, self.length))
            yield _rows(self.tokens, found, found.piece_S, len(begin_P), context_length)


def _rows(tokens: TokenFile, found: Stretches, row_S: np.ndarray, rows: int, context_length: int) -> Batch:
    """The rows that these stretches make up; what is missing at the end of the last is padding. What a token's target
    is, the token behind it in the file says."""
    import torch

    last_S, behind_S = np.cumsum(found.size_S) - 1, found.place_S + found.size_S
    count = int(last_S[-1]) + 1
    ids_M, targets_M = np.zeros(rows * context_length, dtype=np.int64), np.full(rows * context_length, IGNORE)
    ids_N, targets_N = ids_M[:count], targets_M[:count]
    places_N = found.places()
    ids_N[:] = tokens.tokens_N[places_N]
    targets_N[:-1] = ids_N[1:]
    targets_N[last_S] = tokens.tokens_N[np.minimum(behind_S, len(tokens) - 1)]
    wanted_N = np.ones(count, dtype=bool)
    wanted_N[last_S] = behind_S < tokens.end_D[found.document_S]
    if tokens.mask_N is not None:
        wanted_N &= tokens.mask_N[np.minimum(places_N + 1, len(tokens) - 1)] != 0
    size = int(tokens.token_bytes_V[targets_N[wanted_N]].sum(dtype=np.int64))
    targets_N[~wanted_N] = IGNORE
    # a new number for each document, and where something is missing in between
    first_S = np.append(True, row_S[1:] != row_S[:-1])
    begins_S = first_S | np.append(True, (found.document_S[1:] != found.document_S[:-1])
                                   | (found.place_S[1:] != behind_S[:-1]))
    number_S = np.cumsum(begins_S) - 1
    starts = number_S[first_S]
    numbers_M = np.empty(rows * context_length, dtype=np.int32)
    numbers_M[:count] = (number_S - starts[row_S]).repeat(found.size_S)
    numbers_M[count:] = number_S[-1] - starts[-1] + 1
    documents = np.split(found.document_S[begins_S], starts[1:])
    if count < len(numbers_M):
        documents[-1] = np.append(documents[-1], -1)
    ids_BT, targets_BT, doc_ids_BT = (torch.from_numpy(all_M.reshape(rows, context_length))
                                      for all_M in (ids_M, targets_M, numbers_M))
    return Batch(ids_BT, targets_BT, doc_ids_BT, size, tuple(documents))


def joined(batches: Sequence[Batch], context_length: int = 0) -> Batch:
    """The rows of several batches as one; of none, no row of so many tokens."""
    import torch

    if len(batches) == 1:
        return batches[0]
    if not batches:
        ids_BT = torch.empty(0, context_length, dtype=torch.int64)
        return Batch(ids_BT, ids_BT.clone(), ids_BT.to(torch.int32), 0)
    ids, targets, docs, sizes, documents = zip(*batches, strict=True)
    return Batch(torch.cat(ids), torch.cat(targets), torch.cat(docs), sum(sizes), sum(documents, ()))


def rows_of(batch: Batch, part: slice) -> Batch:
    """Some rows of a batch. `bytes` stays that of all: of a part nobody asks it."""
    return batch._replace(ids_BT=batch.ids_BT[part], targets_BT=batch.targets_BT[part],
                          doc_ids_BT=batch.doc_ids_BT[part], documents=batch.documents[part])
