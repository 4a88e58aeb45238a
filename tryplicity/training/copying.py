"""Checkpoints off the machine: every complete one is copied to a URL that fsspec knows, and a run is fetched from it.

    URL/spec.yaml  hardware.yaml  build.json  tokenizer.json  data.json  metrics.jsonl  model.safetensors
    URL/checkpoints/step-N/...        complete.json, written last, says that all of it is there

filesystem-spec.readthedocs.io lists the kinds: file://, s3:// (with s3fs), gs:// (gcsfs), sftp://, memory:// and more.
A target that cannot be reached costs the copies, never the run.
"""

from __future__ import annotations

import contextlib
import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tryplicity.errors import UserError
from tryplicity.files import whole_file, whole_folder
from tryplicity.run import Run
from tryplicity.training.checkpoint import damage, steps, to_keep
from tryplicity.training.process import say

MARK = "complete.json"
WAITS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # seconds between two tries


class Target:
    """A folder somewhere else. Raises UserError for a URL that nothing installed understands."""

    def __init__(self, url: str) -> None:
        import fsspec

        self.url = url.rstrip("/") if not url.endswith("://") else url
        try:
            self.system, self.root = fsspec.core.url_to_fs(self.url)
        except ImportError as error:
            raise UserError(f"{url}: {error}: for s3:// `pip install s3fs`, for gs:// gcsfs, for az:// adlfs") from None
        except Exception as error:  # of any of its systems
            raise UserError(f"{url}: not a place to copy to: {_told(error)}") from None

    def path(self, *parts: str) -> str:
        return "/".join((self.root.rstrip("/"), *parts))

    def begun(self) -> list[int]:
        """The steps whose checkpoints are there, or a part of them, oldest first. Raises whatever its system raises."""
        self.system.invalidate_cache()  # another machine may have written
        try:
            names = self.system.ls(self.path("checkpoints"), detail=False)
        except FileNotFoundError:
            return []
        found = [name.rstrip("/").rpartition("/")[2].removeprefix("step-") for name in names]
        return sorted(int(step) for step in found if step.isdigit())

    def steps(self) -> list[int]:
        """Those of which all is there."""
        return [step for step in self.begun() if self.system.exists(self.path("checkpoints", f"step-{step}", MARK))]

    def put(self, file: Path, *parts: str) -> None:
        path = self.path(*parts)
        self.system.makedirs(path.rpartition("/")[0], exist_ok=True)
        self.system.put_file(str(file), path)

    def has(self, folder: Path) -> bool:
        """Whether just this checkpoint is there: its mark has the hashes of its files."""
        mark = self.path("checkpoints", folder.name, MARK)
        return self.system.exists(mark) and self.system.cat_file(mark) == (folder / MARK).read_bytes()

    def put_checkpoint(self, folder: Path) -> None:
        """All of its files, the mark last; one that is there already is not complete until then."""
        place = ("checkpoints", folder.name)
        self.remove(folder.name)
        for file in sorted(folder.iterdir(), key=lambda file: (file.name == MARK, file.name)):
            self.put(file, *place, file.name)

    def remove(self, name: str) -> None:
        """A checkpoint, the mark first."""
        folder = self.path("checkpoints", name)
        with contextlib.suppress(FileNotFoundError):
            self.system.rm_file(f"{folder}/{MARK}")
        with contextlib.suppress(FileNotFoundError):
            self.system.rm(folder, recursive=True)


def check_target(url: str, resume: bool) -> None:
    """Before a training begins: raises UserError for a URL that is none, or where another run's checkpoints are. That
    it cannot be reached now is said, and no more."""
    target = Target(url)
    try:
        there = target.steps()
    except Exception as error:
        say(f"warning: {url} cannot be reached now ({_told(error)}); training goes on, and each checkpoint tries again")
        return
    if there and not resume:
        raise UserError(f"{url}: there are checkpoints of a run already, the newest of step {there[-1]}; go on with "
                        "them (--resume), or give another --copy-to")


def _files_of(run: Run) -> Iterable[Path]:
    """What belongs to a copy beside its checkpoints; what makes a folder a run comes last."""
    files = (run.hardware, run.build, run.tokenizer_config, run.tokenizer, run.data, run.metrics, run.spec)
    return [path for path in files if path.is_file()]


class Copier:
    """Copies what it is given, one checkpoint after another, in a thread of its own.

    keep, every: at the target the same checkpoints stay as in the run folder (`checkpoint.to_keep`). waits: seconds
    between tries.
    """

    def __init__(self, url: str, run: Run, keep: int, every: int, waits: Sequence[float] | None = None) -> None:
        self.target, self.run, self.keep, self.every = Target(url), run, keep, every
        self.waits = WAITS if waits is None else waits
        self.copied: int | None = None  # the newest step that is there
        self.given: int | None = None
        self._fault = ""
        self._lock = threading.Lock()
        self._waiting: list[Path] = []
        self._at_work: Path | None = None
        self._work: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._copy, daemon=True, name="copy of checkpoints")
        self._thread.start()

    def add(self, checkpoint: Path) -> None:
        with self._lock:
            self._waiting = [one for one in self._waiting if one != checkpoint] + [checkpoint]
            self.given = int(checkpoint.name.removeprefix("step-"))
        self._work.put(True)

    def lets_go(self, checkpoint: Path) -> bool:
        """Whether a checkpoint may be removed: not while it is being copied. One that waits goes uncopied: a newer one
        took its place, and the disk must not fill up."""
        with self._lock:
            if checkpoint == self._at_work:
                return False
            if checkpoint in self._waiting:
                self._waiting.remove(checkpoint)
                say(f"note: {checkpoint.name} was not copied to {self.target.url}: newer ones came before its turn")
            return True

    def finish(self, weights: Path | None = None) -> bool:
        """Wait for the last checkpoint, and copy what the run ends with. False, and a line that says so, if that is not
        there after all tries."""
        self._work.put(False)
        self._thread.join()
        with_the_end = [path for path in (self.run.metrics, weights) if path is not None and path.is_file()]
        good = self.copied == self.given
        for file in with_the_end if good else ():
            good = good and self._tried(lambda file=file: self.target.put(file, file.name))
        if not good:
            there = "no checkpoint" if self.copied is None else f"the checkpoint of step {self.copied}"
            say(f"warning: {self.target.url} could not be written ({self._fault}); {there} is there, and the run "
                "folder has all: copy it, or run the same command with --resume")
        return good

    # --- in the thread ---

    def _copy(self) -> None:
        while self._work.get():
            with self._lock:
                if not self._waiting:
                    continue
                self._at_work = self._waiting.pop(0)
            folder, step = self._at_work, int(self._at_work.name.removeprefix("step-"))
            if self._tried(lambda folder=folder: self._one(folder)):
                self.copied = step
            else:
                say(f"warning: {folder.name} could not be copied to {self.target.url} ({self._fault}); training goes "
                    "on, and the next checkpoint tries again")
            with self._lock:
                self._at_work = None

    def _one(self, folder: Path) -> None:
        if not self.target.has(folder):
            self.target.put_checkpoint(folder)
        for file in _files_of(self.run):
            self.target.put(file, file.name)
        own = int(folder.name.removeprefix("step-"))
        found = [step for step in self.target.steps() if step <= own]
        cut_short = {step for step in self.target.begun() if step < own} - set(found)
        for old in sorted(cut_short | (set(found) - to_keep(found, self.keep, self.every))):
            self.target.remove(f"step-{old}")

    def _tried(self, work: Callable[[], Any]) -> bool:
        for number, wait in enumerate((*self.waits, None)):
            try:
                work()
                return True
            except Exception as error:  # of any of fsspec's systems
                self._fault = _told(error)
                if number == 0 and wait is not None:
                    say(f"note: {self.target.url} cannot be written now ({self._fault}); trying again")
                if wait is not None:
                    time.sleep(wait)
        return False


def begin(run: Run, resume: bool, copy_to: str | None, resume_from: str | None) -> None:
    """Before a training, by who has the folder alone: look at the target, and where a run is gone on with that is not
    in the folder, fetch it. Raises UserError where that cannot be."""
    if copy_to:
        check_target(copy_to, resume)
    if not resume or (run.exists() and steps(run.checkpoints)):
        return
    if resume_from:
        fetch(resume_from, run)
    elif copy_to and _steps_there(copy_to):  # else it is the first start of a command that is started again and again
        fetch(copy_to, run)


def _steps_there(url: str) -> list[int]:
    try:
        return Target(url).steps()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{url}: cannot be read: {_told(error)}; nothing is begun anew over what may be there: try "
                        "again, or give another --copy-to") from None


def fetch(url: str, run: Run) -> int:
    """Bring the newest complete checkpoint of a copy, and what belongs to it, into a run folder without any; its step.
    One that was damaged on the way is passed over. Raises UserError where there is none, or the target cannot be
    reached."""
    target = Target(url)
    try:
        there = target.steps()
        if not there:
            raise UserError(f"{url}: there is no complete checkpoint of a run")
        step, faults = _fetch_newest(target, run, there)
        for name in ("hardware.yaml", "build.json", "tokenizer_config.json", "tokenizer.json", "data.json",
                     "metrics.jsonl", "spec.yaml"):
            if target.system.exists(target.path(name)):
                with whole_file(run.folder / name) as temporary:
                    target.system.get_file(target.path(name), str(temporary))
    except UserError:
        raise
    except Exception as error:  # of any of fsspec's systems
        raise UserError(f"{url}: cannot be read: {_told(error)}") from None
    for fault in faults:
        say(f"warning: {url}: {fault}; going back to the one before it")
    return step


def _fetch_newest(target: Target, run: Run, there: list[int]) -> tuple[int, list[str]]:
    faults = []
    for step in reversed(there):
        with contextlib.suppress(_Damaged), whole_folder(run.checkpoints / f"step-{step}") as temporary:
            for path in target.system.ls(target.path("checkpoints", f"step-{step}"), detail=False):
                if name := path.rpartition("/")[2]:  # some stores list the folder too
                    target.system.get_file(path, str(temporary / name))
            if fault := damage(temporary):
                faults.append(f"step-{step} is damaged ({fault})")
                raise _Damaged
        if steps(run.checkpoints):
            return step, faults
    shutil.rmtree(run.checkpoints, ignore_errors=True)
    raise UserError(f"{target.url}: no checkpoint can be gone on from: {'; '.join(faults)}")


class _Damaged(Exception):
    pass


def _told(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]
