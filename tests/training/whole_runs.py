"""Whole trainings of one rank or several, each a process of its own, that are stopped or killed at a chosen moment."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

from tests.training.conftest import SPEC

SETTINGS = ["vocab_size=300", "context_length=48", "hardware.batch=1", "hardware.link_bandwidth_gbs=1",
            "training.optimizer.fused=false", "training.validation_rows=5", "training.validate_every=3",
            "training.checkpoint_every=2"]
FILE_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.listdir", "os.scandir"}


def train_there(world, corpus, cache, folder, settings, steps, stop_after=0, kill=None, copy_to=None):
    """Begin or go on with a run. Rank 0 gives why it ended, its files' events and its seconds.

    stop_after: the step after which rank 0 gets a SIGTERM. kill: (rank, "events" or "seconds", how many): that rank
    kills itself when so many things were done to files below `folder`, or so many seconds after it began to train.
    """
    from tryplicity import load_plugins
    from tryplicity.builder import build
    from tryplicity.data import parse_source, prepare
    from tryplicity.run import Run
    from tryplicity.training import copying
    from tryplicity.training.loop import Budget, train
    from tryplicity.training.watchers import Watcher

    class Stopper(Watcher):
        def step(self, progress, metrics, spent, seconds_left):
            if progress.step == stop_after:
                os.kill(os.getpid(), signal.SIGTERM)

    copying.WAITS = ()
    plugins = load_plugins()
    prepared = prepare(parse_source(plugins.registry, corpus), 300, Path(cache))
    built, run = build(str(SPEC), "cpu", plugins.registry, [*SETTINGS, *settings]), Run(Path(folder))
    if not world.first(run.exists()):
        world.decided(lambda: run.create(spec=built.spec.as_yaml(), hardware="", build={}, data={},
                                         tokenizer=prepared.tokenizer_path.read_text()))
    happened, begun = [0], time.perf_counter()
    wanted = kill[2] if kill and kill[:2] == (world.rank, "events") else 0

    def heard(event, arguments):
        if event in FILE_EVENTS and any(isinstance(path, str | os.PathLike) and folder in str(path)
                                        for path in arguments[:2]):
            happened[0] += 1
            if happened[0] == wanted:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(heard)
    if kill and kill[:2] == (world.rank, "seconds"):
        timer = threading.Timer(kill[2], os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()
    outcome = train(built, prepared, run, Budget(steps=steps), plugins, resume=True, watcher=Stopper(), world=world,
                    copy_to=copy_to)
    return outcome.reason, happened[0], time.perf_counter() - begun
