"""What one more healthy plugin costs each command: `python -m tests.benchmarks.plugins`.

Start-up with and without a package as `tryplicity plugins new` writes it, in turn, each in a process of its own; the
time is the processor's in `load_plugins`, whatever else the machine does, and the median is told. What the plugin's own
import of torch costs is paid when components are asked for, and not here.
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
TRIES = 15


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
        for _ in range(TRIES):
            number, took = seconds(None)
            without.append(took)
            more, took = seconds(folder)
            with_one.append(took)
            assert more == number + 1
    low, high = statistics.median(without), statistics.median(with_one)
    print(f"{number} plugins: {1e3 * low:.2f} ms; with one more: {1e3 * high:.2f} ms; {1e3 * (high - low):+.2f} ms "
          f"(medians of {TRIES}; least {1e3 * min(without):.2f} and {1e3 * min(with_one):.2f})")


if __name__ == "__main__":
    main()
