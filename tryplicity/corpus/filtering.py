"""Shards to shards on this machine: copies left out, the rest judged, each shard by itself and so gone on with by
shard. What is done to a shard is in `steps`."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tryplicity.corpus import steps
from tryplicity.corpus.panel import Panel
from tryplicity.corpus.recipe import Recipe, load_recipe
from tryplicity.corpus.steps import Shard, raw_shards
from tryplicity.errors import UserError
from tryplicity.files import locked
from tryplicity.progress import Progress


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
        with _Runner(folder, recipe, workers, tuple(plugin_files), progress, stopping, say) as run:
            unsigned = [shard for shard in found if not shard.signatures.exists()]
            if not run.each("looking for copies", steps.sign, unsigned, len(found)):
                return None
            open_ = [shard for shard in found if not shard.summary.exists()]
            if open_:
                (folder / "filtered" / "manifest.json").unlink(missing_ok=True)
                steps.settle(recipe, folder, this_device(), say)
            if not run.each("judging", _judge, open_, len(found)):
                return None
        return steps.finish(recipe, folder)


class _Runner:
    """Does one thing for each of many shards, here or in other processes."""

    def __init__(self, folder: Path, recipe: Recipe, workers: int, plugin_files: tuple[str, ...], progress: Progress,
                 stopping: Callable[[], bool], say: Callable[[str], None]) -> None:
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

    def each(self, what: str, work: Callable[[Shard], None], tasks: list[Shard], of: int) -> bool:
        """False when stopped before all were done."""
        done = of - len(tasks)
        self.progress(what, done, of)
        if self.pool is None:
            for task in tasks:
                if self.stopping():
                    return False
                work(task)
                done += 1
                self.progress(what, done, of)
            return not self.stopping()
        waiting, left = set(), iter(tasks)
        while True:
            while len(waiting) < 2 * self.pool._max_workers and not self.stopping() and (task := next(left, None)):
                waiting.add(self.pool.submit(work, task))
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


def default_workers() -> int:
    """One for each GPU, or without one each core that this process may run on."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return torch.cuda.device_count() or cores


def this_device(number: int = 0) -> Any:
    """One of this machine's devices for each process, in turn."""
    import torch

    return torch.device("cuda", number % torch.cuda.device_count()) if torch.cuda.is_available() else \
        torch.device("cpu")


def _judge(shard: Shard) -> None:
    if _HERE.panel is None:
        _HERE.panel = Panel.seated(_HERE.recipe, this_device(_HERE.number), shard.folder, _HERE.say,
                                   steps.floors(shard.folder))
    steps.judge_shard(shard, _HERE.recipe, _HERE.panel)
