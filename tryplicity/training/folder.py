"""A run folder while it is trained in: one process at a time, nothing left of killed ones, no old weights lost.

Loads no torch.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tryplicity.errors import Refused, UserError
from tryplicity.files import clear_folders, locked
from tryplicity.planner.memory import GB, Saving
from tryplicity.run import Run


@contextmanager
def alone(run: Run) -> Iterator[None]:
    """The folder for this process alone, as long as it lives, and cleared of what killed ones left half written.
    Reading it (generate, serve, brain) needs no lock.

    Raises UserError when another process trains in it, naming that.
    """
    there = run.folder.exists()
    try:
        with locked(run.lock) as other:
            if other is not None:
                raise UserError(f"{run.folder}: a training is at work there ({other}); wait until it ends, or give "
                                "another --run")
            clear(run)
            yield
    except OSError as error:
        if error.filename is not None and str(error.filename) in (str(run.folder), str(run.lock)):
            raise UserError(f"{run.folder}: cannot be written: {error.strerror}") from None
        raise
    finally:
        if not there:
            with contextlib.suppress(OSError):  # there is something in it: then it stays
                run.folder.rmdir()


def clear(run: Run) -> None:
    """Remove what killed processes left half written, and say so. Only for who has the folder alone."""
    removed, size = clear_folders(run.checkpoints)
    for path in (run.spec, run.hardware, run.build, run.tokenizer, run.tokenizer_config, run.data, run.metrics,
                 run.weights):
        for left in run.folder.glob(f".{path.name}.tmp-*"):
            removed, size = removed + 1, size + left.stat().st_size
            left.unlink()
    if removed:
        print(f"note: {run.folder}: removed what killed trainings had not finished writing ({removed} "
              f"file{'s' if removed > 1 else ''} or checkpoint{'s' if removed > 1 else ''}, {size / 1e6:,.1f} MB)",
              file=sys.stderr)


def check_free(run: Run, resume: bool) -> None:
    """Raises UserError where a training would begin anew over weights or checkpoints that are there."""
    checkpoints = any(run.checkpoints.glob("step-*"))
    if not resume and (checkpoints or run.weights.exists()):
        what = run.checkpoints if checkpoints else run.weights
        raise UserError(f"{what} is there already, and a new run would write over it; give another --run, or move it "
                        "away")
    if resume and run.weights.exists() and not checkpoints:
        raise UserError(f"{run.folder}: there are weights but no checkpoint to go on from, and beginning anew "
                        "would write over them; give another --run, or move model.safetensors away")


def check_room(run: Run, saving: Saving) -> None:
    """Whether the disk has room for what is to be saved beside what is there. Raises Refused where not one checkpoint
    fits; says so where not all do."""
    place = next(path for path in (run.folder, *run.folder.absolute().parents) if path.exists())
    free, there = shutil.disk_usage(place).free, len(list(run.checkpoints.glob("step-*")))
    weights = 0 if run.weights.exists() else saving.weights
    if free < saving.checkpoint:
        raise Refused(f"{run.folder}: {free / GB:,.1f} GB are free there, and a checkpoint takes "
                      f"{saving.checkpoint / GB:,.1f}: free some, or give a --run on a larger disk")
    if free < (needed := saving.checkpoint * max(1, saving.most - there) + weights):
        print(f"warning: {run.folder}: {free / GB:,.1f} GB are free there; checkpoints and weights will take "
              f"{needed / GB:,.1f} more: free some, or keep fewer (training.keep_checkpoints)", file=sys.stderr)
