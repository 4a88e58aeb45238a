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

Shapes: B rows, T time (tokens of a row), N tokens in a run of the stream.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

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
        documents = np.load(self.folder / f"{part}.documents.npy")
        self.end_D = documents["end"].astype(np.int64)
        self.start_D = np.concatenate([[0], self.end_D[:-1]]).astype(np.int64)
        self.bytes_D = documents["bytes"].astype(np.int64)
        self.domain_D = documents["domain"]

    def _mapped(self, name: str, dtype: str) -> np.ndarray:
        """A file with one entry for each token."""
        path, expected = self.folder / name, self.counts["tokens"] * np.dtype(dtype).itemsize
        found = path.stat().st_size if path.exists() else 0
        if found != expected:
            raise UserError(f"{path}: {found} bytes where the manifest says {expected}; delete {self.folder} "
                            "and prepare the data again")
        return np.memmap(path, dtype=dtype, mode="r")

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

    def choose(self, domains: Sequence[str] | None) -> np.ndarray:
        """The numbers of the documents of these domains (None: all), in the file's order."""
        if domains is None:
            return np.arange(len(self.end_D))
        unknown = [domain for domain in domains if domain not in self.domains]
        if unknown:
            raise UserError(f"the corpus has no domain {unknown[0]!r}; it has: {', '.join(self.domains)}")
        return np.flatnonzero(np.isin(self.domain_D, [self.domains.index(domain) for domain in domains]))


def mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer on uint64: counters in, well-mixed numbers out, the same on every machine.

    Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (OOPSLA 2014).
    """
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    """The order of `size` documents in one epoch: int64, the same on every machine and numpy version."""
    key = mix(mix(np.array([seed % 2**64], dtype=np.uint64)) ^ np.array([epoch], dtype=np.uint64))
    return np.argsort(mix(np.arange(size, dtype=np.uint64) ^ key), kind="stable")


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
        self.chosen = tokens.choose(domains)
        if documents is not None:
            self.chosen = self.chosen[np.isin(self.chosen, documents)]
        self.length_D = (tokens.end_D - tokens.start_D)[self.chosen]
        self.tokens_per_epoch = int(self.length_D.sum())
        if self.tokens_per_epoch == 0:
            among = "" if documents is None else f" among the {len(documents)} documents asked for"
            raise UserError(f"no training text in the domains {', '.join(domains or tokens.domains)}{among}")
        self._epoch = functools.lru_cache(maxsize=2)(self._order_of)
        self._row_order = functools.lru_cache(maxsize=2)(permutation)
        # the last answer of `_left`: of which epoch, start and cuts, and what was left
        self._known_left: tuple[Any, Any] = ((-1, 0, ()), None)

    def _order_of(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The documents in an epoch's order, and where in the epoch each ends."""
        order = permutation(len(self.chosen), self.seed, epoch)
        return self.chosen[order], np.cumsum(self.length_D[order])

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
            found += [self.row(pieces)] if number in wanted else []
        return joined(found, context_length), state

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

    def _left(self, epoch: int, start: int, cuts: tuple[tuple[int, int], ...]) -> tuple[np.ndarray, np.ndarray]:
        """What of an epoch was not delivered, as runs of it: where each begins, and how many tokens there are up to
        its end. cuts: (length, rows delivered) from its `start` on."""
        known, found = self._known_left
        if known[:2] != (epoch, start) or cuts[:len(known[2])] != known[2]:
            known, found = (epoch, start, ()), (np.array([start]), np.array([self.tokens_per_epoch - start]))
        for number in range(len(known[2]), len(cuts)):
            found = self._without(epoch, *found, number + 1, *cuts[number])
        self._known_left = (epoch, start, cuts), found
        return found

    def _without(self, epoch: int, left_at: np.ndarray, left_end: np.ndarray, number: int, length: int,
                 delivered: int) -> tuple[np.ndarray, np.ndarray]:
        """What is left after so many rows of the cut of this number, 1, 2, ..."""
        total = int(left_end[-1]) if len(left_end) else 0
        kept = np.sort(self._row_order(total // length, self.seed + number, epoch)[delivered:]) * length
        kept = np.append(kept, total // length * length)        # and what is shorter than a row
        kept_end = np.append(kept[:-1] + length, total)
        # at these borders a piece can begin or end
        borders = np.unique(np.concatenate([[0], kept, kept_end, left_end]))
        begin, end = borders[:-1], borders[1:]
        is_kept = begin < kept_end[np.maximum(np.searchsorted(kept, begin, side="right") - 1, 0)]
        is_kept &= begin >= kept[0]
        begin, end = begin[is_kept], end[is_kept]
        run = np.searchsorted(left_end, begin, side="right")
        at = left_at[run] + begin - np.append(0, left_end)[run]
        new = np.append(True, at[1:] != (at + end - begin)[:-1])[:len(at)]      # runs that touch are one
        return at[new], np.cumsum(end - begin)[np.append(new[1:], True)[:len(at)]]

    # --- the tokens ---

    def run(self, position: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """`count` tokens of the stream from `position` on, and for each the number of its document, counted
        along the stream from the beginning (a document is another one in each epoch). int64 [N] both."""
        places_N, docs_N = self._places(position, count)
        return self.tokens.tokens_N[places_N].astype(np.int64), docs_N

    def _places(self, position: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """As `run`, with where in the file each token stands."""
        places_N, docs_N = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.int64)
        done = 0
        while done < count:
            epoch, offset = divmod(position + done, self.tokens_per_epoch)
            order, ends = self._epoch(epoch)
            place = int(np.searchsorted(ends, offset, side="right"))
            while done < count and place < len(order):
                document = order[place]
                end = self.tokens.end_D[document]
                start = end - (ends[place] - offset)
                taken = min(int(end - start), count - done)
                places_N[done:done + taken] = np.arange(start, start + taken)
                docs_N[done:done + taken] = epoch * len(order) + place
                done, offset, place = done + taken, offset + taken, place + 1
        return places_N, docs_N

    def row(self, pieces: list[Piece]) -> Batch:
        """The row that these pieces make up."""
        found = [self._places(piece.epoch * self.tokens_per_epoch + piece.start, piece.end - piece.start)
                 for piece in pieces]
        places_N, docs_N = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
        # a new number for each document, and where something is missing in between
        begins_N = np.append(True, (docs_N[1:] != docs_N[:-1]) | (places_N[1:] != places_N[:-1] + 1))
        epochs, in_epoch = np.divmod(docs_N[begins_N], len(self.chosen))
        documents = np.array([self._epoch(int(epoch))[0][place] for epoch, place in zip(epochs, in_epoch, strict=True)])
        return _row(self.tokens, places_N, np.cumsum(begins_N) - 1, documents)


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
        self.length = int((tokens.end_D - tokens.start_D)[self.chosen].sum())

    @functools.cached_property
    def _all(self) -> tuple[np.ndarray, np.ndarray]:
        """Where in the file each token stands, and of which of the chosen documents it is."""
        pieces = [np.arange(self.tokens.start_D[d], self.tokens.end_D[d]) for d in self.chosen]
        places_N = np.concatenate(pieces) if pieces else np.empty(0, np.int64)
        return places_N, np.repeat(np.arange(len(pieces)), [len(piece) for piece in pieces])

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
            parts = [self._row(number, context_length) for number in taken[first:first + rows]]
            yield joined(parts)

    def _row(self, number: int, context_length: int) -> Batch:
        part = slice(number * context_length, (number + 1) * context_length)
        places_N, docs_N = (whole_N[part] for whole_N in self._all)
        missing = context_length - len(places_N)
        documents = self.chosen[docs_N[0]:docs_N[-1] + 1]
        docs_N = np.append(docs_N - docs_N[0], np.full(missing, len(documents)))
        return _row(self.tokens, places_N, docs_N, np.append(documents, -1) if missing else documents)


def _row(tokens: TokenFile, places_N: np.ndarray, docs_T: np.ndarray, documents: np.ndarray) -> Batch:
    """One row: where in the file its tokens stand (those missing at the end are padding), a number for each document,
    0, 1, ..., and which these are. What a token's target is, the token behind it in the file says."""
    import torch

    ids_T, targets_T = np.zeros(len(docs_T), dtype=np.int64), np.full(len(docs_T), IGNORE)
    there, next_N = slice(len(places_N)), np.minimum(places_N + 1, len(tokens) - 1)
    ids_T[there] = tokens.tokens_N[places_N]
    wanted_N = places_N + 1 < tokens.end_D[documents[docs_T[there]]]
    if tokens.mask_N is not None:
        wanted_N &= tokens.mask_N[next_N] != 0
    targets_T[there][wanted_N] = tokens.tokens_N[next_N[wanted_N]]
    return Batch(ids_BT=torch.from_numpy(ids_T[None]), targets_BT=torch.from_numpy(targets_T[None]),
                 doc_ids_BT=torch.from_numpy(docs_T[None].astype(np.int32)),
                 bytes=int(tokens.token_bytes_V[targets_T[there][wanted_N]].sum(dtype=np.int64)),
                 documents=(documents,))


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
