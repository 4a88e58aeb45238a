"""The table of an ablation, as figures, Markdown and for the terminal.

Every effect is that of HAVING the module: (with it) - (without it), paired by seed. Loads no torch.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from tryplicity.ablation.cells import Setting, cell
from tryplicity.ablation.modules import Comparison
from tryplicity.pages import Console

ALPHA = 0.05

NOTE = ("Change: held-out bits per byte with the module minus without it, the mean over pairs of the same seed; "
        "negative is better. Interval: 95% of Student's t over those pairs, each by itself. p: of the two-sided paired "
        "t test, corrected for the number of modules compared (Holm); `pays` and `costs` where it is below 0.05, else "
        "`within noise`. Step time (per token, the median of alternating bursts and their quartiles): with the module "
        "against without it. Peak memory (above what the process held before the model): the difference of the means "
        "over several processes, and the least and the greatest difference between any two.")


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
        if len(self.differences) < 2:
            return None
        if self.deviation == 0:
            return self.mean, self.mean
        from scipy import stats

        low, high = stats.ttest_1samp(self.differences, 0.0).confidence_interval(1 - ALPHA)
        return float(low), float(high)

    @property
    def p(self) -> float | None:
        """Of the two-sided paired t test that the mean difference is zero."""
        if len(self.differences) < 2:
            return None
        if self.deviation == 0:
            return float(self.mean == 0)
        from scipy import stats

        return float(stats.ttest_1samp(self.differences, 0.0).pvalue)

    def verdict(self, corrected: float | None) -> str:
        """Of a figure of which less is better; corrected: p among all that are compared."""
        if not self.differences:
            return "not finished"
        if corrected is None:
            return "one seed"
        return "within noise" if corrected >= ALPHA else "pays" if self.mean < 0 else "costs"


def holm(p: Sequence[float | None]) -> list[float | None]:
    """The p values corrected for their number (Holm, Scandinavian Journal of Statistics 6, 1979); None stays None."""
    known = sorted((value, i) for i, value in enumerate(p) if value is not None)
    corrected: list[float | None] = [None] * len(p)
    largest = 0.0
    for rank, (value, i) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * value))
        corrected[i] = largest
    return corrected


def measured(rows: Sequence[Comparison], seeds: int, setting: Setting, finished: Mapping[str, Mapping[str, Any]],
             costs: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows as plain figures. finished: results by cell key; costs: by module."""
    figures, effects = [], []
    for row in rows:
        pairs = {}
        for seed in range(seeds):
            results = [finished.get(cell(v, seed, setting).key) for v in (row.with_it, row.without_it)]
            if all(results):
                pairs[seed] = [r["held_out_bits_per_byte"] for r in results]
        effect = Effect([w - wo for w, wo in pairs.values()])
        effects.append(effect)
        sides = list(zip(*pairs.values(), strict=True)) or [(), ()]
        figures.append({
            "module": row.module, "with": row.with_it.label, "without": row.without_it.label,
            "held_out_bits_per_byte": {
                "with": statistics.fmean(sides[0]) if pairs else None,
                "without": statistics.fmean(sides[1]) if pairs else None, "change": effect.mean,
                "standard_deviation": effect.deviation, "interval_95": effect.interval,
                "by_seed": {seed: {"with": w, "without": wo, "change": w - wo} for seed, (w, wo) in pairs.items()}},
            "seeds": len(pairs), "cost": _cost(costs.get(row.module))})
    judge(figures, effects)
    return figures


def judge(figures: Sequence[dict[str, Any]], effects: Sequence[Effect]) -> None:
    """Adds to each row its p, that corrected for all rows, and the verdict."""
    for row, effect, corrected in zip(figures, effects, holm([effect.p for effect in effects]), strict=True):
        row["held_out_bits_per_byte"] |= {"p": effect.p, "p_holm": corrected}
        row["verdict"] = effect.verdict(corrected)


def _cost(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if found is None:
        return None
    with_it, without_it = (statistics.fmean(found[side]) for side in ("memory_with", "memory_without"))
    return {"step_time_ratio": found["step_time_ratio"], "step_time_quartiles": found["quartiles"],
            "peak_memory_bytes": {"with": found["memory_with"], "without": found["memory_without"]},
            "peak_memory_ratio": with_it / without_it if without_it else None}


# --- in words ---

COLUMNS = ("module", "with", "without", "change", "sd", "95% interval", "p (Holm)", "seeds", "step time", "peak memory",
           "verdict")


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
        with_it, without_it = (cost["peak_memory_bytes"][side] for side in ("with", "without"))
        change = statistics.fmean(with_it) - statistics.fmean(without_it)
        low, high = min(with_it) - max(without_it), max(with_it) - min(without_it)
        memory = f"{change / 1e6:+,.0f} MB ({low / 1e6:+,.0f} to {high / 1e6:+,.0f})"
    return (row["module"], number(held_out["with"], ".4f"), number(held_out["without"], ".4f"),
            number(held_out["change"], "+.4f"), number(held_out["standard_deviation"], ".4f"),
            "-" if interval is None else f"{interval[0]:+.4f} to {interval[1]:+.4f}",
            number(held_out["p_holm"], ".3f"), str(row["seeds"]), step, memory, row["verdict"])


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
LESS_NEEDED, WIDE = ("with", "without", "sd", "p (Holm)", "seeds"), 165


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
        if not wide:
            figures = tuple(figure.partition(" (")[0] for figure in figures)  # without the spread of costs
        table.add_row(*(Text(figures[i], style=COLOURS.get(figures[i], "")) for i in shown))
    console.print()
    if wide:
        Console(highlight=False, width=max(console.width, WIDE)).print(table)
    else:
        console.print(table)
    console.print()
    console.print(Text(NOTE, style="dim"))
