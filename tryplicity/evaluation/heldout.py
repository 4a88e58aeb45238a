"""The text that a model is measured on, fixed by hash: a run's own held-out documents, or those of another source."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tryplicity.components import Document
from tryplicity.data import parse_source, prepare
from tryplicity.data.cache import cache_root
from tryplicity.data.documents import Collection, collect
from tryplicity.data.packing import TokenFile
from tryplicity.data.prepared import Prepared
from tryplicity.data.token_files import write_tokens
from tryplicity.errors import UserError
from tryplicity.progress import Progress
from tryplicity.run import Run


@dataclass(frozen=True)
class Training:
    """What a run was trained on, as far as it can be read here. same: whether it is what it was at training."""

    prepared: Prepared
    source: str
    same: bool


@dataclass(frozen=True)
class Measured:
    """Held-out documents and their tokens. share: of the source's documents, chosen by their hash; None: those that the
    run held out itself."""

    source: str
    collection: Collection
    tokens: TokenFile
    share: float | None

    def texts(self, domain: str | None = None) -> Iterator[str]:
        """The documents' texts in the source's order: all, or of one domain."""
        for document in self.collection.documents(held_out=True):
            if domain in (None, document.domain):
                yield document.text

    def identity(self) -> str:
        """The SHA-256 of the texts, each behind its number of bytes: figures of one identity can be compared."""
        digest = hashlib.sha256()
        for text in self.texts():
            encoded = text.encode()
            digest.update(len(encoded).to_bytes(8, "little"))
            digest.update(encoded)
        return digest.hexdigest()


class _Chosen(Collection):
    """A source's documents of which none is trained on: what its hash does not choose is left alone."""

    def documents(self, held_out: bool | None = None) -> Iterator[Document]:
        return iter(()) if held_out is False else super().documents(held_out=True)


def run_of(what: Path) -> Run | None:
    """The run folder that a model belongs to: itself, or the one that a checkpoint or an exported file lies in."""
    for folder in (what, what.resolve().parent, what.resolve().parent.parent):
        if folder.is_dir() and Run(folder).exists():
            return Run(folder)
    return None


def training_of(run: Run, vocab_size: int, registry: Any, progress: Progress) -> Training:
    """What the run was trained on, with the run's tokenizer. Raises UserError where nothing says it, or where it cannot
    be read any more."""
    try:
        said = json.loads(run.data.read_text(encoding="utf-8"))
        source, fingerprint = said["source"], said["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{run.data}: does not say what the run was trained on; give --data SOURCE") from None
    prepared = prepare(parse_source(registry, source, f"{run.data} (source)"), vocab_size, progress=progress,
                       tokenizer=run.tokenizer)
    return Training(prepared, source, prepared.identity == fingerprint)


def own(training: Training) -> Measured:
    """The documents that the run held out."""
    return Measured(str(training.source), training.prepared.collection, training.prepared.heldout, None)


@contextmanager
def other(source: str, share: float, tokenizer: Any, registry: Any, progress: Progress) -> Iterator[Measured]:
    """The documents of another source: those whose hash is below `share`, which with the source of a training and a
    share up to 0.02 are documents that it held out; 1: all. The tokens are gone afterwards.

    Raises UserError where there are none.
    """
    found = collect(parse_source(registry, source, "--data"), cache_root(), progress, single=True)
    chosen = _Chosen(found.folder, {**found.manifest, "held_out_below": share}, found.left_out)
    with tempfile.TemporaryDirectory(prefix="tryplicity-eval-") as name:
        folder = Path(name)
        (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
        write_tokens(chosen, tokenizer, folder, progress)
        if not json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["parts"]["heldout"]["tokens"]:
            raise UserError(f"--share {share:g}: of {found.manifest['documents']:,} documents of {source} none has so "
                            "low a hash; give more")
        yield Measured(source, chosen, TokenFile(folder, "heldout"), share)

