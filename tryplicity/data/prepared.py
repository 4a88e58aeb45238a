"""From a source to token files: read once, split, tokenise; kept in the cache and found there the next time.

In the cache: sources/<key>.json (which documents a source gave), documents/<key>/ (their text), tokenizers/<key>/
(trained on the training part) and tokens/<key>/ (what a training run reads). All keys but the first are made of the
content:

    tokenizer.json           train.bin, heldout.bin                        uint16 (uint32 above 65536 tokens)
    manifest.json            train.documents.npy, heldout.documents.npy    each document's end, bytes, domain
    token_bytes.npy          train.ids.jsonl, heldout.ids.jsonl            each document's id
    bigram.json  yardsticks-1.json  train.grades-1.npy                     made when first asked for

Memory is bounded by what a few megabytes of text take. Loads no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tryplicity.data import bigram, grades, yardsticks
from tryplicity.data.cache import building, cache_root
from tryplicity.data.documents import Collection, collect, unit_hash
from tryplicity.data.packing import HeldOut, PackedStream, TokenFile
from tryplicity.data.token_files import FORMAT, write_tokens
from tryplicity.data.tokenizer import load_tokenizer, save_tokenizer, tokenizer_files, train_tokenizer
from tryplicity.data.vocabulary import CONFIG
from tryplicity.data.yardsticks import Yardsticks
from tryplicity.files import whole_file, write_text
from tryplicity.leftout import LeftOut
from tryplicity.progress import Progress, no_progress

if TYPE_CHECKING:
    from tryplicity.components import Source

_SAMPLE_BYTES = 8_000_000           # the tokenizer is trained on at least so much, where there is so much


@dataclass(frozen=True)
class Prepared:
    """A source ready to train on."""

    folder: Path
    collection: Collection
    manifest: dict[str, Any]

    @property
    def tokenizer_path(self) -> Path:
        return self.folder / "tokenizer.json"

    @property
    def tokenizer_config(self) -> str | None:
        """What stands beside the tokenizer of a published model."""
        path = self.folder / CONFIG
        return path.read_text(encoding="utf-8") if path.is_file() else None

    @property
    def identity(self) -> str:
        """Names exactly these tokens; a run that goes on must find the same."""
        return self.manifest["identity"]

    @property
    def left_out(self) -> LeftOut:
        """What was passed over when the source was read; to be said whenever this is used."""
        return self.collection.left_out

    @cached_property
    def train(self) -> TokenFile:
        return TokenFile(self.folder, "train")

    @cached_property
    def heldout(self) -> TokenFile:
        return TokenFile(self.folder, "heldout")

    def stream(self, seed: int, domains: list[str] | None = None) -> PackedStream:
        """The training rows."""
        return PackedStream(self.train, seed, domains)

    def held_out(self, domains: list[str] | None = None) -> HeldOut:
        """The rows a model is measured on."""
        return HeldOut(self.heldout, domains)

    def grades(self, progress: Progress = no_progress) -> np.ndarray:
        """How hard each training document reads, as a school grade (see `tryplicity.data.grades`): float32
        [documents], NaN where nobody can say. Computed once, then kept in the folder."""
        path = self.folder / f"train.grades-{grades.FORMAT}.npy"
        if not path.exists():
            values_D = grades.grades(self.collection.documents(held_out=False), progress, len(self.train.end_D))
            with whole_file(path) as temporary, open(temporary, "wb") as file:
                np.save(file, values_D)
        return np.load(path, mmap_mode="r")

    def bigram_bits_per_byte(self, progress: Progress = no_progress) -> float:
        """Bits per byte, on the held-out text, of a byte-bigram model fitted on the training text.

        Computed once, then kept in the folder.
        """
        path = self.folder / "bigram.json"
        if not path.exists():
            def texts(held_out: bool) -> Iterator[bytes]:
                size = self.collection.manifest["bytes"]
                done = 0
                for document in self.collection.documents(held_out):
                    yield document.text.encode()
                    done += len(document.text)
                    if not held_out:
                        progress("fitting the byte-bigram reference", done, size)

            value = bigram.bits_per_byte(texts(False), texts(True))
            write_text(path, json.dumps({"bits_per_byte": value}))
        return json.loads(path.read_text(encoding="utf-8"))["bits_per_byte"]

    def yardsticks(self, progress: Progress = no_progress) -> Yardsticks:
        """What compressors reach on the held-out text, beside the bigram, and how much of it the training text holds
        (see `tryplicity.data.yardsticks`). Computed once, in seconds, then kept in the folder."""
        path = self.folder / f"yardsticks-{yardsticks.FORMAT}.json"
        if not path.exists():
            sizes = [sum(part["bytes"] for part in self.manifest["parts"][name]["domains"].values())
                     for name in ("train", "heldout")]
            scored = "".join(self.sample(True, yardsticks.SCORED, sizes[1])).encode()
            primed = "".join(self.sample(False, yardsticks.PRIMED, sizes[0])).encode()
            bigram_bits = self.bigram_bits_per_byte(progress)
            what, done, whole = "measuring the yardsticks", 0, min(yardsticks.COMPARED, sizes[0])
            progress(what, 0, None)

            def told(text: str) -> None:
                nonlocal done
                done += len(text.encode())
                progress(what, done, whole)

            overlap = yardsticks.overlap((d.text for d in self.collection.documents(True)),
                                         self.sample(False, yardsticks.COMPARED, sizes[0]), told)
            found = Yardsticks(bigram=bigram_bits, xz=yardsticks.xz_bits_per_byte(scored),
                               xz_primed=yardsticks.xz_bits_per_byte(scored, primed),
                               ppm=yardsticks.ppm_bits_per_byte(scored, primed), overlap=overlap,
                               primed_bytes=len(primed), scored_bytes=len(scored), compared_bytes=done,
                               train_bytes=sizes[0])
            write_text(path, json.dumps(asdict(found), indent=1))
        return Yardsticks(**json.loads(path.read_text(encoding="utf-8")))

    def sample(self, held_out: bool, most: int, size: int) -> Iterator[str]:
        """The texts of a part, or where it has more bytes than `most` an even choice of them of about so many."""
        for document in self.collection.documents(held_out):
            if size <= most or unit_hash(document.id, "yardsticks") < most / size:
                yield document.text


def prepare(source: Source, vocab_size: int, cache: str | Path | None = None,
            progress: Progress | None = None, tokenizer: str | Path | None = None) -> Prepared:
    """The token files of a source, made now or found in the cache.

    cache: the cache folder; by default the source's own, else see `cache_root`. progress: called as
    progress(stage, done, total).
    tokenizer: the path of a tokenizer.json to use; None: one of `vocab_size` tokens is trained on the
    training part.

    Nothing is visible until it is complete; two processes may prepare the same at once. Raises UserError when
    the corpus is empty or too small, the tokenizer is unlike `vocab_size`, or the disk is full.
    """
    progress = progress or no_progress
    root = cache_root(cache or source.cache)
    if tokenizer is not None:
        load_tokenizer(tokenizer, vocab_size)
    collection = collect(source, root, progress)
    path = Path(tokenizer or trained_tokenizer(collection, vocab_size, root, progress))
    files = tokenizer_files(path)
    described = json.dumps([FORMAT, collection.identity,
                            *(hashlib.sha256(content).hexdigest() for content in files.values())])
    key = hashlib.sha256(described.encode()).hexdigest()
    folder = root / "tokens" / key[:24]
    if not folder.exists():
        with building(folder) as temporary:
            for name, content in files.items():
                (temporary / name).write_bytes(content)
            write_tokens(collection, load_tokenizer(path, vocab_size), temporary, progress)
    load_tokenizer(folder / "tokenizer.json", vocab_size)
    return Prepared(folder, collection, json.loads((folder / "manifest.json").read_text(encoding="utf-8")))


def trained_tokenizer(collection: Collection, vocab_size: int, root: Path, progress: Progress) -> Path:
    """The file of a tokenizer trained on the training part, made now or found in the cache."""
    folder = root / "tokenizers" / f"{collection.folder.name}-{vocab_size}-{FORMAT}"
    if not folder.exists():
        progress("training the tokenizer", 0, None)
        tokenizer = train_tokenizer(_sample(collection, max(_SAMPLE_BYTES, 1000 * vocab_size)), vocab_size)
        with building(folder) as temporary:
            save_tokenizer(tokenizer, temporary / "tokenizer.json")
    return folder / "tokenizer.json"


def _sample(collection: Collection, size: int) -> Iterator[str]:
    """About `size` bytes of the training part, an equal share of every domain as far as it has so much; the
    same documents each time."""
    available = {domain: counts["bytes"] for domain, counts in collection.manifest["domains"].items()}
    shares: dict[str, float] = {}
    for number, (domain, bytes_) in enumerate(sorted(available.items(), key=lambda item: item[1])):
        budget = (size - sum(shares[d] * available[d] for d in shares)) / (len(available) - number)
        shares[domain] = min(1.0, budget / bytes_)
    for document in collection.documents(held_out=False):
        if unit_hash(document.id, "tokenizer") < shares[document.domain]:
            yield document.text
