"""Runs as a user starts them, in a process of their own: killed, starved of disk, given wrong folders."""

import random
import re
import resource
import signal
import subprocess

import pytest
import torch
from safetensors.torch import load_file

from tests.ranks import together
from tests.training.whole_runs import train_there
from tryplicity.run import Run
from tryplicity.training.checkpoint import damage, newest, steps
from tryplicity.training.copying import Target
from tryplicity.training.folder import alone
from tryplicity.training.metrics import read_lines


def run(line, **options):
    return subprocess.run(line, capture_output=True, text=True, timeout=900, **options)


def test_killed_at_a_random_step_and_resumed_is_never_killed_bit_for_bit(command, start, wait_for_steps, tmp_path):
    steps = ["--steps", "24", "--set", "training.checkpoint_every=3"]
    assert run(command("whole", *steps)).returncode == 0
    process = start(command("cut", *steps))
    wanted = random.randint(4, 20)
    wait_for_steps(process, tmp_path / "cut", wanted)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    resumed = run(command("cut", *steps, "--resume"))
    assert resumed.returncode == 0, resumed.stderr
    whole, cut = (load_file(tmp_path / folder / "model.safetensors") for folder in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    for name, tensor in whole.items():
        assert torch.equal(cut[name], tensor), f"{name} differs after a kill at step {wanted}"


def test_a_disk_that_is_full_costs_the_checkpoint_and_not_the_run(command, tmp_path):
    """The largest file the process may write is smaller than a checkpoint, as on a disk with no room left."""
    small = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))  # noqa: E731
    starved = run(command("run", "--steps", "9"), preexec_fn=small)
    folder = tmp_path / "run"
    assert starved.returncode == 1 and "Traceback" not in starved.stderr
    assert starved.stderr.count("the checkpoint could not be written") == 3
    assert "training goes on" in starved.stderr and "go on with --resume" in starved.stderr
    assert not (folder / "model.safetensors").exists()
    assert list((folder / "checkpoints").iterdir()) == []  # nothing half-written
    assert run(command("run", "--steps", "9", "--resume")).returncode == 0
    assert (folder / "model.safetensors").is_file()


def test_wrong_ways_to_start_give_one_line_each(command, tmp_path, corpus):
    done = run(command("run", "--steps", "2"))
    assert done.returncode == 0, done.stderr
    assert "held-out bits per byte:" in done.stdout and "byte bigram" in done.stdout
    tokenizer = tmp_path / "run" / "tokenizer.json"
    (tmp_path / "empty").mkdir()
    (tmp_path / "latin").mkdir()
    (tmp_path / "latin" / "a.txt").write_bytes("d\xe9j\xe0 vu ".encode("latin-1") * 100)
    data = command("other", "--steps", "2")
    at = data.index(str(corpus))
    cases = [
        (command("run", "--steps", "2"), "a run is there already; add --resume"),
        (command("new"), "exactly one of --steps, --tokens, --minutes and --dollars"),
        (command("new", "--steps", "2", "--minutes", "1"), "exactly one of"),
        (command("run", "--steps", "4", "--resume", "--set", "hidden_size=64"), "belongs to another spec"),
        (command("run", "--steps", "4", "--resume", "--set", "vocab_size=290"), "the tokenizer has 300 tokens"),
        ([*data[:at], str(tmp_path / "empty"), *data[at + 1:]], "empty"),
        ([*data[:at], str(tmp_path / "latin"), *data[at + 1:]], "a.txt"),
        ([*data[:at], str(tmp_path / "nowhere"), *data[at + 1:]], "no such file or folder"),
        ([*data, "--set", "vocab_size=60000"], "too small for a vocabulary of 60000"),
    ]
    for line, message in cases:
        result = run(line)
        assert result.returncode == 2, (line, result)
        assert message in result.stderr and "Traceback" not in result.stderr, (message, result.stderr)
    tokenizer.write_text("{")
    result = run(command("run", "--steps", "4", "--resume"))
    assert result.returncode == 2 and "tokenizer.json" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("kills", [5, pytest.param(100, marks=pytest.mark.slow)])
def test_ranks_killed_at_any_moment_lose_nothing_that_was_complete(kills, corpus, cache, prepared, tmp_path, capsys):
    """Two ranks, of which one is killed: in a step, a sleep, while a checkpoint is written, dropped or copied (there
    too by the number of things done to files, for those moments are short). Each goes on from a complete checkpoint,
    and every run ends as one that was never killed."""
    random.seed(seed := random.SystemRandom().randrange(10**6))
    brain = "brain=[{type: sleep_consolidation, every: 4, replay_steps: 1, average: 2}]"

    def go(name, kill=None):
        with alone(Run(tmp_path / name / "run")):
            return together(2, train_there, str(corpus), str(cache), str(tmp_path / name / "run"),
                            [brain, "phases=[]", "hardware.count=2", "hardware.strategy={type: ddp, exact: true}"],
                            6, 0, kill, f"file://{tmp_path}/{name}/run/../far", limit=1800)

    (reason, events, seconds), (_, fewer, _) = go("whole")
    assert reason == "budget"
    whole, number = Run(tmp_path / "whole" / "run"), 0
    for _ in range(kills):
        run, rank = Run(tmp_path / str(number) / "run"), random.choice([0, 0, 1])
        kill = (rank, "seconds", random.uniform(0, 1.2 * seconds)) if random.random() < 0.4 else (
            rank, "events", random.randint(1, fewer if rank else events))
        before = steps(run.checkpoints) if run.exists() else []
        try:
            go(str(number), kill)
        except AssertionError as killed:
            # what the other rank has to say of it may come first
            assert re.search("exit code -9|by peer|Broken pipe", str(killed)), (seed, kill, str(killed))
            with alone(run):
                if found := steps(run.checkpoints):
                    assert newest(run.checkpoints) == run.checkpoints / f"step-{found[-1]}", (seed, kill)
                assert not before or found[-1] >= before[-1], (seed, kill)
            far = Target(f"file://{run.folder.parent}/far")
            if there := far.steps():
                assert damage(run.folder.parent / "far" / "checkpoints" / f"step-{there[-1]}") is None, (seed, kill)
        else:
            number += _ended_alike(run, whole, (seed, kill))
    go(str(number))
    _ended_alike(Run(tmp_path / str(number) / "run"), whole, seed)


def _ended_alike(run, whole, which):
    """A run that went on after kills, and one that never was: weights, losses, checkpoints, copies. Gives 1."""
    assert run.weights.read_bytes() == whole.weights.read_bytes(), which
    losses, wanted = ({line["step"]: line["loss"] for line in read_lines(one.metrics) if "loss" in line}
                      for one in (run, whole))
    assert losses == wanted, which
    assert steps(run.checkpoints) == steps(whole.checkpoints), which
    assert steps(run.folder.parent / "far" / "checkpoints")[-1] == steps(whole.checkpoints)[-1], which
    assert not [path for path in run.folder.rglob(".*") if path.name != "lock"], which
    return 1
