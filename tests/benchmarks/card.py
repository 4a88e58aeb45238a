"""Everything that only a graphics card can tell, in one command: are the fast ways right, how fast, how much memory.

    python -m tests.benchmarks.card [--spec 5090] [--minutes 9] [--json FILE]       on a rented card
    python -m tests.benchmarks.card --device cpu                                    the same at tiny sizes, to try it

Each part is a process of its own with a time limit, the most valuable first, so that one that hangs or crashes costs
its own time alone. One table at the end, and one JSON object with all figures; both are written again after each part.
`command` is `tryplicity train` itself, under fsdp on the one device: its measured peak beside the plan.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks import card_answers, card_choices, card_operators, card_parts, card_train
from tests.benchmarks.card_parts import ROOT, Place

#: the parts and the share of the time that each may take, the most valuable first
PARTS: dict[str, tuple[Callable[[Place], dict[str, Any]], float]] = {
    "right": (card_parts.right, 0.25), "compiled": (card_parts.compiled, 0.25), "eager": (card_parts.eager, 0.1),
    "answers": (card_answers.answers, 0.4),
    "command": (card_train.command, 0.25), "once": (card_parts.once, 0.25), "profile": (card_parts.profile, 0.2),
    "waits": (card_parts.waits, 0.2), "compiled_again": (card_parts.compiled_again, 0.2),
    "decoding": (card_parts.decoding, 0.1), "operators": (card_operators.operators, 0.2),
    "choices": (card_choices.choices, 0.2)}


def run_part(name: str, options: Sequence[str], limit: float) -> dict[str, Any]:
    """One part in a process of its own: what it found, or how it ended."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "tests.benchmarks.card", "--part", name, *options], cwd=ROOT,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        out, err = process.communicate(timeout=limit)
        lines = out.strip().splitlines()
        found = json.loads(lines[-1]) if process.returncode == 0 and lines else {
            "result": f"ended with {process.returncode}: {(err.strip().splitlines() or ['nothing said'])[-1]}",
            "ok": False, "stderr": err[-4000:]}
    except subprocess.TimeoutExpired:
        _end(process)
        found = {"result": f"not done after {limit:.0f} s", "ok": False}
    return {**found, "seconds": round(time.perf_counter() - started, 1)}


def _end(process: subprocess.Popen) -> None:
    """With the compilers that it started."""
    import os
    import signal

    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--spec", help="by default 5090, on a CPU tiny")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--rows", type=int, help="of a forward pass, by default 4, on a CPU 1")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--json", type=Path, default=Path("card.json"))
    parser.add_argument("--only", help="parts by name, with commas")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    given = parser.parse_args()
    on_card = given.device == "cuda"
    spec, rows = given.spec or ("5090" if on_card else "tiny"), given.rows or (4 if on_card else 1)
    if given.part:
        print(json.dumps(PARTS[given.part][0](Place(spec, given.device, rows))))
        return 0
    options = ["--spec", spec, "--device", given.device, "--rows", str(rows)]
    found: dict[str, Any] = {"spec": spec, "device": given.device, "rows": rows, "parts": {}}
    deadline = time.monotonic() + 60 * given.minutes
    for name in given.only.split(",") if given.only else PARTS:
        left = deadline - time.monotonic()
        limit = min(left, 60 * given.minutes * PARTS[name][1])
        found["parts"][name] = run_part(name, options, limit) if left > 5 else {
            "result": "no time was left", "ok": False, "seconds": 0.0}
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        part = found["parts"][name]
        verdict = "good" if part["ok"] else "LOOK"
        print(f"{name:>15} {verdict:>5} {part['seconds']:7.1f} s  {part['result']}", flush=True)
    print(f"all figures: {given.json}")
    return 0 if all(part["ok"] for part in found["parts"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
