"""What a run's brain did: every statistic its layers logged, by layer and over time. Loads no torch.

It knows no module. A key of metrics.jsonl such as `layers.3.feed_forward.router.load` is a statistic by its last
name, of the layer by its first number, of the place by what is between; so a stranger's statistics show up like the
project's own. The tables below only give known names a title and a unit.

`summary` makes one plain object of a run, `page` draws that same object.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import time
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tryplicity.errors import UserError
from tryplicity.pages import ACCENT, Console, duration
from tryplicity.run import Run
from tryplicity.spec import read_yaml

READ = 1000  # lines that are read of a longer file, evenly spread
POINTS = 40  # of a statistic over time
CELL = 58  # characters one table needs beside another

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


# --- reading ---

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
        if isinstance(value, dict) and _is_number(value.get("step")):
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


def _is_number(value: Any) -> bool:
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
            whole.append({"key": key, "title": WHOLE.get(key, _words(key)), **row})
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
        "statistics": [{"name": name, "title": STATISTICS.get(name, (_words(name), ""))[0],
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
    lists = [value for _, value in series if isinstance(value, list) and value and all(map(_is_number, value))]
    if lists:
        return {"now": lists[-1], "lowest": min(lists[-1]), "highest": max(lists[-1])}
    numbers = [(step, value) for step, value in series if _is_number(value)]
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
        elif _is_number(value):
            numbers[prefix + key] = value
    return numbers


def _words(name: str) -> str:
    return name.replace("_", " ").replace(".", " ")


# --- drawing ---

BLOCKS = "▁▂▃▄▅▆▇█"


def sparkline(course: Sequence[float | None], width: int) -> str:
    """A row of block characters, lowest to highest of itself; a blank where there is no number."""
    points = min(width, len(course))
    parts = [[v for v in course[i * len(course) // points:(i + 1) * len(course) // points] if v is not None]
             for i in range(points)]
    means = [sum(part) / len(part) if part else None for part in parts]
    seen = [v for v in means if v is not None]
    low, high = min(seen, default=0.0), max(seen, default=0.0)
    if high - low <= 1e-3 * max(abs(low), abs(high)):  # what reads the same is drawn flat
        return "".join(" " if v is None else BLOCKS[3] for v in means)
    return "".join(" " if v is None else BLOCKS[min(int((v - low) / (high - low) * 8), 7)] for v in means)


def bars(values: Sequence[float], width: int) -> str:
    """One block for each value: ▄ is their mean, █ twice that or more, · nothing at all. Neighbours share a block
    where there are more values than `width`; with negative values the scale goes from lowest to highest."""
    step = -(-len(values) // width)
    values = [sum(part) / len(part) for part in (values[i:i + step] for i in range(0, len(values), step))]
    if min(values) < 0:
        return sparkline(values, len(values))
    mean = sum(values) / len(values)
    return "".join("·" if v == 0 else BLOCKS[min(max(round(v / mean * 4) - 1, 0), 7)] for v in values)


def _formatter(values: Iterable[float], unit: str = "", figures: int = 3) -> Callable[[float], str]:
    """One format for a column: so many figures of the largest."""
    factor, sign = (100.0, "%") if unit == "%" else (1.0, "")
    largest = max((abs(v) * factor for v in values), default=0.0)
    digits = figures - 1 - math.floor(math.log10(largest)) if largest and unit != "n" else 0
    if digits > 6 or largest >= 1e9:
        return lambda v: f"{v * factor:.2e}{sign}"
    decimals = min(max(digits, 0), 1 if unit == "%" else 6)
    return lambda v: f"{v * factor:,.{decimals}f}{sign}"


def _labels(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A row's layer, and its place as far as the places differ."""
    paths = [tuple(row["where"].split(".")) for row in rows]
    shared = 0
    while len(set(paths)) > 1 and len({path[:shared + 1] for path in paths}) == 1:
        shared += 1
    labels = []
    for row, path in zip(rows, paths, strict=True):
        layer = "" if row["layer"] is None else str(row["layer"])
        place = ".".join(path[shared:]) if len(set(paths)) > 1 else path[-1] if row["layer"] is None else ""
        labels.append(f"{layer} {place}".strip() or "model")
    return labels


def _table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str | Callable[[int], str]]], width: int,
           left: Sequence[int] = (0,), most: int = POINTS) -> Table:
    """A table not wider than `width`. headings: of the columns, right-justified but for those in `left`. A cell that
    is a function is drawn to the room that the others leave, at most `most`."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim", title_justify="left",
                  title_style="bold", title=title or None)
    sizes = [max([len(heading), *(len(row[i]) for row in rows if isinstance(row[i], str))])
             for i, heading in enumerate(headings)]
    drawn = {i for row in rows for i, cell in enumerate(row) if not isinstance(cell, str)}
    gaps = 2 * (len(headings) - 1)  # between columns
    others = sum(size for i, size in enumerate(sizes) if i not in drawn) + gaps
    sizes[0] -= max(others + 9 * len(drawn) - width, 0)  # a long name gives way
    room = min(max(width - sum(size for i, size in enumerate(sizes) if i not in drawn) - gaps, 8), most)
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="left" if i in left or i in drawn else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(_cut(cell, sizes[i])) if isinstance(cell, str) else Text(cell(room), style=ACCENT)
                        for i, cell in enumerate(row)))
    return table


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[:max(width - 1, 1)] + "…"


def _course_of(row: Mapping[str, Any]) -> Callable[[int], str]:
    return functools.partial(sparkline, row["over_time"])


def _statistic(statistic: Mapping[str, Any], width: int) -> tuple[Table, int]:
    """A table of one statistic, and its height."""
    rows = statistic["rows"]
    labels = _labels(rows)
    written = _formatter([v for row in rows for v in (row["lowest"], row["highest"])], statistic["unit"])
    ends = [(written(row["lowest"]), written(row["highest"])) for row in rows]
    lists = _longest(statistic)
    if len(rows) > 1 and not lists and len({number for end in ends for number in end}) == 1:
        rows, labels, ends = rows[:1], [f"all {len(rows)}"], ends[:1]  # the same everywhere, all the time
    if lists:
        cells = [(label, functools.partial(bars, row["now"] if isinstance(row["now"], list) else [row["now"]]), *end)
                 for row, label, end in zip(rows, labels, ends, strict=True)]
        table = _table(statistic["title"], ("layer", "now", "lowest", "highest"), cells, width, most=lists)
    else:
        cells = [(label, written(row["now"]), _course_of(row), *end)
                 for row, label, end in zip(rows, labels, ends, strict=True)]
        table = _table(statistic["title"], ("layer", "now", "over time", "lowest", "highest"), cells, width)
    return table, len(rows) + 3


def _beside(tables: Sequence[tuple[RenderableType, int]], columns: int) -> RenderableType:
    """Tables in columns, the next one always under the shortest."""
    stacks: list[list[RenderableType]] = [[] for _ in range(columns)]
    heights = [0] * columns
    for table, height in tables:
        place = heights.index(min(heights))
        stacks[place] += [table, Text()]
        heights[place] += height
    grid = Table.grid(padding=(0, 3, 0, 0), pad_edge=False)
    for _ in stacks:
        grid.add_column()
    grid.add_row(*(Group(*stack) for stack in stacks))
    return grid


def _overview(statistics: Sequence[Mapping[str, Any]], width: int) -> Table:
    """One row for each statistic: the mean over its rows."""
    cells = []
    for statistic in statistics:
        rows = [row for row in statistic["rows"] if not isinstance(row["now"], list)]
        if not rows:
            continue
        now = [row["now"] for row in rows]
        seen = [[v for v in column if v is not None] for column in zip(*(r["over_time"] for r in rows), strict=True)]
        mean = {"over_time": [sum(part) / len(part) if part else None for part in seen]}
        written = _formatter(now, "%" if statistic["unit"] == "%" else "")  # a mean of whole numbers is not whole
        cells.append((_cut(statistic["title"], 44), written(sum(now) / len(now)), _course_of(mean), written(min(now)),
                      written(max(now))))
    return _table("", ("mean of all layers", "now", "over time", "lowest", "highest"), cells, width)


def _span_table(key: str, spans: Sequence[Mapping[str, Any]], width: int) -> Table:
    first, last = spans[0]["first_step"], spans[-1]["last_step"]
    length = last - first + 1

    def bar(span: Mapping[str, Any], room: int) -> str:
        begin = (span["first_step"] - first) * room // length
        end = max((span["last_step"] - first + 1) * room // length, begin + 1)
        return " " * begin + "━" * (end - begin)

    cells = []
    for span in spans:
        losses = [f"{v:.2f}" if _is_number(v) else "-" for v in (span["first_loss"], span["last_loss"])]
        cells.append((span["name"], f"{span['first_step']:,}-{span['last_step']:,}", functools.partial(bar, span),
                      _size(span["tokens"]), _size(span["context_length"]), " → ".join(losses)))
    headings = (SPANS.get(key, _words(key)).lower(), "steps", "", "tokens", "context", "loss")
    return _table("", headings, cells, width)


def _size(value: Any) -> str:
    return f"{value:,}" if _is_number(value) else "-"


def _over_layers(sleep: Mapping[str, float]) -> dict[str, float]:
    """A sleep's numbers, what modules of several layers said as one: whole numbers added up, others their mean."""
    groups: dict[str, list[float]] = {}
    for key, value in sleep.items():
        if key != "step":
            groups.setdefault(key.rpartition(".")[2], []).append(value)
    return {name: sum(values) if all(float(v).is_integer() for v in values) else sum(values) / len(values)
            for name, values in groups.items()}


def _pairs(numbers: Mapping[str, float]) -> list[tuple[str, str | None, str]]:
    """(words, key of the number before, key of it after): X_before and X_after (or what is expected after) are one."""
    found: list[tuple[str, str | None, str]] = []
    for key in numbers:
        bare = key.removesuffix("_after").removesuffix("_expected")
        if bare != key and f"{bare}_before" in numbers:
            found.append((_words(bare), f"{bare}_before", key))
        elif not (key.endswith("_before") and {f"{key[:-7]}_after", f"{key[:-7]}_expected"} & set(numbers)):
            found.append((_words(key), None, key))
    return found


def _sleeps(sleeps: Sequence[Mapping[str, float]], width: int) -> RenderableType:
    """The last sleep, before and after, and the course of each number over all sleeps."""
    nights, cells = [_over_layers(sleep) for sleep in sleeps], []
    last = nights[-1]
    for words, before, after in _pairs(last):
        both = [last[key] for key in (before, after) if key]
        written = _formatter(both, "n" if all(float(v).is_integer() for v in both) else "", figures=4)
        course = {"over_time": [night.get(after) for night in nights]}
        cells.append((words, written(last[before]) if before else "", written(last[after]),
                      *([_course_of(course)] if len(sleeps) > 1 else [])))
    steps = ", ".join(f"{sleep['step']:,}" for sleep in sleeps[-4:])
    title = f"slept after step {'... ' if len(sleeps) > 4 else ''}{steps}"
    headings = (title, "before", "after", *(["all sleeps"] if len(sleeps) > 1 else []))
    return _table("", headings, cells, width)


def _whole(rows: Sequence[Mapping[str, Any]], width: int) -> Table:
    cells = []
    for row in rows:
        if "over_time" in row:
            ends = (row["lowest"], row["highest"])
            written = _formatter(ends, "n" if all(isinstance(v, int) for v in ends) else "", figures=4)
            cells.append((row["title"], written(row["now"]), _course_of(row), *map(written, ends)))
    return _table("", ("whole model", "now", "over time", "lowest", "highest"), cells, width)


def page(told: Mapping[str, Any], width: int, *, short: bool = False) -> RenderableType:
    """The object of `summary` for a person; short: one row for each statistic instead of a table by layer."""
    if not told["lines_read"]:
        return Text(f"{told['run']}: no step is logged yet; its first one fills this page")
    where = ", ".join(f"{key} {name}" for key, name in told["now"].items()
                      if key != "phase" or len(told["spans"][key]) > 1)
    spent = "" if told["tokens"] is None else f", {told['tokens']:,} tokens"
    spent += "" if told["seconds"] is None else f", {duration(told['seconds'])}"
    spent += "" if told["dollars"] is None else f", ${told['dollars']:,.2f}"
    parts: list[RenderableType] = [Text.assemble((told["run"], f"bold {ACCENT}"), f"   step {told['step']:,}{spent}",
                                                 (f"   {where}" if where else "", "bold")), Text()]
    if not told["statistics"]:
        parts += [Text("No layer of this run logs statistics"
                       + (f"; its brain modules ({', '.join(told['brain'])}) report below." if told["brain"] else
                          ". One line of YAML brings some, such as activation: spike in a feed-forward.")), Text()]
    elif short:
        parts += [_overview(told["statistics"], width), Text()]
    else:
        columns = max(width // CELL, 1)
        across = width if columns == 1 else width // columns - 3
        wide = [s for s in told["statistics"] if _longest(s) > across - 30]
        beside = [_statistic(s, across) for s in told["statistics"] if s not in wide]
        parts += [part for s in wide for part in (_statistic(s, width)[0], Text())]
        parts += [_beside(beside, columns)] if beside else []
        if any(_longest(s) for s in told["statistics"]):
            parts += [Text("a block for each expert: ▄ the mean of its row, █ twice that or more, · nothing",
                           style="dim"), Text()]
    for key, spans in told["spans"].items():
        if key == "phase" and len(spans) == 1:
            continue  # a run of one phase is not news
        parts += [_span_table(key, spans, width), Text()]
    if told["sleeps"]:
        parts += [_sleeps(told["sleeps"], width), Text()]
    parts.append(_whole(told["model"], width))
    if told["losses_not_a_number"]:
        parts.append(Text(f"in {told['losses_not_a_number']:,} of the lines read the loss is not a number",
                          style="yellow"))
    if told["lines_read"] + told["lines_unreadable"] < told["lines"]:
        parts.append(Text(f"read {told['lines_read']:,} of {told['lines']:,} lines, evenly spread: lowest and highest "
                          "are of these", style="dim"))
    return Group(*parts)


def _longest(statistic: Mapping[str, Any]) -> int:
    """How many values a statistic's longest list has."""
    return max((len(row["now"]) for row in statistic["rows"] if isinstance(row["now"], list)), default=0)


# --- the command ---

def show(folder: Path, *, as_json: bool = False, follow: bool = False, every: float = 2.0) -> None:
    """Print a run's page; follow: draw it anew when a line came, every few seconds until Ctrl-C."""
    if as_json and follow:
        raise UserError("--json prints once and ends; leave --follow away")
    run, console = Run.open(folder), Console(highlight=False)
    told = summary(run)
    if as_json:
        print(json.dumps(told, indent=1))
        return
    if follow:
        told = _follow(run, told, console, every)
    console.print(page(told, console.width))


def _follow(run: Run, told: dict[str, Any], console: Console, every: float) -> dict[str, Any]:
    def drawn() -> RenderableType:
        whole = page(told, console.width)
        fits = len(console.render_lines(whole, pad=False)) < console.height
        return whole if fits else page(told, console.width, short=True)

    try:
        with Live(drawn(), console=console, screen=True, auto_refresh=False) as live:
            size = -1
            while True:
                began = time.monotonic()
                if (now := run.metrics.stat().st_size if run.metrics.exists() else 0) != size:
                    size, told = now, summary(run)
                    live.update(drawn(), refresh=True)
                time.sleep(max(every, 4 * (time.monotonic() - began)))  # a long file must not take a core
    except KeyboardInterrupt:
        return told
