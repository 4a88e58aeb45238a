"""Shards to shards: copies left out, the rest judged, each shard by itself and so gone on with by shard.

    corpus/work/NAME-part-00000.npy         signatures of a raw shard's documents
    corpus/work/floors.json                 the least scores that `keep_top` came to
    corpus/work/NAME-part-00000.json        what became of a raw shard; there once its filtered shard is
    corpus/filtered/NAME-part-00000.parquet what is kept of it; none where nothing is
    corpus/filtered/manifest.json           when all is done: what the corpus is, file by file
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tryplicity.corpus import deduplicate, shards
from tryplicity.corpus.download import State
from tryplicity.corpus.panel import Panel, asked, named_seats
from tryplicity.corpus.recipe import Recipe, load_recipe
from tryplicity.errors import UserError
from tryplicity.files import locked, write_text

if TYPE_CHECKING:
    from tryplicity.components import Document

SAMPLE = 2000  # documents that the score for `keep_top` is found on
EXAMPLES = 3  # of what was left out for each reason, in a shard
EXACT, NEAR = "copies: the same text", "copies: nearly the same text"

Progress = Callable[[str, float, float | None], None]


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
    def summary(self) -> Path:
        return self.folder / "work" / f"{self.key}.json"

    @property
    def filtered(self) -> Path:
        return self.folder / "filtered" / f"{self.key}.parquet"

    def documents(self) -> Iterator[Document]:
        return (document for document, _ in shards.read_shard(self.raw))


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


def read_corpus(folder: Path, registry: Any) -> Recipe:
    """The recipe of a folder that was downloaded. Raises UserError where it is none."""
    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"{folder}: there is no corpus here; make one: tryplicity data download RECIPE --out {folder}")
    return load_recipe(folder / "recipe.yaml", registry)


def filter_corpus(folder: Path, registry: Any, progress: Progress, *, workers: int = 1,
                  plugin_files: Sequence[str] = (), stopping: Callable[[], bool] = lambda: False,
                  say: Callable[[str], None] = lambda text: None) -> list[dict[str, Any]] | None:
    """Leave out copies and what the panel votes against. Gives what became of each shard, or None when stopped on the
    way; the next call goes on with the next shard.

    workers: processes, each with a panel of its own; on a machine with GPUs, one for each at most.
    Raises UserError for a folder that is no downloaded corpus, and where too few judges can work.
    """
    recipe = read_corpus(folder, registry)
    found = raw_shards(recipe, folder)
    with locked(folder / ".lock") as other:
        if other is not None:
            raise UserError(f"{folder}: somebody is at work there ({other}); wait until that ends")
        run = _Runner(folder, registry, recipe, workers, tuple(plugin_files), progress, stopping, say)
        with run:
            unsigned = [(shard,) for shard in found if not shard.signatures.exists()]
            if not run.each("looking for copies", _sign, unsigned, len(found)):
                return None
            exact, near = deduplicate.copies([shard.signatures for shard in found], recipe.near_duplicates)
            floors = _floors(recipe, folder, found, [e | n for e, n in zip(exact, near, strict=True)], say)
            tasks = [(shard, e, n, floors) for shard, e, n in zip(found, exact, near, strict=True)
                     if not shard.summary.exists()]
            if not run.each("judging", _judge, tasks, len(found)):
                return None
        summaries = [json.loads(shard.summary.read_text(encoding="utf-8")) for shard in found]
        _write_manifest(folder, recipe, found, summaries)
        return summaries


class _Runner:
    """Does one thing for each of many shards, here or in other processes."""

    def __init__(self, folder: Path, registry: Any, recipe: Recipe, workers: int, plugin_files: tuple[str, ...],
                 progress: Progress, stopping: Callable[[], bool], say: Callable[[str], None]) -> None:
        self.progress, self.stopping, self.pool = progress, stopping, None
        if workers > 1:
            context = multiprocessing.get_context("spawn")  # a fork after torch's threads have begun may hang
            self.pool = concurrent.futures.ProcessPoolExecutor(
                workers, context, initializer=_begin_worker, initargs=(folder, plugin_files, context.Value("i", 0)))
        else:
            _HERE.recipe, _HERE.panel, _HERE.number, _HERE.say = recipe, None, 0, say

    def __enter__(self) -> _Runner:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    def each(self, what: str, work: Callable[..., None], tasks: list[tuple], of: int) -> bool:
        """False when stopped before all were done."""
        done = of - len(tasks)
        self.progress(what, done, of)
        if self.pool is None:
            for task in tasks:
                if self.stopping():
                    return False
                work(*task)
                done += 1
                self.progress(what, done, of)
            return not self.stopping()
        waiting, left = set(), iter(tasks)
        while True:
            while len(waiting) < 2 * self.pool._max_workers and not self.stopping() and (task := next(left, None)):
                waiting.add(self.pool.submit(work, *task))
            if not waiting:
                return not self.stopping()
            ended, waiting = concurrent.futures.wait(waiting, timeout=1, return_when="FIRST_COMPLETED")
            for future in ended:
                future.result()
                done += 1
                self.progress(what, done, of)


class _Here:
    """What a process has for its work."""

    recipe: Recipe
    panel: Panel | None = None
    number: int = 0

    @staticmethod
    def say(text: str) -> None:
        pass


_HERE = _Here()


def _begin_worker(folder: Path, plugin_files: tuple[str, ...], counter: Any) -> None:
    import torch

    from tryplicity.plugins import load_plugins

    with counter.get_lock():
        _HERE.number, counter.value = counter.value, counter.value + 1
    torch.set_num_threads(1)
    _HERE.recipe = read_corpus(folder, load_plugins(plugin_files).registry)


def _device() -> Any:
    """One of this machine's for each process, in turn."""
    import torch

    return torch.device("cuda", _HERE.number % torch.cuda.device_count()) if torch.cuda.is_available() else \
        torch.device("cpu")


def _sign(shard: Shard) -> None:
    deduplicate.write_signatures(shard.signatures, shard.documents())


def _judge(shard: Shard, exact_N: np.ndarray, near_N: np.ndarray, floors: dict[str, float]) -> None:
    """Write what is kept of a shard, and then what became of it."""
    if _HERE.panel is None:
        _HERE.panel = Panel.seated(_HERE.recipe, _device(), floors, _HERE.say)
    summary = _Summary(shard)
    originals = []
    for document, exact, near in zip(shard.documents(), exact_N, near_N, strict=True):
        if exact or near:
            summary.drop(document, EXACT if exact else NEAR)
        else:
            originals.append(document)
    kept = []
    for document, vote in zip(originals, _HERE.panel.vote(originals), strict=True):
        summary.verdicts(vote.verdicts)
        if vote.kept:
            summary.keep(document)
            kept.append(document)
        else:
            summary.drop(document, vote.reason)
    if kept:
        shards.write(shard.filtered, kept, shard.source)
    else:
        shard.filtered.unlink(missing_ok=True)
    write_text(shard.summary, json.dumps(summary.as_dict(), indent=1, sort_keys=True, ensure_ascii=False))


class _Summary:
    """What became of a shard's documents, counted."""

    def __init__(self, shard: Shard) -> None:
        self.source, self.kept = shard.source, {"documents": 0, "bytes": 0}
        self.domains: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self.examples: dict[str, list[dict[str, str]]] = {}
        self.judges: dict[str, Counter[str]] = {}
        self.pairs: dict[str, Counter[str]] = {}

    def keep(self, document: Document) -> None:
        size = len(document.text.encode("utf-8", "replace"))
        self.kept["documents"] += 1
        self.kept["bytes"] += size
        self.domains[document.domain] += size
        self._example("kept", document)

    def drop(self, document: Document, reason: str) -> None:
        self.dropped[reason] += 1
        self._example(reason, document)

    def verdicts(self, verdicts: dict[str, Any]) -> None:
        words = {name: {True: "keep", False: "drop", None: "no opinion"}[verdict.keep]
                 for name, verdict in verdicts.items()}
        for name, word in words.items():
            self.judges.setdefault(name, Counter())[word] += 1
        names = sorted(words)
        for i, one in enumerate(names):
            for other in names[i + 1:]:
                self.pairs.setdefault(f"{one} / {other}", Counter())[f"{words[one]} / {words[other]}"] += 1

    def _example(self, what: str, document: Document) -> None:
        if len(held := self.examples.setdefault(what, [])) < EXAMPLES:
            held.append({"id": document.id, "text": " ".join(document.text[:1000].split())[:200]})

    def as_dict(self) -> dict[str, Any]:
        return {"source": self.source, "kept": self.kept, "domains": dict(self.domains),
                "dropped": dict(self.dropped), "examples": self.examples,
                "judges": {name: dict(counts) for name, counts in self.judges.items()},
                "pairs": {name: dict(counts) for name, counts in self.pairs.items()}}


def _floors(recipe: Recipe, folder: Path, found: Sequence[Shard], copies: Sequence[np.ndarray],
            say: Callable[[str], None]) -> dict[str, float]:
    """For each judge with `keep_top`, the score that so many of a sample's documents reach. The sample: those that are
    no copies with the least hashes of their ids."""
    seats = {name: seat for name, seat in named_seats(recipe) if seat.keep_top is not None}
    path = folder / "work" / "floors.json"
    if not seats:
        return {}
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    import heapq

    from tryplicity.data.documents import unit_hash

    def candidates() -> Iterator[tuple[float, str, Document]]:
        for shard, copy_N in zip(found, copies, strict=True):
            for document, copy in zip(shard.documents(), copy_N, strict=True):
                if not copy:
                    yield unit_hash(document.id, "sample"), document.id, document

    sample = [document for *_, document in heapq.nsmallest(SAMPLE, candidates(), key=lambda entry: entry[:2])]
    panel, floors = Panel.seated(recipe, _device(), {}, say), {}
    for name, judge, _ in panel.judges:
        if name in seats:
            scores = np.array([verdict.score for verdict in asked(judge, sample)])
            scores = scores[~np.isnan(scores)]
            floors[name] = float(np.quantile(scores, 1 - seats[name].keep_top)) if len(scores) else float("nan")
    write_text(path, json.dumps(floors, indent=1, sort_keys=True))
    return floors


def _write_manifest(folder: Path, recipe: Recipe, found: Sequence[Shard], summaries: Sequence[dict[str, Any]]) -> None:
    files = {}
    for shard in found:
        if shard.filtered.exists():
            with shard.filtered.open("rb") as file:
                files[shard.filtered.name] = hashlib.file_digest(file, "sha256").hexdigest()
    kept = {key: sum(summary["kept"][key] for summary in summaries) for key in ("documents", "bytes")}
    write_text(folder / "filtered" / "manifest.json",
               json.dumps({"name": recipe.name, **kept, "files": files}, indent=1, sort_keys=True))
