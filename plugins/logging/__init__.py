"""Where a run's numbers go beside metrics.jsonl: TensorBoard, where it is installed."""

from __future__ import annotations

from tryplicity import hookimpl
from tryplicity_plugins.logging.tensorboard import EventFiles, wanted

#: the runs of this process that are being written
_open: dict = {}


@hookimpl
def tryplicity_run_started(run):
    if wanted():
        _open[run] = EventFiles(run / "tensorboard")


def _write(run, step, metrics, **options):
    if run in _open:
        try:
            _open[run].write(step, metrics, **options)
        except Exception:
            _open.pop(run)  # told once, then left alone
            raise


@hookimpl
def tryplicity_step_finished(run, step, metrics):
    _write(run, step, metrics)


@hookimpl
def tryplicity_slept(run, step, report):
    _write(run, step, {"sleep": report})


@hookimpl
def tryplicity_checkpoint_saved(run):
    if run in _open:
        _open[run].flush()  # what a resumed run will not write again is on the disk


@hookimpl
def tryplicity_run_finished(run, step, scores):
    if scores:
        _write(run, step, scores, keep=True)
    if run in _open:
        _open.pop(run).close()
