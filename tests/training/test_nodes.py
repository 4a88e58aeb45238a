"""Several machines, each stood for by a launcher of its own on this one."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

from tests.command_line import call
from tests.ranks import together
from tryplicity.training import checkpoint
from tryplicity.training.metrics import read_lines

PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
TWO = ["--set", "hardware.nodes=2", "--set", "hardware.count=2"]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def laid_out(world):
    from tryplicity import load_plugins
    from tryplicity.model import assemble
    from tryplicity.spec import load_spec

    registry = load_plugins().registry
    strategy = registry.part("parallelism", "fsdp").build()
    model = strategy.place(assemble(load_spec("tests/small.yaml", registry)), world, 0)
    weight = model.layers[0].mixer.in_proj.weight if hasattr(model.layers[0].mixer, "in_proj") else next(
        model.layers[0].parameters())
    return weight.device_mesh.mesh.tolist(), weight.to_local().shape[0] / weight.shape[0]


def test_by_default_a_machine_holds_a_whole_copy_among_its_ranks():
    found = together(4, laid_out, environment={"LOCAL_WORLD_SIZE": "2"})
    assert found == [([[0, 1], [2, 3]], 0.5)] * 4
    assert together(2, laid_out) == [([0, 1], 0.5)] * 2


def test_machines_that_see_other_run_folders_are_told_before_the_first_step(command, start, tmp_path):
    shared = {**os.environ, "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": str(free_port()), "TRYPLICITY_THREADS": "1"}
    settings = ["--steps", "2", "--set", "hardware.nodes=2", "--set", "hardware.strategy=ddp"]
    ranks = [start(command(folder, *settings), **PIPES, env={**shared, "RANK": str(rank)})
             for rank, folder in enumerate(("here", "there"))]
    for process, folder in zip(ranks, ("here", "there"), strict=True):
        _, err = process.communicate(timeout=300)
        assert process.returncode == 2 and "Traceback" not in err, err
        assert f"{tmp_path / folder} on {socket.gethostname()} is not the run folder of rank 0" in err
    assert not list(tmp_path.rglob("*.tmp-*")) and not (tmp_path / "here" / "metrics.jsonl").exists()


@pytest.mark.parametrize(("started", "words"), [
    ({}, "2 machines are to train together, and each has to be told: torchrun --nnodes=2 --nproc-per-node=2"),
    ({"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"},
     "4 of the 4 processes were started on this machine, and cpu has 2 devices in each: --set hardware.count=4 "
     "--set hardware.nodes=1"),
    ({"RANK": "0", "WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "2"},
     "wants 4: start 4, or --set hardware.count=2 --set hardware.nodes=3")])
def test_processes_that_are_not_the_profile_s_are_refused(command, monkeypatch, capfd, tmp_path, started, words):
    for name, value in started.items():
        monkeypatch.setenv(name, value)
    code, _, err = call(capfd, *command("run", "--steps", "2", "--set", "hardware.strategy=ddp", *TWO)[3:])
    assert code == 2 and words in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.fixture
def agents(start, tmp_path):
    """`agents(line)`: torch's own launcher on each of two machines, with two ranks."""
    def go(line):
        port = free_port()
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2",
                    "--master-addr=127.0.0.1", f"--master-port={port}"]
        environment = {**os.environ, "TRYPLICITY_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        return [start([*torchrun, f"--node-rank={node}", "--no-python", "--", *line], **PIPES, env=environment)
                for node in (0, 1)]

    return go


@pytest.mark.slow
def test_two_machines_under_torchrun_train_as_one_process_does(command, agents, wait_for_steps, tmp_path):
    """By hybrid sharding; one of them is told to stop on the way, and both go on after it."""
    exact = ["--set", "training.optimizer.fused=false", "--set", "hardware.batch=1"]
    alone = subprocess.run(command("one", "--steps", "8", *exact, "--set", "hardware.accumulation=4", "--set",
                                   "hardware.strategy={type: single, exact: true}"), **PIPES, timeout=900)
    assert alone.returncode == 0, alone.stderr
    line = command("run", "--steps", "8", *exact, *TWO, "--set", "hardware.strategy={type: fsdp, exact: true}")
    first, second = agents(line)
    wait_for_steps(first, tmp_path / "run", 2)
    second.send_signal(signal.SIGTERM)
    for process in (first, second):
        process.communicate(timeout=600)
    saved = checkpoint.steps(tmp_path / "run" / "checkpoints")[-1]
    assert 2 <= saved < 8
    said = [process.communicate(timeout=900) for process in agents([*line, "--resume"])]
    assert "held-out bits per byte" in said[0][0], said[0][1]
    assert "held-out bits per byte" not in said[1][0]

    def losses(folder):
        return {line["step"]: line["loss"] for line in read_lines(tmp_path / folder / "metrics.jsonl")
                if "loss" in line}

    assert losses("run") == pytest.approx(losses("one"), rel=1e-5) and len(losses("run")) == 8
    ours, theirs = (load_file(tmp_path / folder / "model.safetensors") for folder in ("run", "one"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert_close(ours[name], tensor, rtol=0, atol=1e-5)
    index = json.loads((tmp_path / "run" / "checkpoints" / "step-8" / "index.json").read_text())
    pieces = re.findall(r"-of-(\d+)", json.dumps(index))
    assert set(pieces) == {"00004"} and Path(tmp_path / "run" / "checkpoints" / "step-8" / "complete.json").is_file()
