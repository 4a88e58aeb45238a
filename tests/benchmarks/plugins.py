"""What one more healthy plugin costs each command: `python -m tests.benchmarks.plugins`.

Start-up with and without a package as `tryplicity plugins new` writes it, in turn, each in a process of its own; the
time is the processor's in `load_plugins`, whatever else the machine does, and of the differences of the pairs the
median is told. What the plugin's own import of torch costs is paid when components are asked for, and not here.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tryplicity.scaffold import new_package

PROGRAM = """
import time
from tryplicity.plugins import load_plugins
start = time.process_time()
found = load_plugins().manager.list_name_plugin()
print(len(found), time.process_time() - start)
"""
PAIRS = 25


def seconds(folder: Path | None) -> tuple[int, float]:
    environment = os.environ | ({"PYTHONPATH": str(folder)} if folder else {})
    said = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    number, took = said.stdout.split()
    return int(number), float(took)


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "extra"
        new_package("extra-mixer", "mixer", folder)
        info = folder / "extra_mixer-0.1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: extra-mixer\nVersion: 0.1.0\n")
        (info / "entry_points.txt").write_text("[tryplicity]\nextra-mixer = extra_mixer\n")
        without, with_one = [], []
        for _ in range(PAIRS):
            number, took = seconds(None)
            without.append(took)
            more, took = seconds(folder)
            with_one.append(took)
            assert more == number + 1
    pairs = sorted(1e3 * (more - less) for less, more in zip(without, with_one, strict=True))
    print(f"{number} plugins: {1e3 * statistics.median(without):.2f} ms; with one more: "
          f"{1e3 * statistics.median(with_one):.2f} ms; the median of {PAIRS} pairs' differences "
          f"{statistics.median(pairs):+.2f} ms, half of them between {pairs[PAIRS // 4]:+.2f} and "
          f"{pairs[-1 - PAIRS // 4]:+.2f}")


if __name__ == "__main__":
    main()
