"""What `tryplicity brain` shows: a run's summary, drawn for a terminal."""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tryplicity.brain_summary import POINTS, SPANS, is_number, summary, words
from tryplicity.errors import UserError
from tryplicity.pages import ACCENT, Console, duration
from tryplicity.run import Run

CELL = 58  # characters one table needs beside another
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
        losses = [f"{v:.2f}" if is_number(v) else "-" for v in (span["first_loss"], span["last_loss"])]
        cells.append((span["name"], f"{span['first_step']:,}-{span['last_step']:,}", functools.partial(bar, span),
                      _size(span["tokens"]), _size(span["context_length"]), " → ".join(losses)))
    headings = (SPANS.get(key, words(key)).lower(), "steps", "", "tokens", "context", "loss")
    return _table("", headings, cells, width)


def _size(value: Any) -> str:
    return f"{value:,}" if is_number(value) else "-"


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
            found.append((words(bare), f"{bare}_before", key))
        elif not (key.endswith("_before") and {f"{key[:-7]}_after", f"{key[:-7]}_expected"} & set(numbers)):
            found.append((words(key), None, key))
    return found


def _sleeps(sleeps: Sequence[Mapping[str, float]], width: int) -> RenderableType:
    """The last sleep, before and after, and the course of each number over all sleeps."""
    nights, cells = [_over_layers(sleep) for sleep in sleeps], []
    last = nights[-1]
    for name, before, after in _pairs(last):
        both = [last[key] for key in (before, after) if key]
        written = _formatter(both, "n" if all(float(v).is_integer() for v in both) else "", figures=4)
        course = {"over_time": [night.get(after) for night in nights]}
        cells.append((name, written(last[before]) if before else "", written(last[after]),
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
