"""`tryplicity train` as a user types it, under fsdp on one device: does it run with the card's own communication
library, and is its peak what was planned?"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.benchmarks.card_parts import ROOT, Place

SYLLABLES = [first + second for first in "bdfgklmnprstvz" for second in ("a", "e", "i", "o", "u", "an", "er", "is")]
FILES = 40


def made_up(folder: Path, count: int) -> None:
    """Texts of so many made-up words: a rented machine may reach nothing else."""
    rng = random.Random(0)
    words = ["".join(rng.choices(SYLLABLES, k=rng.randint(2, 4))) for _ in range(count)]
    for number in range(FILES):
        # each word at least twice, so that a tokenizer finds them all
        own = words[number::FILES] * 2 + rng.choices(words, k=count // 20)
        rng.shuffle(own)
        (folder / f"{number:02}.txt").write_text(" ".join(own) + "\n")


def command(place: Place) -> dict[str, Any]:
    """Three steps of two micro-batches; the measured peak beside the planned one."""
    with tempfile.TemporaryDirectory() as folder:
        data, run = Path(folder) / "data", Path(folder) / "run"
        data.mkdir()
        made_up(data, 40_000 if place.device == "cuda" else 1_000)  # the former give a vocabulary of 32,000
        hardware = "5090" if place.device == "cuda" else "cpu"
        settings = ["hardware.strategy={type: fsdp, shards: 1}", "hardware.count=1", f"hardware.batch={place.rows}",
                    "hardware.accumulation=2", "hardware.memory_gb=1000", "phases=[]", "training.compile=off"]
        line = [sys.executable, "-m", "tryplicity.cli", "train", place.spec, "--hw", hardware, "--data", str(data),
                "--run", str(run), "--steps", "3", *(text for one in settings for text in ("--set", one))]
        done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        measured = json.loads((run / "build.json").read_text())["measured"]
    if "tensors_gb" not in measured:  # of a process on a CPU only the whole is known, interpreter and all
        return {"result": f"trained; this process had {measured['peak_gb']:.2f} GB, planned "
                          f"{measured['planned_peak_gb']:.2f}", "ok": True, "measured": measured}
    beside = measured["tensors_gb"] / measured["planned_tensors_gb"] - 1
    return {"result": f"peak of tensors {measured['tensors_gb']:.2f} GB, {beside:+.1%} of the plan's "
                      f"{measured['planned_tensors_gb']:.2f}; reserved {measured['peak_gb']:.2f}, planned "
                      f"{measured['planned_peak_gb']:.2f}; {measured['tokens_per_second']:,.0f} tokens/s",
            "ok": abs(beside) < 0.05, "measured": measured}
