"""What a run says it took."""

import json
import mmap
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tryplicity.training import measured
from tryplicity.training.metrics import read_lines

CPU = torch.device("cpu")


def test_a_run_says_what_it_took_beside_what_was_planned(command, tmp_path):
    done = subprocess.run(command("run", "--steps", "6"), capture_output=True, text=True, check=True)
    said = json.loads((tmp_path / "run" / "build.json").read_text())
    found = said["measured"]
    speeds = [line["tokens_per_second"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")
              if "tokens_per_second" in line]
    assert len(speeds) == 6 and found["tokens_per_second"] == statistics.median(speeds)
    profile = 0.15e12  # hardware/cpu.yaml
    assert found["utilisation"] == pytest.approx(
        found["tokens_per_second"] * said["throughput"]["flops_per_token"] / profile)
    assert 0.1 < found["peak_gb"] < 2
    memory = said["memory"]
    assert found["planned_peak_gb"] == memory["total_gb"]
    assert found["planned_tensors_gb"] == pytest.approx(memory["total_gb"] - memory["parts"]["overhead"])
    assert f"{found['peak_gb']:.2f} GB (planned {found['planned_peak_gb']:.2f})" in done.stdout
    assert f"utilisation: {found['utilisation']:.2g}" in done.stdout
    assert said["fits"] is True, "what was planned stands as it was"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere the peak is that of the whole process")
def test_what_was_before_a_training_is_not_in_its_peak():
    with mmap.mmap(-1, 400_000_000) as before:  # not of malloc, which may keep what it was given back
        for page in range(0, len(before), mmap.PAGESIZE):
            before[page] = 1
        with_it = measured.peak_bytes(CPU)["peak_gb"]
    measured.begin(CPU)
    assert measured.peak_bytes(CPU)["peak_gb"] < with_it - 200_000_000


def test_where_nothing_is_known_of_it_the_peak_of_the_process_stands(monkeypatch):
    monkeypatch.setattr(measured, "Path", lambda name: Path("/nowhere") / name.strip("/"))
    measured.begin(CPU)
    assert 10**7 < measured.peak_bytes(CPU)["peak_gb"] < 10**11
