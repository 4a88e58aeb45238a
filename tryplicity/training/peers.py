"""A rank among others: they are checked to do the same, one that is lost is noticed and named, the rest end in time.

Collectives alone do not tell: NCCL and gloo wait for a rank that hangs as long as for one that compiles, and then say
which connection broke, not who was at its other end. So each rank also says once a second that it lives, in the store
by which the ranks found each other, and rank 0 looks after all of them, the others after rank 0.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import socket
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any
from uuid import uuid4

from tryplicity import __version__
from tryplicity.builder import Build
from tryplicity.errors import Refused, UserError
from tryplicity.parts import config_as_dict
from tryplicity.run import Run
from tryplicity.training import launching
from tryplicity.training.process import say
from tryplicity.training.resume import differences
from tryplicity.world import World, joined

#: seconds of silence after which a rank is taken for lost
PATIENCE = float(os.environ.get("TRYPLICITY_PATIENCE", "40"))
BEAT = min(1.0, PATIENCE / 4)
ENDED = b"ended"


@contextlib.contextmanager
def together(kind: str, run: Run) -> Iterator[World]:
    """This process's world, watched over. kind: of the devices, "cpu" or "cuda".

    A rank that loses another ends: by exception where a collective fails, at once where another is silent.
    """
    if launching.world_size() == 1:
        with joined(kind) as world:
            yield world
        return
    try:
        with joined(kind) as world:
            watch = _Watch(world, run)
            try:
                yield world
                watch.end()
            except Exception as error:
                if lost(error):
                    watch.give_up(error)
                raise
            finally:
                watch.over.set()
    except Exception as error:
        if _taken(error):
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise UserError(f"MASTER_PORT: {where} is taken by another process; give a free port (torchrun "
                            "--master-port=..., MASTER_PORT=...)") from None
        if lost(error) and launching.launched():
            os._exit(launching.LOST)
        if lost(error):
            raise Refused(f"rank {launching.rank()}: the ranks did not find each other at "
                          f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}: {_cause(error)}") from None
        raise


def lost(error: BaseException | None) -> bool:
    """Whether this is what a rank gets when another is gone, whoever passed it on."""
    from torch import distributed

    while error is not None:
        if isinstance(error, distributed.DistError) or (isinstance(error, RuntimeError) and any(
                sign in str(error) for sign in ("/gloo/", "NCCL", "Broken pipe", "Connection reset by peer"))):
            return True
        error = error.__cause__
    return False


def _taken(error: BaseException) -> bool:
    return "EADDRINUSE" in str(error) or getattr(error, "errno", None) == errno.EADDRINUSE


def _cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:300]


class _Watch:
    """Says that this rank lives, and ends it when another one does not."""

    def __init__(self, world: World, run: Run) -> None:
        from torch.distributed import TCPStore

        self.world, self.run, self.over = world, run, threading.Event()
        # a connection of its own: the process group's is busy while a collective waits
        self.store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        # the first thing that all ranks do together, after which every one of them can be asked for
        self.names = world.gathered(f"process {os.getpid()} on {socket.gethostname()}")
        self.store.set(self._key(world.rank), "0")
        world.any(False)
        self.thread = threading.Thread(target=self._beat, daemon=True)
        self.thread.start()

    @staticmethod
    def _key(rank: int) -> str:
        return f"tryplicity/alive/{rank}"

    def _beat(self) -> None:
        """Silence is counted in own beats, so that a machine that slept, or was stopped as a whole, accuses nobody."""
        others = range(1, self.world.size) if self.world.first_rank else range(1)
        last, silent, beats = {}, dict.fromkeys(others, 0), 0
        while not self.over.wait(BEAT):
            beats += 1
            try:
                self.store.set(self._key(self.world.rank), str(beats))
                said = dict(zip(others, self.store.multi_get([self._key(rank) for rank in others]), strict=True))
            except Exception as error:  # the store went with the process that held it
                if not self.over.is_set() and last.get(0) != ENDED:
                    self._end(f"the process that holds the ranks together does not answer ({_cause(error)})")
                return
            for rank, now in said.items():
                silent[rank] = 0 if now == ENDED or now != last.get(rank) else silent[rank] + 1
                if silent[rank] * BEAT >= PATIENCE:
                    self._end(f"rank {rank} ({self.names[rank]}) has not answered for {PATIENCE:g} s")
            last = said

    def end(self) -> None:
        """In good order."""
        self.over.set()
        self.thread.join()
        with contextlib.suppress(Exception):
            self.store.set(self._key(self.world.rank), ENDED)

    def give_up(self, error: BaseException) -> None:
        """A collective failed. Who started the ranks knows best which of them is gone."""
        if launching.launched():
            os._exit(launching.LOST)
        self._end(f"rank {self.world.rank} lost another rank ({_cause(error)})")

    def _end(self, what: str) -> None:
        """Whatever the main thread waits for."""
        if launching.launched():
            say(f"error: {what}")
            os._exit(launching.NAMED)
        say(f"error: {what}; {launching.what_is_kept(self.run)}")
        os._exit(3)


def said_of(build: Build) -> dict[str, Any]:
    """What all ranks must agree on, as plain data."""
    import torch

    spec = build.spec
    phases = [{key: value for key, value in config_as_dict(phase).items() if key != "data"}  # a path of one machine
              for phase in spec.phases]
    return {"spec": {**spec.architecture(), "training": config_as_dict(spec.training), "phases": phases},
            "hardware": asdict(build.hardware), "tryplicity": __version__, "torch": torch.__version__}


def check_shared(world: World, run: Run) -> None:
    """Raises UserError on every rank where not all machines see the same run folder: each rank writes its own share of
    a checkpoint there."""
    if world.local_size >= world.size:
        return
    mark = run.folder / world.first(f".{run.spec.name}.tmp-{uuid4().hex}")  # what is left of it `folder.clear` removes
    try:
        world.decided(lambda: write_mark(mark))
        blind = {where for where in world.gathered(None if mark.exists() else socket.gethostname()) if where}
    finally:
        if world.first_rank:
            mark.unlink(missing_ok=True)
    if blind:
        raise UserError(f"{run.folder} on {' and '.join(sorted(blind))} is not the run folder of rank 0: put the run "
                        "on a disk that all machines share")


def write_mark(path: Path) -> None:
    try:
        path.touch()
    except OSError as error:
        raise UserError(f"{path.parent}: cannot be written: {error.strerror}") from None


def check_alike(world: World, said: Mapping[str, Any]) -> None:
    """Raises UserError on every rank where one of them was given something else: a spec, a profile, data, a budget."""
    if world.size == 1 or len(set(world.gathered(hashlib.sha256(repr(said).encode()).hexdigest()))) == 1:
        return
    everything = world.gathered(said)
    other = next(rank for rank, one in enumerate(everything) if one != everything[0])
    found = list(differences(everything[0], everything[other]).items())
    words = ", ".join(f"{path} {now!r} (rank 0: {before!r})" for path, (before, now) in found[:4])
    more = f" and {len(found) - 4} more" if len(found) > 4 else ""
    raise UserError(f"rank {other} was started with something else than rank 0: {words}{more}; give all ranks the same "
                    "files, options and data, and run the same command again, with --resume")
