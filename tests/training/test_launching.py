"""Several ranks of one machine, as a user starts them: stopped, killed, hung, given different things.

The truth is what is on the disk and in the system afterwards: checkpoints, processes, what was said.
"""

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tryplicity.training import checkpoint
from tryplicity.training.metrics import read_lines

TWO = ["--set", "hardware.count=2", "--set", "hardware.strategy=ddp"]


@pytest.fixture
def two(command, tmp_path, monkeypatch):
    """`two("--steps", "9")`: the command line of a training on two ranks."""
    monkeypatch.setenv("TRYPLICITY_PATIENCE", "2")
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
    assert "on 2 ranks of this machine, ddp" in err and gone(ranks.values())

    process = start(two("--steps", "100000", "--resume"), **PIPES)
    wait_for_steps(process, run, newest + 3)
    ranks = ranks_of(process)
    os.kill(ranks[1], signal.SIGTERM)  # one of them is told; all stop, at the same step
    code, out, err = said(process)
    last = [line["step"] for line in read_lines(run / "metrics.jsonl")][-1]
    assert code == 143 and f"interrupted; all is saved at step {last}" in out and "error" not in err
    assert checkpoint.steps(run / "checkpoints")[-1] == last and gone(ranks.values())

    done = subprocess.run(two("--steps", str(last + 1), "--resume"), **PIPES, timeout=120)
    assert done.returncode == 0 and "held-out bits per byte" in done.stdout, done.stderr


@pytest.mark.parametrize("hung", [0, 1])
def test_a_rank_that_hangs_is_named_and_the_others_end(two, start, wait_for_steps, tmp_path, hung):
    process = start(two("--steps", "100000"), **PIPES)
    wait_for_steps(process, tmp_path / "run", 5)
    ranks = ranks_of(process)
    os.kill(ranks[hung], signal.SIGSTOP)
    code, _, err = said(process)
    assert code == 3 and err.count("has not answered for 2 s") == 1, err
    assert f"rank {hung} (process {ranks[hung]} on {socket.gethostname()}) has not answered" in err
    assert "the same command and --resume" in err and gone(ranks.values())


def test_no_rank_outlives_its_launcher(two, start, wait_for_steps, tmp_path):
    process = start(two("--steps", "100000"))
    wait_for_steps(process, tmp_path / "run", 1)
    ranks = ranks_of(process)
    os.kill(ranks[1], signal.SIGSTOP)
    process.kill()
    assert len(ranks) == 2 and gone(ranks.values())
