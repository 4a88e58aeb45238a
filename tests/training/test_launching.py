"""Several ranks of one machine, as a user starts them: stopped, killed, hung, given different things.

The truth is what is on the disk and in the system afterwards: checkpoints, processes, what was said.
"""

import dataclasses
import os
import resource
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.command_line import call
from tryplicity.cli import main
from tryplicity.training import checkpoint
from tryplicity.training.launching import adopt_slurm
from tryplicity.training.metrics import read_lines

TWO = ["--set", "hardware.count=2", "--set", "hardware.strategy=ddp"]


@pytest.fixture
def two(command, tmp_path, monkeypatch):
    """`two("--steps", "9")`: the command line of a training on two ranks."""
    monkeypatch.setenv("TRYPLICITY_PATIENCE", "6")  # with less, a busy machine seems to hang
    monkeypatch.setenv("TRYPLICITY_THREADS", "1")
    return lambda *options: command("run", *TWO, *options)


def ranks_of(process):
    """The process of each rank, by rank."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            said = dict(one.split("=", 1) for one in (entry / "environ").read_text().split("\0") if "=" in one)
        except (OSError, ValueError):
            continue
        if parent == process.pid and "RANK" in said:
            found[int(said["RANK"])] = int(entry.name)
    return found


def gone(pids):
    """Whether no process is left of these within some seconds."""
    until = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() and ") Z " not in Path(f"/proc/{pid}/stat").read_text() for pid in pids):
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def said(process):
    """Its exit code and what it wrote, once it has ended."""
    out, err = process.communicate(timeout=120)
    assert "Traceback" not in err, err
    return process.returncode, out, err


PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}


def test_two_ranks_are_killed_stopped_and_resumed(two, start, wait_for_steps, tmp_path):
    run = tmp_path / "run"
    process = start(two("--steps", "100000"), **PIPES)
    wait_for_steps(process, run, 5)
    ranks = ranks_of(process)
    assert ranks.keys() == {0, 1}
    os.kill(ranks[1], signal.SIGKILL)
    code, _, err = said(process)
    newest = checkpoint.steps(run / "checkpoints")[-1]
    assert code == 3 and f"error: rank 1 (process {ranks[1]} on {socket.gethostname()}) was ended by SIGKILL" in err
    assert f"the checkpoint of step {newest} is kept: go on from there with the same command and --resume" in err
    assert err.count("error: ") == 2  # and nothing of what rank 0 met with
    assert "on 2 ranks of this machine, ddp" in err and gone(ranks.values())

    before = (run / "metrics.jsonl").stat().st_ino
    process = start(two("--steps", "100000", "--resume"), **PIPES)
    while (run / "metrics.jsonl").stat().st_ino == before:  # until then it has the lines of the one that was killed
        assert process.poll() is None
        time.sleep(0.01)
    wait_for_steps(process, run, newest + 3)
    ranks = ranks_of(process)
    os.kill(ranks[1], signal.SIGTERM)  # one of them is told; all stop, at the same step
    code, out, err = said(process)
    last = [line["step"] for line in read_lines(run / "metrics.jsonl")][-1]
    assert code == 143 and f"interrupted; all is saved at step {last}" in out and "error" not in err
    assert checkpoint.steps(run / "checkpoints")[-1] == last and gone(ranks.values())

    done = subprocess.run(two("--steps", str(last + 1), "--resume"), **PIPES, timeout=120)
    assert done.returncode == 0 and "held-out bits per byte" in done.stdout, done.stderr


@pytest.mark.parametrize("hung", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_rank_that_hangs_is_named_and_the_others_end(two, start, wait_for_steps, tmp_path, hung):
    process = start(two("--steps", "100000"), **PIPES)
    wait_for_steps(process, tmp_path / "run", 5)
    ranks = ranks_of(process)
    os.kill(ranks[hung], signal.SIGSTOP)
    code, _, err = said(process)
    assert code == 3 and err.count("has not answered for 6 s") == 1, err
    assert f"rank {hung} (process {ranks[hung]} on {socket.gethostname()}) has not answered" in err
    assert "the same command and --resume" in err and gone(ranks.values())


def test_no_rank_outlives_its_launcher(two, start, wait_for_steps, tmp_path):
    process = start(two("--steps", "100000"))
    wait_for_steps(process, tmp_path / "run", 1)
    ranks = ranks_of(process)
    os.kill(ranks[1], signal.SIGSTOP)
    process.kill()
    assert len(ranks) == 2 and gone(ranks.values())


STOPPER = '''
import os, signal, time
from dataclasses import dataclass
from pathlib import Path
from torch.nn import functional as F
from tryplicity import Activation, Brain, hookimpl

MARKS = Path({marks!r})

def mark(name):
    """Whether it was not there yet."""
    path = MARKS / f"{{name}}-{{os.environ['RANK']}}"
    new = not path.exists()
    with path.open("a") as file:
        file.write("x")
    return new

class Stops(Activation):
    name = "stops"

    @dataclass(frozen=True)
    class Config:
        at: str = "never"

    def __init__(self, config, features, groups=None):
        super().__init__()
        self.at, self.begun = config.at, False

    def before_step(self, step):
        self.begun = True

    def forward(self, x, group=None):
        if self.at == "scoring" and self.begun and not self.training and mark("scored") and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        if self.at == "compiling" and self.begun and mark("compiled"):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(600)
        return F.silu(x)

class Dozes(Brain):
    name = "dozes"

    @dataclass(frozen=True)
    class Config:
        pass

    def wants_sleep(self, step):
        return step == 3

    def sleep(self, night):
        first = mark("dozed")
        if first and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        while first and not night.interrupted():
            time.sleep(0.01)
        return {{"dozed": 1}}

@hookimpl
def tryplicity_layers():
    return [Stops]

@hookimpl
def tryplicity_brain_modules():
    return [Dozes]
'''


@pytest.mark.parametrize("moment", ["scoring", "compiling", pytest.param("sleep", marks=pytest.mark.slow)])
def test_a_signal_is_heard_wherever_the_ranks_are(two, tmp_path, monkeypatch, moment):
    """One rank is told; in a step that compiles, each is, since nobody can wait for the others there."""
    (tmp_path / "stopper.py").write_text(STOPPER.format(marks=str(tmp_path)))
    monkeypatch.setenv("TRYPLICITY_PROMPT", "0.2")
    given = ["--plugin", str(tmp_path / "stopper.py"), "--set", "hardware.batch=1", "--set",
             "training.validate_every=2", "--set", "training.validation_rows=40", "--set", "brain=[dozes]"
             if moment == "sleep" else f"blocks.attention.feed_forward.activation={{type: stops, at: {moment}}}"]
    done = subprocess.run(two("--steps", "5", *given), **PIPES, timeout=120)
    run = tmp_path / "run"
    assert done.returncode == 143 and "Traceback" not in done.stderr, done.stderr
    steps = {"scoring": [2], "sleep": [3], "compiling": []}[moment]
    assert checkpoint.steps(run / "checkpoints") == steps and not list((run / "checkpoints").glob(".*"))
    assert not any("sleep" in line for line in read_lines(run / "metrics.jsonl"))
    if moment == "scoring":  # of twenty batches a rank
        assert max(len((tmp_path / f"scored-{rank}").read_text()) for rank in (0, 1)) <= 4
    if moment == "compiling":
        assert "interrupted; nothing is lost" in done.stderr
    if moment != "sleep":
        return
    done = subprocess.run(two("--steps", "5", *given, "--resume"), **PIPES, timeout=120)
    assert done.returncode == 0 and (run / "model.safetensors").is_file(), done.stderr
    assert [line["step"] for line in read_lines(run / "metrics.jsonl") if "loss" in line] == [1, 2, 3, 4, 5]


def test_a_port_that_is_taken_is_said_and_the_run_can_be_gone_on_with(two, monkeypatch, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        done = subprocess.run(two("--steps", "2"), **PIPES, timeout=120)
        assert done.returncode == 2 and f"error: MASTER_PORT={port}: the port is taken" in done.stderr
        # one of several that torchrun or srun started
        environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        done = subprocess.run(two("--steps", "2", "--resume"), **PIPES, timeout=120, env=environment)
        assert done.returncode == 2 and f"error: MASTER_PORT: 127.0.0.1:{port} is taken" in done.stderr, done.stderr
    done = subprocess.run(two("--steps", "2", "--resume"), **PIPES, timeout=120)  # the same port, which is free now
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in read_lines(tmp_path / "run" / "metrics.jsonl") if "loss" in line] == [1, 2]


def test_a_disk_that_is_full_costs_several_ranks_the_checkpoint_alone(two, tmp_path):
    """The largest file that they may write is smaller than a rank's share."""
    small = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))  # noqa: E731
    starved = subprocess.run(two("--steps", "6"), **PIPES, timeout=300, preexec_fn=small)
    assert starved.returncode == 1 and "Traceback" not in starved.stderr, starved.stderr
    told = [line for line in starved.stderr.splitlines() if "the checkpoint could not be written" in line]
    assert len(told) == 2 and "training goes on" in told[0] and "go on with --resume" in told[1]
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
    done = subprocess.run(two("--steps", "6", "--resume"), **PIPES, timeout=300)
    assert done.returncode == 0 and (tmp_path / "run" / "model.safetensors").is_file(), done.stderr


def test_ranks_that_were_started_with_different_things_say_which(two, start, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    other = ["--set", "training.gradient_clip=0.5", "--set", "hidden_size=64"]
    ranks = [start(two("--steps", "2", *options), **PIPES, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
             for rank, options in enumerate(([], other))]
    for process in ranks:
        code, _, err = said(process)
        assert code == 2, err
        for words in ("rank 1 was started with something else than rank 0", "spec.hidden_size 64 (rank 0: 32)",
                      "spec.training.gradient_clip 0.5 (rank 0: 1.0)"):
            assert words in err
    done = subprocess.run(two("--steps", "2", "--resume"), **PIPES, timeout=300)  # nothing of it is in the way
    assert done.returncode == 0 and (tmp_path / "run" / "model.safetensors").is_file(), done.stderr


def test_another_number_of_processes_than_the_profile_has_is_refused(two, monkeypatch, capfd):
    for name, value in {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    code, _, err = call(capfd, *two("--steps", "2")[3:])
    assert code == 2 and "3 processes were started, and cpu with ddp wants 2" in err


def test_a_step_of_several_slurm_tasks_is_a_world():
    step = {"SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "40123",
            "SLURM_STEP_NODELIST": "gpu[07-08],old3", "SLURM_STEP_TASKS_PER_NODE": "8(x2)"}
    adopt_slurm(step)
    assert {name: step[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")} == {
        "RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "gpu07"}
    assert 20000 <= int(step["MASTER_PORT"]) < 40000
    for environment in ({}, {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "1"},  # a batch script
                        {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
                        {**step, "RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}):
        before = dict(environment)
        adopt_slurm(environment)
        assert environment == before


def test_a_worker_is_started_with_what_its_launcher_was(monkeypatch):
    """Options in any order and form, a name that looks like one, settings more than once."""
    found = []
    monkeypatch.setattr("tryplicity.commands.train.train_into", lambda request, plugins, **budget: found.append(
        (dataclasses.replace(request, line=()), budget, request.line)))
    line = ["train", "--resume", "--set", "a=b c", "--hw=cpu", "--run", "x y", "--set", "d=-1", "--dollars", "0.1",
            "--", "--odd"]
    main(line, standalone_mode=False)
    main([*found[0][2]], standalone_mode=False)
    assert found[0] == found[1]
    request, budget, _ = found[0]
    assert (request.spec, request.settings, request.folder) == ("--odd", ("a=b c", "d=-1"), Path("x y"))
    assert budget == {"steps": None, "tokens": None, "minutes": None, "dollars": 0.1}
