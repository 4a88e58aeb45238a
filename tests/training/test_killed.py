"""Runs as a user starts them, in a process of their own: killed, starved of disk, given wrong folders."""

import random
import resource
import signal
import subprocess

import torch
from safetensors.torch import load_file


def run(line, **options):
    return subprocess.run(line, capture_output=True, text=True, timeout=300, **options)


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
