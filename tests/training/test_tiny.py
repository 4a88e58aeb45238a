"""The installed tiny spec on the embedded corpus, as a newcomer runs it. Minutes: `make nightly` runs these."""

import json
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    return lambda run, *options: [sys.executable, "-m", "tryplicity.cli", "train", "tiny", "--hw", "cpu", "--data",
                                  "python-docs", "--run", str(folder / run), *options], folder


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_two_minutes_end_in_a_score(command):
    """Whether it learns as it should is held step by step by the recorded curve in test_run: how far two minutes go
    depends on the machine."""
    line, folder = command
    done = subprocess.run(line("two-minutes", "--minutes", "2"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = next(text for text in done.stdout.splitlines() if text.startswith("held-out bits per byte"))
    assert f"held-out bits per byte: {last_score(folder / 'two-minutes'):.3f}" in said
    print(said)


def last_score(folder):
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["validation_bits_per_byte"]


def test_the_same_seed_twice_and_a_kill_in_between(command):
    line, folder = command
    steps = ["--steps", "40", "--set", "training.checkpoint_every=7"]
    for run in ("first", "second"):
        assert subprocess.run(line(run, *steps), capture_output=True).returncode == 0
    process = subprocess.Popen(line("killed", *steps), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics, wanted = folder / "killed" / "metrics.jsonl", random.randint(8, 35)
    while not metrics.exists() or metrics.read_text().count("\n") < wanted:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert subprocess.run(line("killed", *steps, "--resume"), capture_output=True).returncode == 0
    assert losses(folder / "first") == losses(folder / "second") == losses(folder / "killed")
    weights = [load_file(folder / run / "model.safetensors") for run in ("first", "second", "killed")]
    for name, tensor in weights[0].items():
        assert torch.equal(weights[1][name], tensor) and torch.equal(weights[2][name], tensor), name
    print(f"killed after step {wanted}; 40 losses and {len(weights[0])} tensors equal")
