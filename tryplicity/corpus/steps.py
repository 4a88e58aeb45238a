"""What happens to a raw shard, step by step; the same steps whoever runs them (see `filtering` and `blocks`).

    corpus/work/NAME-part-00000.npy         `sign`: signatures of a raw shard's documents
    corpus/work/NAME-part-00000.copies.npy  `settle`: which are copies: uint8 [N], 0 none, 1 to the letter, 2 nearly
    corpus/work/judges/NAME/                `settle`: what a judge makes once for the corpus
    corpus/work/floors.json                 `settle`: the least scores that `keep_top` came to
    corpus/work/NAME-part-00000.json        `write`: what became of a raw shard; there once its filtered shard is
    corpus/filtered/NAME-part-00000.parquet `write`: what is kept of it; none where nothing is
    corpus/filtered/manifest.json           `finish`: what the corpus is, file by file

A step that was done is recognised by its file, which is there whole or not at all.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tryplicity.corpus import deduplicate, shards
from tryplicity.corpus.download import State
from tryplicity.corpus.language import another_language
from tryplicity.corpus.panel import Panel, asked, loaded, named_seats, prepare_judges
from tryplicity.corpus.recipe import Recipe
from tryplicity.corpus.summary import Summary
from tryplicity.errors import UserError
from tryplicity.files import whole_file, write_text

if TYPE_CHECKING:
    import torch

    from tryplicity.components import Document, Verdict

SAMPLE = 2000  # documents that the score for `keep_top` is found on
COPIES = {1: "copies: the same text", 2: "copies: nearly the same text"}


@dataclass(frozen=True)
class Shard:
    """A raw shard and what belongs to it."""

    folder: Path  # of the corpus
    source: str
    raw: Path

    @property
    def key(self) -> str:
        return f"{self.source}-{self.raw.stem}"

    @property
    def signatures(self) -> Path:
        return self.folder / "work" / f"{self.key}.npy"

    @property
    def copies(self) -> Path:
        return self.folder / "work" / f"{self.key}.copies.npy"

    @property
    def summary(self) -> Path:
        return self.folder / "work" / f"{self.key}.json"

    @property
    def filtered(self) -> Path:
        return self.folder / "filtered" / f"{self.key}.parquet"

    def documents(self) -> Iterator[Document]:
        return (document for document, _ in shards.read_shard(self.raw))


@dataclass
class Item:
    """A document on its way, and why it is left out, if it is."""

    document: Document
    dropped: str = ""
    verdicts: dict[str, Verdict] = field(default_factory=dict)


def raw_shards(recipe: Recipe, folder: Path) -> list[Shard]:
    """In the recipe's order. Raises UserError for a download that is not done."""
    found = []
    for name in recipe.names():
        state = State.of(folder / "raw" / name)
        if not state.done:
            raise UserError(f"{folder}: {name} is not downloaded to the end; run the download again: tryplicity data "
                            f"download {folder / 'recipe.yaml'} --out {folder}")
        found += [Shard(folder, name, path) for path in shards.shards(folder / "raw" / name)[:state.shards]]
    return found


def sign(shard: Shard) -> None:
    deduplicate.write_signatures(shard.signatures, shard.documents())


def settle(recipe: Recipe, folder: Path, device: torch.device, say: Callable[[str], None]) -> None:
    """What only one process can do, between signing and judging: compare all shards, prepare the judges, find what
    `keep_top` comes to."""
    found = raw_shards(recipe, folder)
    if not all(shard.copies.exists() for shard in found):
        exact, near = deduplicate.copies([shard.signatures for shard in found], recipe.near_duplicates)
        for shard, exact_N, near_N in zip(found, exact, near, strict=True):
            with whole_file(shard.copies) as temporary, open(temporary, "wb") as file:
                np.save(file, np.where(exact_N, 1, np.where(near_N, 2, 0)).astype(np.uint8))
    prepare_judges(recipe, folder, say)
    _find_floors(recipe, folder, found, device)


def floors(folder: Path) -> dict[str, float]:
    """The least scores that `settle` found, by the judge's name."""
    path = folder / "work" / "floors.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _find_floors(recipe: Recipe, folder: Path, found: Sequence[Shard], device: torch.device) -> None:
    """For each judge with `keep_top`, the score that so many of a sample's documents reach. The sample: those that are
    no copies with the least hashes of their ids."""
    seats = {name: seat for name, seat in named_seats(recipe) if seat.keep_top is not None}
    if not seats or (folder / "work" / "floors.json").exists():
        return
    from tryplicity.data.documents import unit_hash

    def candidates() -> Iterator[tuple[float, str, Document]]:
        for shard in found:
            for document, copy in zip(shard.documents(), np.load(shard.copies), strict=True):
                if not copy:
                    yield unit_hash(document.id, "sample"), document.id, document

    sample = [document for *_, document in heapq.nsmallest(SAMPLE, candidates(), key=lambda entry: entry[:2])
              if another_language(document, recipe.languages) is None]
    least = {}
    for name, seat in seats.items():
        try:
            judge = loaded(name, seat, device, folder)
        except UserError:  # whether it can be done without is said when the panel sits
            continue
        scores = np.array([verdict.score for verdict in asked(judge, sample)])
        scores = scores[~np.isnan(scores)]
        least[name] = float(np.quantile(scores, 1 - seat.keep_top)) if len(scores) else float("nan")
    write_text(folder / "work" / "floors.json", json.dumps(least, indent=1, sort_keys=True))


# --- a shard's way: each step marks what it leaves out, and passes all on ---

def read(shard: Shard) -> list[Item]:
    return [Item(document) for document in shard.documents()]


def leave_out_copies(shard: Shard, items: Sequence[Item]) -> None:
    for item, copy in zip(items, np.load(shard.copies), strict=True):
        item.dropped = COPIES.get(int(copy), item.dropped)


def leave_out_languages(recipe: Recipe, items: Sequence[Item]) -> None:
    for item in items:
        if not item.dropped and (found := another_language(item.document, recipe.languages)):
            item.dropped = f"language: {found}"


def vote(panel: Panel, items: Sequence[Item]) -> None:
    """The panel sees only what is still in."""
    there = [item for item in items if not item.dropped]
    for item, said in zip(there, panel.vote([item.document for item in there]), strict=True):
        item.verdicts, item.dropped = said.verdicts, said.reason


def write(shard: Shard, items: Sequence[Item]) -> None:
    """What is kept of a shard, and then what became of it."""
    summary, kept = Summary(shard.source), []
    for item in items:
        summary.verdicts(item.verdicts)
        if item.dropped:
            summary.drop(item.document, item.dropped)
        else:
            summary.keep(item.document)
            kept.append(item.document)
    if kept:
        shards.write(shard.filtered, kept, shard.source)
    else:
        shard.filtered.unlink(missing_ok=True)
    write_text(shard.summary, json.dumps(summary.as_dict(), indent=1, sort_keys=True, ensure_ascii=False))


def judge_shard(shard: Shard, recipe: Recipe, panel: Panel) -> None:
    """The whole way of one."""
    items = read(shard)
    leave_out_copies(shard, items)
    leave_out_languages(recipe, items)
    vote(panel, items)
    write(shard, items)


def finish(recipe: Recipe, folder: Path) -> list[dict[str, Any]]:
    """Write the manifest, unless it is there; gives what became of each shard."""
    found = raw_shards(recipe, folder)
    summaries = [json.loads(shard.summary.read_text(encoding="utf-8")) for shard in found]
    if (folder / "filtered" / "manifest.json").exists():
        return summaries
    files = {}
    for shard in found:
        if shard.filtered.exists():
            with shard.filtered.open("rb") as file:
                files[shard.filtered.name] = hashlib.file_digest(file, "sha256").hexdigest()
    kept = {key: sum(summary["kept"][key] for summary in summaries) for key in ("documents", "bytes")}
    write_text(folder / "filtered" / "manifest.json",
               json.dumps({"name": recipe.name, **kept, "files": files}, indent=1, sort_keys=True))
    return summaries
