"""The token files of a collection's two parts, written a megabyte of text at a time: while one is tokenised, on all
cores, the one before is written. What is known of a document goes to the disk at once. Loads no torch."""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tryplicity.data.documents import Collection
from tryplicity.data.packing import DOCUMENT
from tryplicity.data.tokenizer import token_bytes
from tryplicity.data.vocabulary import size_of, vocabulary_of
from tryplicity.progress import Progress

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from tryplicity.components import Document

FORMAT = 2                          # raise when the files written here change
_BATCH_BYTES = 1_000_000            # of text tokenised at a time, which takes some hundred times as much memory


class Encoded(NamedTuple):
    """One document as it enters a token file."""

    ids: list[int]
    bytes: int                      # of the text that is to be learnt
    mask: list[int] | None = None   # 1 where a token is one to learn to write; None: all are


Encode = Callable[["Tokenizer", "list[Document]"], Iterable[Encoded]]


def encode_texts(tokenizer: Tokenizer, documents: list[Document]) -> Iterator[Encoded]:
    vocabulary = vocabulary_of(tokenizer)
    encodings = tokenizer.encode_batch_fast([d.text for d in documents], add_special_tokens=False)
    for document, encoding in zip(documents, encodings, strict=True):
        yield Encoded([vocabulary.bos, *encoding.ids, vocabulary.eos], len(document.text.encode()))


def write_tokens(collection: Collection, tokenizer: Tokenizer, folder: Path, progress: Progress,
                 encode: Encode = encode_texts) -> None:
    """Write the token files of both parts and the manifest into `folder`, and {part}.mask.bin (uint8, one a token)
    where `encode` gives masks."""
    tokenizer.encode_special_tokens = True     # "<|eos|>" written in a document is text, not the end of it
    vocab_size = size_of(tokenizer)
    dtype = "<u2" if vocab_size <= 65536 else "<u4"
    domains = list(collection.manifest["domains"])
    np.save(folder / "token_bytes.npy", np.array(token_bytes(tokenizer), dtype=np.uint32))
    total, done, parts = collection.manifest["bytes"], 0, {}
    for part in ("train", "heldout"):
        with _Part(folder, part, dtype, domains) as written:
            for documents, found in _ahead(encode, tokenizer, collection.documents(held_out=part == "heldout")):
                written.add(documents, found)
                done += sum(len(document.text.encode()) for document in documents)
                progress("tokenising", done, total)
        parts[part] = written.counts()
    manifest = {"format": FORMAT, "documents": collection.identity, "vocab_size": vocab_size, "dtype": dtype,
                "domains": domains, "parts": parts,
                "tokenizer_sha256": hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()}
    manifest["identity"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")


class _Part:
    """One part's files."""

    def __init__(self, folder: Path, part: str, dtype: str, domains: list[str]) -> None:
        self.folder, self.part, self.dtype, self.domains = folder, part, dtype, domains
        self.digest, self.mask_digest = hashlib.sha256(), None
        self.sums = {domain: {"documents": 0, "tokens": 0, "bytes": 0} for domain in domains}
        self.end = 0

    def __enter__(self) -> _Part:
        self.files = contextlib.ExitStack()
        self.tokens, self.index, self.ids = map(self._open, ("bin", "index", "ids.jsonl"))
        self.mask: Any = None
        return self

    def _open(self, what: str) -> Any:
        return self.files.enter_context(open(self.folder / f"{self.part}.{what}", "wb"))

    def add(self, documents: list[Document], found: list[Encoded]) -> None:
        sizes = np.array([len(encoded.ids) for encoded in found], dtype=np.int64)
        tokens = np.fromiter((i for encoded in found for i in encoded.ids), dtype=self.dtype, count=int(sizes.sum()))
        self.tokens.write(tokens.data)
        self.digest.update(tokens.data)
        for encoded in found:
            if encoded.mask is not None:
                if self.mask is None:
                    self.mask, self.mask_digest = self._open("mask.bin"), hashlib.sha256()
                self.mask.write(bytes(encoded.mask))
                self.mask_digest.update(bytes(encoded.mask))
        table = np.zeros(len(found), dtype=DOCUMENT)
        table["end"] = self.end + np.cumsum(sizes)
        table["bytes"] = [encoded.bytes for encoded in found]
        table["domain"] = [self.domains.index(document.domain) for document in documents]
        self.index.write(table.tobytes())
        self.end += len(tokens)
        self.ids.write("".join(json.dumps(document.id) + "\n" for document in documents).encode())
        for document, size, encoded in zip(documents, sizes.tolist(), found, strict=True):
            counts = self.sums[document.domain]
            counts["documents"] += 1
            counts["tokens"] += size
            counts["bytes"] += encoded.bytes

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.files.close()
        if kind is None:        # the index becomes an array's file
            index = self.folder / f"{self.part}.index"
            size = index.stat().st_size
            table = np.memmap(index, DOCUMENT, "r") if size else np.zeros(0, dtype=DOCUMENT)
            np.save(self.folder / f"{self.part}.documents.npy", table)
            index.unlink()

    def counts(self) -> dict[str, Any]:
        whole = {what: sum(counts[what] for counts in self.sums.values()) for what in ("documents", "tokens", "bytes")}
        counts = {**whole, "sha256": self.digest.hexdigest(), "domains": self.sums}
        return counts if self.mask_digest is None else {**counts, "mask_sha256": self.mask_digest.hexdigest()}


def _ahead(encode: Encode, tokenizer: Tokenizer, documents: Iterable[Document],
           ) -> Iterator[tuple[list[Document], list[Encoded]]]:
    """The documents and what they become, a batch after the other; each is begun before the one before is given."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        before = None
        for batch in _batches(documents):
            task = pool.submit(lambda batch=batch: list(encode(tokenizer, batch)))
            if before is not None:
                yield before[0], before[1].result()
            before = batch, task
        if before is not None:
            yield before[0], before[1].result()


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
