"""What a run's brain did, as one plain object: every statistic its layers logged, by layer and over time. Loads no
torch.

It knows no module. A key of metrics.jsonl such as `layers.3.feed_forward.router.load` is a statistic by its last
name, of the layer by its first number, of the place by what is between; so a stranger's statistics show up like the
project's own. The tables below only give known names a title and a unit.
"""

from __future__ import annotations

import itertools
import json
import math
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tryplicity.errors import UserError
from tryplicity.run import Run
from tryplicity.spec import read_yaml

READ = 1000  # lines that are read of a longer file, evenly spread
POINTS = 40  # of a statistic over time

#: last name of a key -> title and unit ("%": of a share; "n": a number of things); also the order on the page
STATISTICS: dict[str, tuple[str, str]] = {
    "zero_rate": ("Zeros after the spikes", "%"),
    "zero_rate_spread": ("Zeros after the spikes, spread over neurons", "%"),
    "experts_per_token": ("Experts per token", ""),
    "experts_per_token_spread": ("Experts per token, spread over tokens", ""),
    "difficulty": ("Difficulty of a token", ""),
    "difficulty_spread": ("Difficulty, spread over tokens", ""),
    "load": ("Load of each expert", "%"),
    "load_entropy": ("Evenness of the load (1: even)", ""),
    "load_max_over_mean": ("Busiest expert over the mean", ""),
    "dead_experts": ("Experts without a token in the step", "n"),
    "similarity": ("Likeness of the experts' weights (cosine)", ""),
    "chosen_similarity": ("Likeness of a token's experts (cosine)", ""),
    "surprise": ("Surprise of the right token", ""),
    "weight_spread": ("Surprise weights, spread over tokens", ""),
    "propagated": ("Tokens whose loss is propagated", "%"),
    "correlation": ("Correlation of a block's features", ""),
    "sparsity": ("Size of a block's features (0.8: Gaussian)", ""),
    "prediction_error": ("Error of a block's self-prediction", ""),
}
#: keys of the whole model, in this order before all others -> title
WHOLE: dict[str, str] = {
    "loss": "loss (nats a token)",
    "weighted_loss": "the same, weighted by surprise",
    "total_loss": "all losses together",
    "validation_bits_per_byte": "held-out bits per byte",
    "chat_validation_bits_per_byte": "held-out bits per byte of answers",
    "learning_rate": "learning rate",
    "gradient_norm": "gradient norm",
    "tokens_per_second": "tokens per second",
    "context_length": "context length",
}
CLOCKS = ("step", "tokens", "seconds", "dollars")  # they only grow: said in the first line
SPANS = {"phase": "Phases", "stage": "Stages"}


class Log:
    """A metrics file: all of a short one; of a long one, lines evenly spread, and besides all that are rare.

    lines: number of the line -> its object. total: lines in the file. unreadable: those that are no object (a last
    line cut short by a kill, say).
    """

    def __init__(self, path: Path, read: int = READ) -> None:
        self.lines: dict[int, dict[str, Any]] = {}
        self.unreadable = 0
        starts, chosen = array("Q"), {}
        if path.exists():
            step = max(path.stat().st_size / read, 1.0)
            with path.open("rb") as file:
                position, wanted = 0, 0.0
                for number, line in enumerate(file):
                    starts.append(position)
                    position += len(line)
                    if position > wanted or b'"sleep": {' in line or b'validation_bits_per_byte"' in line:
                        chosen[number] = line
                        wanted = max(wanted, position - position % step + step)
                    recent = line
                if starts:
                    chosen[len(starts) - 1] = recent
                self.total = len(starts)
                for number, line in sorted(chosen.items()):
                    self._take(number, line)
                self._find_changes(lambda number: (file.seek(starts[number]), file.readline())[1])
        self.total = len(starts)
        self.lines = dict(sorted(self.lines.items()))

    def _take(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if isinstance(value, dict) and is_number(value.get("step")):
            self.lines[number] = value
            return value
        self.unreadable += bool(line.strip())
        return {}

    def _find_changes(self, line: Callable[[int], bytes]) -> None:
        """Between two lines of steps that were read and differ in a name (the stage, say), find where it changed."""
        read = [number for number in sorted(self.lines) if "loss" in self.lines[number]]
        names = {key for number in read for key, value in self.lines[number].items() if isinstance(value, str)}
        for low, high in itertools.pairwise(read):
            for key in names:
                before, first, last = self.lines[low].get(key), low, high
                if self.lines[high].get(key) == before:
                    continue
                while last - first > 1:
                    middle = found = (first + last) // 2
                    # a line that is not of a step says nothing: the next one does
                    while found < last and "loss" not in (
                            value := self.lines.get(found) or self._take(found, line(found))):
                        found += 1
                    if found < last and value.get(key) == before:
                        first = found
                    else:
                        last = middle


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


# --- what a run's numbers come to ---

def summary(run: Run) -> dict[str, Any]:
    """The numbers of the page as one object for JSON."""
    log = Log(run.metrics)
    lines = list(log.lines.values())
    steps = [line for line in lines if "loss" in line]
    keys = dict.fromkeys(key for line in lines for key in line)
    ends = (lines[0]["step"], lines[-1]["step"]) if lines else (0, 0)

    rows: dict[str, list[dict[str, Any]]] = {}
    whole = []
    for key in keys:
        series = [(line["step"], line[key]) for line in lines if key in line]
        row = _row(series, ends)
        if row is None or key in CLOCKS:
            continue
        if "." in key:
            rows.setdefault(key.rpartition(".")[2], []).append({"key": key, **_place(key), **row})
        else:
            whole.append({"key": key, "title": WHOLE.get(key, words(key)), **row})
    known = list(STATISTICS)
    names = sorted(rows, key=lambda name: (known.index(name) if name in known else len(known), name))
    spans = {key: _spans(steps, key) for key in keys if any(isinstance(line.get(key), str) for line in steps)}
    order = list(SPANS)
    return {
        "run": str(run.folder), "brain": _brain_of(run), "lines": log.total, "lines_read": len(lines),
        "lines_unreadable": log.unreadable,
        **{clock: next((line[clock] for line in reversed(lines) if clock in line), None) for clock in CLOCKS},
        "now": {key: steps[-1][key] for key in spans if isinstance(steps[-1].get(key), str)},
        "losses_not_a_number": sum(line["loss"] is None or not math.isfinite(line["loss"]) for line in steps),
        "statistics": [{"name": name, "title": STATISTICS.get(name, (words(name), ""))[0],
                        "unit": STATISTICS.get(name, ("", ""))[1],
                        "rows": sorted(rows[name], key=lambda r: (r["layer"] is None, r["where"], r["layer"]))}
                       for name in names],
        "spans": {key: spans[key] for key in sorted(spans, key=lambda k: (order.index(k) if k in order else 9, k))},
        "sleeps": [{"step": line["step"], **_numbers(line["sleep"])} for line in lines
                   if isinstance(line.get("sleep"), dict)],
        "model": sorted(whole, key=lambda row: list(WHOLE).index(row["key"]) if row["key"] in WHOLE else len(WHOLE)),
    }


def _brain_of(run: Run) -> list[str]:
    """The modules that the run's spec names under `brain`; none where that cannot be read."""
    try:
        parts = read_yaml(run.spec).data.get("brain") or []
        return [part["type"] if isinstance(part, Mapping) else str(part) for part in parts]
    except (UserError, KeyError, TypeError):
        return []


def _place(key: str) -> dict[str, Any]:
    """'layers.3.feed_forward.router.load' -> layer 3, where feed_forward.router."""
    path = key.split(".")[:-1]
    at = next((i for i, step in enumerate(path) if step.isdecimal()), None)
    if at is None:
        return {"layer": None, "where": ".".join(path)}
    return {"layer": int(path[at]), "where": ".".join(path[at + 1:])}


def _row(series: Sequence[tuple[int, Any]], ends: tuple[int, int]) -> dict[str, Any] | None:
    """Now, lowest, highest and the course of one key; None if it has no numbers. Of a list: its last value, and
    the lowest and highest in that."""
    lists = [value for _, value in series if isinstance(value, list) and value and all(map(is_number, value))]
    if lists:
        return {"now": lists[-1], "lowest": min(lists[-1]), "highest": max(lists[-1])}
    numbers = [(step, value) for step, value in series if is_number(value)]
    if not numbers:
        return None
    values = [value for _, value in numbers]
    return {"now": values[-1], "lowest": min(values), "highest": max(values), "over_time": _course(numbers, ends)}


def _course(numbers: Sequence[tuple[int, float]], ends: tuple[int, int]) -> list[float | None]:
    """Means of at most POINTS equal stretches of the run; where nothing was measured, the value before holds."""
    first, length = ends[0], ends[1] - ends[0] + 1
    points = min(POINTS, length)
    parts: list[list[float]] = [[] for _ in range(points)]
    for step, value in numbers:
        parts[min(max((step - first) * points // length, 0), points - 1)].append(value)
    course: list[float | None] = []
    for part in parts:
        course.append(sum(part) / len(part) if part else course[-1] if course else None)
    return course


def _spans(lines: Iterable[Mapping[str, Any]], key: str) -> list[dict[str, Any]]:
    """Over which steps a name held, one after another, and the loss it began and ended with."""
    found: list[dict[str, Any]] = []
    for line in lines:
        if not isinstance(line.get(key), str):
            continue
        if not found or found[-1]["name"] != line[key]:
            found.append({"name": line[key], "first_step": line["step"], "first_loss": line["loss"]})
        found[-1] |= {"last_step": line["step"], "tokens": line.get("tokens"), "last_loss": line["loss"],
                      "context_length": line.get("context_length")}
    return found


def _numbers(said: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of an object; those of an object inside it under `outer_inner`."""
    numbers: dict[str, float] = {}
    for key, value in said.items():
        if isinstance(value, Mapping):
            numbers |= _numbers(value, f"{prefix}{key}_")
        elif is_number(value):
            numbers[prefix + key] = value
    return numbers


def words(name: str) -> str:
    return name.replace("_", " ").replace(".", " ")
