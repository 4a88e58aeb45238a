"""A run as a user starts it, in a process of its own."""

import dataclasses
import subprocess
import sys
import time
from pathlib import Path

import pytest

SPEC = Path(__file__).parent.parent / "small.yaml"


@pytest.fixture
def command(corpus, cache, prepared, tmp_path, monkeypatch):
    """`command("run", "--steps", "9")`: the whole command line; the data is in the cache already."""

    def line(folder, *options):
        return [sys.executable, "-m", "tryplicity.cli", "train", str(SPEC), "--hw", "cpu", "--data", str(corpus),
                "--run", str(tmp_path / folder), "--set", "hardware.batch=4", *options]

    monkeypatch.setenv("TRYPLICITY_CACHE", str(cache))
    return line


@pytest.fixture
def start():
    """`start(line, ...)`: a process that is gone when the test is over, however that ends."""
    started = []

    def begin(line, **options):
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        started.append(subprocess.Popen(line, **(quiet | options)))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def wait_for_steps():
    """`wait_for_steps(process, folder, 5)`: until so many steps are in metrics.jsonl; the process must be alive."""

    def wait(process, folder, wanted):
        metrics = folder / "metrics.jsonl"
        while not metrics.exists() or metrics.read_text().count("\n") < wanted:
            assert process.poll() is None, (
                f"ended before step {wanted}: {process.stderr.read()[-2000:] if process.stderr else ''}")
            time.sleep(0.005)

    return wait


@pytest.fixture
def go(make_build, prepared, tmp_path):
    """`go("name", [settings], hardware={...})`: trains `small` and gives its run folder."""

    def start(name, settings=(), *, steps, plugins=None, hardware=None, **options):
        from tryplicity import load_plugins
        from tryplicity.builder import build
        from tryplicity.run import Run
        from tryplicity.training.loop import Budget, train

        plugins = plugins or load_plugins()
        built = build(str(SPEC), "cpu", plugins.registry, ["hardware.batch=2", *settings])
        if hardware:
            built = dataclasses.replace(built, hardware=dataclasses.replace(built.hardware, **hardware))
        run = Run(tmp_path / name)
        if not run.exists():
            run.create(spec=built.spec.as_yaml(), hardware="", build={}, data={},
                       tokenizer=prepared.tokenizer_path.read_text())
        train(built, prepared, run, Budget(steps=steps), plugins, **options)
        return run

    return start
