"""The table of an ablation, as figures, Markdown and for the terminal.

Every effect is that of HAVING the module: (with it) - (without it), paired by seed. Loads no torch.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from tryplicity.ablation.cells import Setting, cell
from tryplicity.ablation.modules import Comparison
from tryplicity.pages import Console

#: Student's t, 97.5%, by degrees of freedom from 1 on
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
         2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)
Z_975 = 1.959964

NOTE = ("Change: held-out bits per byte with the module minus without it, the mean over pairs of the same seed; "
        "negative is better. Interval: 95% of Student's t over those pairs; `within noise` where it holds zero. "
        "Step time (per token, the median of alternating bursts and their quartiles) and peak memory (above what the "
        "process held before the model): with the module against without it.")


def t_975(freedom: int) -> float:
    """The 97.5% point of Student's t; beyond the table by the first term of its expansion around the normal's
    (Abramowitz and Stegun 26.7.5)."""
    return T_975[freedom - 1] if freedom <= len(T_975) else Z_975 + (Z_975**3 + Z_975) / (4 * freedom)


@dataclass(frozen=True)
class Effect:
    """What having a module changes, paired by seed."""

    differences: Sequence[float]

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.differences) if self.differences else None

    @property
    def deviation(self) -> float | None:
        """The sample standard deviation of the differences."""
        return statistics.stdev(self.differences) if len(self.differences) > 1 else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95% t interval of the mean difference."""
        count = len(self.differences)
        if count < 2:
            return None
        half = t_975(count - 1) * self.deviation / math.sqrt(count)
        return self.mean - half, self.mean + half

    @property
    def verdict(self) -> str:
        """Of a figure of which less is better."""
        if not self.differences:
            return "not finished"
        if self.interval is None:
            return "one seed"
        low, high = self.interval
        return "pays" if high < 0 else "costs" if low > 0 else "within noise"


def measured(rows: Sequence[Comparison], seeds: int, setting: Setting, finished: Mapping[str, Mapping[str, Any]],
             costs: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows as plain figures. finished: results by cell key; costs: by module."""
    figures = []
    for row in rows:
        pairs = {}
        for seed in range(seeds):
            results = [finished.get(cell(v, seed, setting).key) for v in (row.with_it, row.without_it)]
            if all(results):
                pairs[seed] = [r["held_out_bits_per_byte"] for r in results]
        effect = Effect([w - wo for w, wo in pairs.values()])
        sides = list(zip(*pairs.values(), strict=True)) or [(), ()]
        figures.append({
            "module": row.module, "with": row.with_it.label, "without": row.without_it.label,
            "held_out_bits_per_byte": {
                "with": statistics.fmean(sides[0]) if pairs else None,
                "without": statistics.fmean(sides[1]) if pairs else None, "change": effect.mean,
                "standard_deviation": effect.deviation, "interval_95": effect.interval,
                "by_seed": {seed: {"with": w, "without": wo, "change": w - wo} for seed, (w, wo) in pairs.items()}},
            "seeds": len(pairs), "verdict": effect.verdict, "cost": _cost(costs.get(row.module))})
    return figures


def _cost(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if found is None:
        return None
    with_it, without_it = found["memory_with"], found["memory_without"]
    return {"step_time_ratio": found["step_time_ratio"], "step_time_quartiles": found["quartiles"],
            "peak_memory_bytes": {"with": with_it, "without": without_it},
            "peak_memory_ratio": with_it / without_it if without_it else None}


# --- in words ---

COLUMNS = ("module", "with", "without", "change", "sd", "95% interval", "seeds", "step time", "peak memory", "verdict")


def cells_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    """A row's figures as text, in the order of COLUMNS; - where there is none yet."""
    held_out, cost = row["held_out_bits_per_byte"], row["cost"]
    interval = held_out["interval_95"]

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    step = memory = "-"
    if cost:
        low, high = (100 * (ratio - 1) for ratio in cost["step_time_quartiles"])
        step = f"{100 * (cost['step_time_ratio'] - 1):+.1f}% ({low:+.1f} to {high:+.1f})"
        change = cost["peak_memory_bytes"]["with"] - cost["peak_memory_bytes"]["without"]
        memory = f"{change / 1e6:+,.0f} MB" + ("" if cost["peak_memory_ratio"] is None else
                                              f" ({100 * (cost['peak_memory_ratio'] - 1):+.1f}%)")
    return (row["module"], number(held_out["with"], ".4f"), number(held_out["without"], ".4f"),
            number(held_out["change"], "+.4f"), number(held_out["standard_deviation"], ".4f"),
            "-" if interval is None else f"{interval[0]:+.4f} to {interval[1]:+.4f}", str(row["seeds"]), step, memory,
            row["verdict"])


def facts(report: Mapping[str, Any]) -> list[str]:
    """What stands above the table, a line each."""
    rows = "all held-out rows" if report["rows"] == 0 else f"{report['rows']} held-out rows"
    base = ("each module alone, against the spec without any of them" if report["alone"]
            else "the spec as it is, against it without each module")
    return [f"{report['command']}",
            f"{base}; {report['tokens']:,} tokens a cell, {report['seeds']} seed{'s' * (report['seeds'] != 1)}, "
            f"{rows}; data {report['data']} ({report['data_identity'][:10]})",
            f"commit {', '.join(report['commits']) or 'unknown'}; torch {', '.join(report['torch']) or 'unknown'}; "
            f"{report['processor']}, {report['cores']} core{'s' * (report['cores'] != 1)}",
            f"{report['cells']['finished']} of {report['cells']['total']} cells finished; only the pretraining phase "
            "is measured"]


def markdown(report: Mapping[str, Any]) -> str:
    """report.md."""
    command, *others = facts(report)
    lines = [f"# What each module of {report['spec']} buys", "", f"    {command}", ""]
    lines += [f"- {fact}" for fact in others]
    lines += ["", NOTE, "", "| " + " | ".join(COLUMNS) + " |", "|---" + "|---:" * (len(COLUMNS) - 2) + "|---|"]
    lines += ["| " + " | ".join(cells_of(row)) + " |" for row in report["modules"]]
    return "\n".join([*lines, "", "![the changes and their intervals](report.svg)", ""])


COLOURS = {"pays": "green", "costs": "red"}
LESS_NEEDED, WIDE = ("with", "without", "sd", "seeds"), 150


def page(report: Mapping[str, Any], console: Any) -> None:
    """The same for a terminal."""
    command, *others = facts(report)
    console.print(Text(command, style="bold"))
    for fact in others:
        console.print(Text(fact, style="dim"))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    wide = not console.is_terminal or console.width >= WIDE
    shown = [i for i, column in enumerate(COLUMNS) if wide or column not in LESS_NEEDED]
    for i in shown:
        table.add_column(COLUMNS[i], justify="left" if i in (0, len(COLUMNS) - 1) else "right", no_wrap=True)
    for row in report["modules"]:
        figures = cells_of(row)
        table.add_row(*(Text(figures[i], style=COLOURS.get(figures[i], "")) for i in shown))
    console.print()
    if wide:
        Console(highlight=False, width=max(console.width, WIDE)).print(table)
    else:
        console.print(table)
    console.print()
    console.print(Text(NOTE, style="dim"))
