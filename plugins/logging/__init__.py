"""Where a run's numbers go beside metrics.jsonl: TensorBoard, where it is installed; Weights & Biases and trackio,
where they are asked for."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from tryplicity import hookimpl
from tryplicity_plugins.logging import tensorboard, trackio, wandb
from tryplicity_plugins.logging.tensorboard import EventFiles

#: the runs of this process that are being written, and what writes them
_open: dict = {}


@hookimpl
def tryplicity_run_started(run, spec):
    trackers = [EventFiles(run / "tensorboard")] if tensorboard.wanted() else []
    asked = {wandb: wandb.WeightsAndBiases, trackio: trackio.Trackio}
    trackers += [tracker(run, spec) for module, tracker in asked.items() if module.wanted()]
    if trackers:
        _open[run] = trackers


@hookimpl
def tryplicity_step_finished(run, step, metrics):
    _each(run, lambda tracker: tracker.write(step, metrics))


@hookimpl
def tryplicity_slept(run, step, report):
    _each(run, lambda tracker: tracker.write(step, {"sleep": report}))


@hookimpl
def tryplicity_checkpoint_saved(run):
    _each(run, lambda tracker: tracker.flush())  # what a resumed run will not write again is on the disk


@hookimpl
def tryplicity_run_finished(run, step, scores):
    if scores:
        _each(run, lambda tracker: tracker.write(step, scores, keep=True))
    _each(run, lambda tracker: tracker.close())
    _open.pop(run, None)


def _each(run: Any, do: Callable[[Any], None]) -> None:
    """What fails is told once, then left alone; the run and the others go on."""
    for tracker in list(_open.get(run, ())):
        try:
            do(tracker)
        except (Exception, SystemExit) as error:
            _open[run].remove(tracker)
            cause = " ".join(str(error).split()) or type(error).__name__
            print(f"warning: {tracker.name} failed: {cause[:300]}; the run goes on without it", file=sys.stderr)
