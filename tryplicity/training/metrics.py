"""metrics.jsonl: one object a line, one line a step; and what a person sees of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


def _finite(value: Any) -> Any:
    """JSON has no NaN: null stands for it."""
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(v) for name, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list) else value


class MetricsFile:
    """Appends to metrics.jsonl; opened at a step, it first drops the lines of later steps, and of a sleep that is
    to be slept again."""

    def __init__(self, path: Path, step: int, slept_at: int = -1) -> None:
        lines = [line for line in read_lines(path) if line["step"] <= step
                 and ("sleep" not in line or line["step"] <= slept_at)] if path.exists() else []
        from tryplicity.files import write_text

        write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
        self._file = path.open("a", encoding="utf-8")

    def write(self, metrics: dict[str, Any]) -> None:
        self._file.write(json.dumps({k: _finite(v) for k, v in metrics.items()}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a metrics file; a last line cut short by a kill is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def curve(values: list[float], *, width: int = 72, height: int = 12) -> str:
    """A line chart in text: braille dots, the largest value on top, both ends of the scale written."""
    values = [v for v in values if v is not None and math.isfinite(v)]
    if len(values) < 2:
        return ""
    columns = min(width * 2, len(values))
    means = [sum(part) / len(part) for part in
             (values[i * len(values) // columns:(i + 1) * len(values) // columns] for i in range(columns))]
    low, high = min(means), max(means)
    rows = height * 4
    dots = [[0] * ((columns + 1) // 2) for _ in range(height)]
    bits = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
    before = None
    for x, value in enumerate(means):
        y = round((high - value) / (high - low or 1) * (rows - 1))
        before = y if before is None else before
        for filled in range(min(y, before), max(y, before) + 1):
            dots[filled // 4][x // 2] |= bits[filled % 4][x % 2]
        before = y
    lines = ["".join(chr(0x2800 + cell) for cell in row) for row in dots]
    labels = {0: f"{high:8.3f} ", height - 1: f"{low:8.3f} "}
    return "\n".join(labels.get(i, " " * 9) + "┤" + line for i, line in enumerate(lines))
