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
        self._row_order = functools.lru_cache(maxsize=2)(functools.partial(permutation, seed=seed + 1))

    def _order_of(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The documents in an epoch's order, and where in the epoch each ends."""
        order = permutation(len(self.chosen), self.seed, epoch)
        return self.chosen[order], np.cumsum(self.length_D[order])

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

    def batch(self, position: int, rows: int, context_length: int) -> Batch:
        """The `rows` rows that are delivered from `position` (in tokens) on."""
        return joined([self._row(start, context_length) for start in self.starts(position, rows, context_length)])

    def _row(self, start: int, context_length: int) -> Batch:
        places_N, docs_N = self._places(start, context_length + 1)
        epochs, in_epoch = np.divmod(np.arange(docs_N[0], docs_N[-2] + 1), len(self.chosen))
        documents = np.array([self._epoch(int(epoch))[0][place] for epoch, place in zip(epochs, in_epoch, strict=True)])
        return _row(self.tokens, places_N, docs_N, documents)


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
        part = slice(number * context_length, (number + 1) * context_length + 1)
        places_N, docs_N = (whole_N[part] for whole_N in self._all)
        missing, padding = context_length + 1 - len(places_N), len(self.chosen)
        docs_N = np.concatenate([docs_N, np.full(missing, padding)])
        documents = np.append(self.chosen, -1)[docs_N[0]:docs_N[-2] + 1]
        return _row(self.tokens, places_N, docs_N, documents)


def _row(tokens: TokenFile, places_N: np.ndarray, docs_N: np.ndarray, documents: np.ndarray) -> Batch:
    """One row out of T + 1 tokens that follow one another: where in the file each stands (those missing at the end
    are padding), numbers that rise by one from document to document, and the documents of the first T."""
    import torch

    ids_N = np.zeros(len(docs_N), dtype=np.int64)
    ids_N[:len(places_N)] = tokens.tokens_N[places_N]
    wanted_N = docs_N[1:] == docs_N[:-1]
    wanted_N[len(places_N) - 1:] = False
    if tokens.mask_N is not None:
        wanted_N[:len(places_N) - 1] &= tokens.mask_N[places_N[1:]] != 0
    targets_N = np.where(wanted_N, ids_N[1:], IGNORE)
    # numbered anew in each row
    doc_ids_N = (docs_N[:-1] - docs_N[0]).astype(np.int32)
    return Batch(ids_BT=torch.from_numpy(ids_N[None, :-1].copy()), targets_BT=torch.from_numpy(targets_N[None]),
                 doc_ids_BT=torch.from_numpy(doc_ids_N[None]),
                 bytes=int(tokens.token_bytes_V[ids_N[1:][wanted_N]].sum(dtype=np.int64)), documents=(documents,))


def joined(batches: Sequence[Batch]) -> Batch:
    """The rows of several batches as one."""
    import torch

    if len(batches) == 1:
        return batches[0]
    ids, targets, docs, sizes, documents = zip(*batches, strict=True)
    return Batch(torch.cat(ids), torch.cat(targets), torch.cat(docs), sum(sizes), sum(documents, ()))
