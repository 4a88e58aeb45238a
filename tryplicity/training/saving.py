"""Writing checkpoints while training goes on: tensors are copied first, then a thread of each rank writes its own.

The ranks' threads send no messages (those of the training must keep their order): each leaves a file that says that its
part is there, and rank 0 renames the folder into place when all are. The run folder is one that all ranks see.
"""

from __future__ import annotations

import io
import json
import shutil
import threading
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from tryplicity.components import Parallelism
from tryplicity.files import begin_folder, commit_folder, sync
from tryplicity.model import Model
from tryplicity.spec.made_with import packages_of
from tryplicity.training.checkpoint import PLUGINS, Options, TrainingProgress, digest_of, random_state, steps, to_keep
from tryplicity.training.saved import INDEX, write_tensors
from tryplicity.training.storage import Buffers, Staged, stage
from tryplicity.world import World


class Holder(Protocol):
    """Who reads checkpoints for a while after they are written."""

    def add(self, checkpoint: Path) -> None:
        """One is complete."""

    def lets_go(self, checkpoint: Path) -> bool:
        """Whether it may be removed now."""


@dataclass
class Job:
    """One checkpoint on its way to the disk."""

    step: int
    target: Path
    temporary: Path
    staged: Staged
    texts: dict[str, bytes]  # other files; on rank 0
    state: str = "writing"  # then written (a part), committed (all of it; on rank 0) or failed
    error: str = ""
    told: bool = False  # whether the user knows how it ended
    stopped: threading.Event = field(default_factory=threading.Event)  # another rank failed
    thread: threading.Thread | None = None

    @property
    def ended(self) -> bool:
        return self.state != "writing"


class Saver:
    """Saves one checkpoint after another; each method but `running` and `join` is called on all ranks alike.

    keep, every: see `checkpoint.to_keep`. holder: is given what is complete.
    """

    def __init__(self, folder: Path, world: World, keep: int, every: int, holder: Holder | None = None) -> None:
        self.folder, self.world, self.keep, self.every, self.holder = folder, world, keep, every, holder
        self.job: Job | None = None
        self._buffers = Buffers()

    def begin(self, strategy: Parallelism, model: Model, optimizer: torch.optim.Optimizer, options: Options,
              progress: TrainingProgress) -> None:
        """Copy what is to be saved and begin to write it to `folder/step-N`; the one before must be finished. Raises
        one of checkpoint.WRITE_ERRORS where it cannot be begun."""
        assert self.job is None
        state = strategy.state(model, optimizer)
        moments = state["optimizer"]["state"]
        tensors = {f"model.{name}": tensor for name, tensor in state["model"].items()}
        tensors |= {f"optimizer.{parameter}.{name}": value for parameter, own in moments.items()
                    for name, value in own.items() if isinstance(value, torch.Tensor)}
        others = {parameter: rest for parameter, own in moments.items()
                  if (rest := {name: value for name, value in own.items() if not isinstance(value, torch.Tensor)})}
        random = self.world.gathered(random_state())
        target = self.folder / f"step-{progress.step}"  # one that is there is damaged, or of the moment before a sleep
        temporary = self._room(target)
        try:
            staged, texts = stage(tensors, self.world, self._buffers), {}
            if self.world.first_rank:
                plain = io.BytesIO()
                torch.save({"groups": state["optimizer"]["groups"], "others": others, "options": asdict(options),
                            "random": random}, plain)
                texts = {INDEX: json.dumps(staged.index, separators=(",", ":")).encode(), "state.pt": plain.getvalue(),
                         "progress.json": json.dumps(asdict(progress), indent=1, sort_keys=True).encode(),
                         PLUGINS: json.dumps(packages_of(model.spec), indent=1).encode()}
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        self.job = Job(progress.step, target, temporary, staged, texts)
        self.job.thread = threading.Thread(target=self._work, args=(self.job,), daemon=True, name="checkpoint")
        self.job.thread.start()

    def finish(self) -> Job | None:
        """Wait until the checkpoint that was begun is complete, or failed: the same on all ranks. None where none was
        begun."""
        job, self.job = self.job, None
        if job is None:
            return None
        while True:
            job.thread.join(0 if job.ended else 0.2 if self.world.size > 1 else None)
            states = self.world.gathered((job.state, job.error))
            failed = [(rank, error) for rank, (state, error) in enumerate(states) if state == "failed"]
            if failed:
                job.stopped.set()
            if all(state != "writing" for state, _ in states):
                break
        job.thread.join()
        if failed:
            rank, error = max(failed, key=lambda one: bool(one[1]))
            job.state, job.error = "failed", error if self.world.size == 1 else f"rank {rank}: {error}"
            if self.world.first_rank:
                shutil.rmtree(job.temporary, ignore_errors=True)
        return job

    def join(self, seconds: float) -> None:
        """Give this rank's part a while to end: before a process ends in disorder, and others perhaps have."""
        if self.job is not None:
            self.job.thread.join(seconds if self.world.size == 1 else min(seconds, 3.0))

    def _room(self, target: Path) -> Path:
        """A folder that all ranks see. Raises OSError on all of them where there is none."""
        made: tuple[Path | None, str] = (None, "")
        if self.world.first_rank:
            try:
                made = (begin_folder(target), "")
            except OSError as error:
                made = (None, str(error))
        temporary, error = self.world.first(made)
        if temporary is None:
            raise OSError(error)
        if self.world.any(not temporary.is_dir()):
            if self.world.first_rank:
                shutil.rmtree(temporary, ignore_errors=True)
            raise OSError(f"{self.folder} is not the same folder on all machines; put the run on a disk they share")
        return temporary

    # --- in the thread ---

    def _work(self, job: Job) -> None:
        try:
            digests = {name: write_tensors(job.temporary / name, tensors)
                       for name, tensors in job.staged.files.items() if tensors}
            if not self.world.first_rank:
                for name in digests:
                    sync(job.temporary / name)
                mark = _mark(job.temporary, self.world.rank)
                mark.with_suffix(".part").write_text(json.dumps(digests))
                mark.with_suffix(".part").rename(mark)
                job.state = "written"
                return
            for name, text in job.texts.items():
                (job.temporary / name).write_bytes(text)
                digests[name] = digest_of(job.temporary / name)
            for rank in range(1, self.world.size):
                digests |= _wait_for(_mark(job.temporary, rank), job.stopped)
            (job.temporary / "complete.json").write_text(json.dumps(dict(sorted(digests.items())), indent=1))
            commit_folder(job.temporary, job.target)
            if self.holder is not None:
                self.holder.add(job.target)
            self.drop_old(job.step)
            job.state = "committed"
        except Exception as error:  # whatever it is must not be lost with the thread
            job.error = "" if isinstance(error, _Stopped) else " ".join(str(error).split()) or type(error).__name__
            if self.world.first_rank:
                shutil.rmtree(job.temporary, ignore_errors=True)
            job.state = "failed"
        finally:
            job.staged.files.clear()

    def drop_old(self, step: int) -> None:
        """Remove what the rule does not keep; on rank 0, no checkpoint being on its way."""
        found = [one for one in steps(self.folder) if one <= step]  # a later one is damaged: see `newest`
        for old in sorted(set(found) - to_keep(found, self.keep, self.every)):
            folder = self.folder / f"step-{old}"
            if self.holder is None or self.holder.lets_go(folder):
                shutil.rmtree(folder, ignore_errors=True)


class _Stopped(Exception):
    """Another rank could not write its part."""


def _mark(temporary: Path, rank: int) -> Path:
    return temporary / f"rank-{rank}.done"


def _wait_for(mark: Path, stopped: threading.Event) -> dict[str, Any]:
    """What another rank's thread leaves when its files are there."""
    while not mark.exists():
        if stopped.wait(0.02):
            raise _Stopped
    said = json.loads(mark.read_text())
    mark.unlink()
    return said
