"""Rows of packed documents as a pure function of (seed, position).

Every epoch the documents of the training part are put in a new order and joined into one stream of tokens; the
stream is cut into rows of T tokens, and these are delivered in an order of their own, so that the rows of a batch
are of different documents even where documents are long. The only state of a training run is how many tokens were
delivered: any batch size or number of ranks goes on from there with the same rows. Rank r of W that takes R rows of
T tokens a step asks for `batch(position + r * R * T, R, T)` and all of them go on at `position + W * R * T`. With
another T the rest of the epoch is cut anew.

Shapes: B rows, T time (tokens of a row), N tokens in a run of the stream.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tryplicity.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

IGNORE = -100   # the target of a position that has none; the same as tryplicity.IGNORE
DOCUMENT = np.dtype([("end", "<u8"), ("bytes", "<u8"), ("domain", "u1")])


class Batch(NamedTuple):
    """Rows for one step, on the CPU."""

    ids_BT: Tensor          # int64
    targets_BT: Tensor      # int64: the next token; IGNORE where that belongs to another document or to none
    doc_ids_BT: Tensor      # int32: 0, 1, ... along each row, a new number for each document
    bytes: int              # bytes of UTF-8 text that the targets stand for


class TokenFile:
    """The tokens of one part (train or heldout) of a prepared folder, memory-mapped; each document is
    <|bos|> text <|eos|>."""

    def __init__(self, folder: Path, part: str) -> None:
        self.folder, self.part = Path(folder), part
        manifest = json.loads((self.folder / "manifest.json").read_text(encoding="utf-8"))
        self.counts = manifest["parts"][part]
        self.domains: list[str] = manifest["domains"]
        self.token_bytes_V = np.load(self.folder / "token_bytes.npy")
        path, dtype = self.folder / f"{part}.bin", np.dtype(manifest["dtype"])
        expected = self.counts["tokens"] * dtype.itemsize
        if not path.exists() or path.stat().st_size != expected:
            found = path.stat().st_size if path.exists() else 0
            raise UserError(f"{path}: {found} bytes where the manifest says {expected}; delete {self.folder} "
                            "and prepare the data again")
        self.tokens_N = np.memmap(path, dtype=dtype, mode="r")
        documents = np.load(self.folder / f"{part}.documents.npy")
        self.end_D = documents["end"].astype(np.int64)
        self.start_D = np.concatenate([[0], self.end_D[:-1]]).astype(np.int64)
        self.bytes_D = documents["bytes"].astype(np.int64)
        self.domain_D = documents["domain"]

    def __len__(self) -> int:
        return len(self.tokens_N)

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


class PackedStream:
    """The endless training stream of a part's documents, or of those of some domains."""

    def __init__(self, tokens: TokenFile, seed: int, domains: Sequence[str] | None = None) -> None:
        """Raises UserError when the chosen domains hold no document."""
        self.tokens, self.seed = tokens, seed
        self.chosen = tokens.choose(domains)
        self.length_D = (tokens.end_D - tokens.start_D)[self.chosen]
        self.tokens_per_epoch = int(self.length_D.sum())
        if self.tokens_per_epoch == 0:
            raise UserError(f"no training text in the domains {', '.join(domains or tokens.domains)}")
        self._epoch = functools.lru_cache(maxsize=2)(self._order_of)
        self._row_order = functools.lru_cache(maxsize=2)(functools.partial(permutation, seed=seed + 1))

    def _order_of(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The documents in an epoch's order, and where in the epoch each ends."""
        order = permutation(len(self.chosen), self.seed, epoch)
        return self.chosen[order], np.cumsum(self.length_D[order])

    def run(self, position: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """`count` tokens of the stream from `position` on, and for each the number of its document, counted
        along the stream from the beginning (a document is another one in each epoch). int64 [N] both."""
        ids_N, docs_N = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.int64)
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
                ids_N[done:done + taken] = self.tokens.tokens_N[start:start + taken]
                docs_N[done:done + taken] = epoch * len(order) + place
                done, offset, place = done + taken, offset + taken, place + 1
        return ids_N, docs_N

    def documents_in(self, position: int, count: int) -> list[str]:
        """The ids of the documents that `count` tokens from `position` on are of, in order."""
        found: list[int] = []
        end = position + count
        while position < end:
            epoch, offset = divmod(position, self.tokens_per_epoch)
            order, ends = self._epoch(epoch)
            last = min(offset + end - position, self.tokens_per_epoch)
            first_place, last_place = np.searchsorted(ends, [offset, last - 1], side="right")
            found += order[first_place:last_place + 1].tolist()
            position += last - offset
        wanted, names = set(found), {}
        with open(self.tokens.folder / f"{self.tokens.part}.ids.jsonl", encoding="utf-8") as lines:
            for number, line in enumerate(lines):
                if number in wanted:
                    names[number] = json.loads(line)
        return [names[number] for number in found]

    def starts(self, position: int, rows: int, context_length: int) -> list[int]:
        """Where in the stream the rows begin that are delivered from `position` on. The last row of an epoch may
        reach into the next epoch."""
        per_epoch = -(-self.tokens_per_epoch // context_length)
        starts = []
        for row in range(position // context_length, position // context_length + rows):
            epoch, place = divmod(row, per_epoch)
            place = int(self._row_order(per_epoch, epoch=epoch)[place])
            starts.append(epoch * self.tokens_per_epoch + place * context_length)
        return starts

    def describe(self, position: int, rows: int, context_length: int, most: int = 5) -> str:
        """The documents of those rows in words: "the documents a, b, c and 4 more"."""
        names = list(dict.fromkeys(name for start in self.starts(position, rows, context_length)
                                   for name in self.documents_in(start, context_length)))
        more = f" and {len(names) - most} more" if len(names) > most else ""
        return f"the document{'s' if len(names) > 1 else ''} {', '.join(names[:most])}{more}"

    def batch(self, position: int, rows: int, context_length: int) -> Batch:
        """The `rows` rows that are delivered from `position` (in tokens) on."""
        return _joined([_batch(*self.run(start, context_length + 1), 1, context_length, self.tokens.token_bytes_V)
                        for start in self.starts(position, rows, context_length)])


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
        pieces = [self.tokens.tokens_N[self.tokens.start_D[d]:self.tokens.end_D[d]] for d in self.chosen]
        ids_N = np.concatenate(pieces) if pieces else np.empty(0, self.tokens.tokens_N.dtype)
        return ids_N, np.repeat(np.arange(len(pieces)), [len(piece) for piece in pieces])

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
            yield _joined(parts)

    def _row(self, number: int, context_length: int) -> Batch:
        all_ids_N, all_docs_N = self._all
        start = number * context_length
        ids_N = all_ids_N[start:start + context_length + 1].astype(np.int64)
        docs_N = all_docs_N[start:start + context_length + 1]
        missing = context_length + 1 - len(ids_N)
        docs_N = np.concatenate([docs_N, np.full(missing, len(self.chosen))])
        ids_N = np.concatenate([ids_N, np.zeros(missing, dtype=np.int64)])
        batch = _batch(ids_N, docs_N, 1, context_length, self.tokens.token_bytes_V)
        batch.targets_BT[0, docs_N[:-1] == len(self.chosen)] = IGNORE
        return batch


def _batch(ids_N: np.ndarray, docs_N: np.ndarray, rows: int, context_length: int,
           token_bytes_V: np.ndarray) -> Batch:
    """Rows out of rows * context_length + 1 tokens that follow one another."""
    import torch

    shape = (rows, context_length)
    next_in_document_N = docs_N[1:] == docs_N[:-1]
    targets_N = np.where(next_in_document_N, ids_N[1:], IGNORE)
    docs_BT = docs_N[:-1].reshape(shape)
    # number them anew in each row; a document that has no token in a batch never lies between two that have
    doc_ids_BT = (docs_BT - docs_BT[:, :1]).astype(np.int32)
    return Batch(ids_BT=torch.from_numpy(ids_N[:-1].reshape(shape).copy()),
                 targets_BT=torch.from_numpy(targets_N.reshape(shape)),
                 doc_ids_BT=torch.from_numpy(doc_ids_BT),
                 bytes=int(token_bytes_V[ids_N[1:][next_in_document_N]].sum(dtype=np.int64)))


def _joined(batches: list[Batch]) -> Batch:
    import torch

    if len(batches) == 1:
        return batches[0]
    ids, targets, docs, sizes = zip(*batches, strict=True)
    return Batch(torch.cat(ids), torch.cat(targets), torch.cat(docs), sum(sizes))
