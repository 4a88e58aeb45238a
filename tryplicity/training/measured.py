"""What a run really took, beside what was planned: peak memory, and the share of the machine's peak speed."""

from __future__ import annotations

import json
import resource
import statistics
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from tryplicity.builder import Build
from tryplicity.files import write_text
from tryplicity.planner.memory import GB
from tryplicity.run import Run
from tryplicity.training.metrics import read_lines
from tryplicity.training.process import say


def begin(device: torch.device) -> None:
    """Forget the peak so far: preparing data is no part of training."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):  # Linux alone can; elsewhere the peak is the process's
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> dict[str, int]:
    """peak_gb: the most that the device's allocator, or on a CPU this process, had of the system. tensors_gb: the most
    that tensors held of it, where that is known."""
    if device.type == "cuda":
        return {"peak_gb": torch.cuda.max_memory_reserved(device),
                "tensors_gb": torch.cuda.max_memory_allocated(device)}
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return {"peak_gb": 1024 * int(line.split()[1])}
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak_gb": most if sys.platform == "darwin" else 1024 * most}


def note(run: Run, build: Build, device: torch.device) -> None:
    """Write it into the run's build.json, as `measured`. This rank's device stands for all: they hold alike."""
    plan, hardware = build.plan, build.hardware
    memory = plan.nearest.memory
    measured: dict[str, Any] = {name: size / GB for name, size in peak_bytes(device).items()}
    measured |= {"planned_peak_gb": memory.total / GB, "planned_tensors_gb": memory.counted / GB}
    speeds = [line["tokens_per_second"] for line in read_lines(run.metrics) if line.get("tokens_per_second")]
    if speeds:
        measured["tokens_per_second"] = speed = statistics.median(speeds)
        measured["planned_tokens_per_second"] = plan.speed.tokens_per_second
        measured["utilisation"] = speed * plan.speed.flops_per_token / (hardware.devices * hardware.tflops * 1e12)
    try:
        said = json.loads(run.build.read_text(encoding="utf-8"))
        write_text(run.build, json.dumps(said | {"measured": measured}, indent=1))
    except (OSError, ValueError) as error:
        say(f"warning: {run.build}: what was measured could not be added: {error}")
