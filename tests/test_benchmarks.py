"""The command for a rented card, at tiny sizes on a CPU: every part runs, and one that does not costs itself alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def benchmark(tmp_path, *options):
    done = subprocess.run([sys.executable, "-m", "tests.benchmarks.card", "--device", "cpu", "--spec",
                           str(ROOT / "tests" / "small.yaml"), "--json", str(tmp_path / "card.json"), *options],
                          capture_output=True, text=True, cwd=ROOT)
    return done, json.loads((tmp_path / "card.json").read_text())


def test_three_parts(tmp_path):
    done, found = benchmark(tmp_path, "--only", "eager,decoding,answers")
    assert done.returncode == 0, done.stderr + done.stdout
    assert list(found["parts"]) == ["eager", "decoding", "answers"]
    assert all(part["ok"] for part in found["parts"].values())
    speeds = {name: part["tokens_per_second"] for name, part in found["parts"].items()}
    assert min(speeds["eager"], speeds["decoding"], *speeds["answers"].values()) > 0 and len(speeds["answers"]) == 4
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["eager", "decoding", "answers", "all"]


def test_a_part_that_takes_too_long_is_ended_and_said(tmp_path):
    done, found = benchmark(tmp_path, "--only", "eager,decoding", "--minutes", "0.1")
    assert done.returncode == 1 and "not done after" in found["parts"]["eager"]["result"]
    assert found["parts"]["decoding"]["result"].startswith(("no time was left", "not done after"))


def test_the_command_itself_trains_under_fsdp_on_one_device(tmp_path):
    done, found = benchmark(tmp_path, "--only", "command", "--minutes", "40")
    measured = found["parts"]["command"]["measured"]
    assert done.returncode == 0 and measured["peak_gb"] > 0 < measured["planned_peak_gb"], done.stdout


@pytest.mark.slow
def test_all_parts(tmp_path):
    done, found = benchmark(tmp_path)
    assert done.returncode == 0, done.stderr + done.stdout
    assert list(found["parts"])[:2] == ["right", "compiled"] and len(found["parts"]) == 12
    assert not found["parts"]["compiled"]["fell_back"]
