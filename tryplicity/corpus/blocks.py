"""The steps of a filter as pipeline blocks of datatrove (github.com/huggingface/datatrove; Penedo et al., "DataTrove",
2024), for its executors and for pipelines of your own.

    [Read(folder, "signatures"), Sign(folder)]                                                    on any number of tasks
    [Settle(folder)]                                                                              one task
    [Read(folder), LeaveOutCopies(folder), LeaveOutLanguages(folder), Vote(folder), Write(folder)]  any number of tasks
    [Finish(folder)]                                                                              one task

Between the blocks documents go as datatrove has them: text and id, and as metadata domain, url, quality, `shard` (the
key of its raw shard), `dropped` (why it is left out; "" where it is not) and `verdicts`. A shard's documents come one
after another, from one task alone. Only this module and `executing` import datatrove.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from datatrove import data
from datatrove.pipeline.base import PipelineStep

from tryplicity.components import Document
from tryplicity.corpus import deduplicate, steps
from tryplicity.corpus.filtering import read_corpus, this_device
from tryplicity.corpus.panel import Panel
from tryplicity.corpus.report import write_report
from tryplicity.plugins import load_plugins

if TYPE_CHECKING:
    from tryplicity.corpus.recipe import Recipe


class Block(PipelineStep):
    """What all share: a corpus's folder, which every machine must see, and the plugin files its recipe needs."""

    type = "Tryplicity"

    def __init__(self, folder: str | Path, plugin_files: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.folder, self.plugin_files = str(Path(folder).absolute()), plugin_files

    @cached_property
    def recipe(self) -> Recipe:
        return read_corpus(Path(self.folder), load_plugins(self.plugin_files).registry)

    @cached_property
    def shards(self) -> dict[str, steps.Shard]:
        return {shard.key: shard for shard in steps.raw_shards(self.recipe, Path(self.folder))}


class Read(Block):
    """The documents of a task's share of the raw shards, those passed over that a later block is done with."""

    name = "read raw shards"

    def __init__(self, folder: str | Path, until: Literal["signatures", "summary"] = "summary",
                 plugin_files: tuple[str, ...] = ()) -> None:
        """until: which file of a shard says that it is done."""
        super().__init__(folder, plugin_files)
        self.until = until

    def run(self, data_: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[data.Document]:
        for shard in list(self.shards.values())[rank::world_size]:
            if not getattr(shard, self.until).exists():
                for document in shard.documents():
                    yield data.Document(document.text, document.id, metadata={
                        "shard": shard.key, "domain": document.domain, "url": document.url,
                        "quality": document.quality, "dropped": "", "verdicts": {}})


class ByShard(Block):
    """Does its work on one shard's documents after another's; passes them all on."""

    def run(self, data_: Any, rank: int = 0, world_size: int = 1) -> Iterator[data.Document]:
        self.rank = rank
        for key, group in itertools.groupby(data_, lambda document: document.metadata["shard"]):
            documents = list(group)
            items = [_item(document) for document in documents]
            with self.track_time("shard"):
                self.work(self.shards[key], items)
            for document, item in zip(documents, items, strict=True):
                if item.dropped and not document.metadata["dropped"]:
                    self.stat_update(f"dropped: {item.dropped}")
                document.metadata.update(dropped=item.dropped, verdicts=item.verdicts)
            yield from documents

    def work(self, shard: steps.Shard, items: list[steps.Item]) -> None:
        raise NotImplementedError


def _item(document: data.Document) -> steps.Item:
    said = document.metadata
    return steps.Item(Document(document.id, document.text, said["domain"], said["url"], said["quality"]),
                      said["dropped"], said["verdicts"])


class Sign(ByShard):
    name = "sign shards"

    def work(self, shard: steps.Shard, items: list[steps.Item]) -> None:
        deduplicate.write_signatures(shard.signatures, (item.document for item in items))


class Settle(Block):
    name = "compare shards, prepare judges"

    def run(self, data_: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[data.Document]:
        yield from data_ or ()
        if rank == 0 and not all(shard.summary.exists() for shard in self.shards.values()):
            (Path(self.folder) / "filtered" / "manifest.json").unlink(missing_ok=True)
            steps.settle(self.recipe, Path(self.folder), this_device(), print)


class LeaveOutCopies(ByShard):
    name = "leave out copies"

    def work(self, shard: steps.Shard, items: list[steps.Item]) -> None:
        steps.leave_out_copies(shard, items)


class LeaveOutLanguages(ByShard):
    name = "leave out languages"

    def work(self, shard: steps.Shard, items: list[steps.Item]) -> None:
        steps.leave_out_languages(self.recipe, items)


class Vote(ByShard):
    name = "vote"

    @cached_property
    def panel(self) -> Panel:
        import torch

        torch.set_num_threads(1)  # as many tasks as cores are at work
        return Panel.seated(self.recipe, this_device(self.rank), Path(self.folder), print,
                            steps.floors(Path(self.folder)))

    def work(self, shard: steps.Shard, items: list[steps.Item]) -> None:
        steps.vote(self.panel, items)


class Write(ByShard):
    name = "write filtered shards"

    def work(self, shard: steps.Shard, items: list[steps.Item]) -> None:
        steps.write(shard, items)


class Finish(Block):
    name = "manifest and report"

    def run(self, data_: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[data.Document]:
        yield from data_ or ()
        if rank == 0:
            write_report(Path(self.folder), self.recipe.name, steps.finish(self.recipe, Path(self.folder)))
