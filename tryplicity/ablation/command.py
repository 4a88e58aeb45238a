"""`tryplicity ablate`, from its options to the report."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tryplicity import pages
from tryplicity.ablation import display
from tryplicity.ablation.cells import Cell, Setting, result, table
from tryplicity.ablation.cost import key, known, measure
from tryplicity.ablation.modules import Comparison, comparisons
from tryplicity.ablation.picture import svg
from tryplicity.ablation.report import markdown, measured, page
from tryplicity.ablation.runner import Job, cores, run_cells
from tryplicity.errors import Refused, UserError
from tryplicity.files import may_be_written, write_text


@dataclass(frozen=True)
class Request:
    """What the command line asked for."""

    spec: str
    hardware: str
    settings: tuple[str, ...]
    data: str
    modules: tuple[str, ...]
    alone: bool
    seeds: int
    tokens: int
    rows: int
    out: Path
    jobs: int | None
    plugin_files: tuple[str, ...]

    def command(self) -> str:
        """The command line that asks for this, without the paths of this machine."""
        words = ["tryplicity", "ablate", portable(self.spec), "--hw", portable(self.hardware), "--data",
                 portable(self.data)]
        for name, values in (("--without", self.modules), ("--set", self.settings), ("--plugin", self.plugin_files)):
            values = [*map(portable, values)]
            values = [",".join(values)] if values and name == "--without" else values
            words += [word for value in values for word in (name, value)]
        words += ["--alone"] * self.alone + ["--seeds", str(self.seeds), "--tokens", str(self.tokens)]
        return shlex.join([*words, "--rows", str(self.rows), "--out", portable(self.out)])


def portable(path: str | Path) -> str:
    """A path as another machine may have it too: what is below this folder from here, else the name alone; so with
    every absolute path in a text. What is no path stays as it is."""
    if not os.path.isabs(path):
        return re.sub(r"(?<![\w.:/-])/[^\s,'\"{}\[\]]+", lambda found: portable(found[0]), str(path))
    relative = os.path.relpath(path)
    return Path(path).name if relative.startswith("..") else relative


def _is_ablation(path: Path) -> bool:
    return any((path / name).exists() for name in ("cells", "cost.json", "report.json"))


def ablate(request: Request, plugins: Any, *, train: bool = True, cost: bool = True, as_json: bool = False) -> int:
    """Train the cells that are missing, measure the cost that is missing, report; returns the exit code.

    Raises UserError and Refused before anything is trained when a variant of the spec cannot be.
    """
    from tryplicity.training.process import StopSignals, exit_code

    if request.out.is_file():
        raise UserError(f"{request.out}: this is a file; give the folder to keep the cells and reports in")
    may_be_written(request.out, "an ablation's folder", _is_ablation)
    rows, setting, prepared = _prepare(request, plugins)
    cells, out = table(rows, request.seeds, setting), request.out
    missing = [one for one in cells if result(one.folder(out)) is None] if train else []
    unmeasured = [row for row in rows if key(row, setting) not in known(out)] if cost else []
    failures: list[str] = []
    out.mkdir(parents=True, exist_ok=True)
    with StopSignals() as signals:
        if missing or unmeasured:
            plans, tokenizer = _plans(rows, setting.hardware, plugins), prepared.tokenizer_path.read_text("utf-8")
            jobs = [Job(one.create(out, plans[one.label], tokenizer), f"{one.label}, seed {one.seed}")
                    for one in missing]
            if jobs:
                with display.cells(len(jobs)) as shown:
                    failed = run_cells(jobs, min(request.jobs or cores(), len(jobs)), shown, signals.requested)
                failures += [f"{job.name}: {job.cause}" for job in failed]
            failures += _measure(unmeasured, setting, out, plans, tokenizer, signals.requested)

    report = _report(request, rows, cells, setting)
    write_text(out / "report.json", json.dumps(report, indent=1))
    write_text(out / "report.md", markdown(report))
    write_text(out / "report.svg", svg(report))
    if as_json:
        print(json.dumps(report, indent=1))
    else:
        page(report, pages.console)
        pages.console.print(f"\n{out / 'report.md'}  {out / 'report.json'}  {out / 'report.svg'}", style="dim")
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    if signals.received is not None:
        counts = report["cells"]
        print(f"interrupted; {counts['finished']} of {counts['total']} cells are finished and all is saved. Go on with "
              "the same command", file=sys.stderr)
        return exit_code(signals.received)
    return 1 if failures else 0


def _prepare(request: Request, plugins: Any) -> tuple[list[Comparison], Setting, Any]:
    """The rows of the table, what their cells have in common, and the data."""
    from tryplicity.data import parse_source, prepare
    from tryplicity.hardware import load_hardware
    from tryplicity.spec import apply_settings, find_file, read_yaml

    profile_settings = [s.removeprefix("hardware.") for s in request.settings if s.startswith("hardware.")]
    hardware = load_hardware(request.hardware, plugins.registry, profile_settings)
    source = read_yaml(find_file(request.spec, "spec"))
    apply_settings(source, [s for s in request.settings if not s.startswith("hardware.")])
    rows = comparisons(source, request.modules, plugins.registry, request.alone)
    with pages.preparation() as progress:
        prepared = prepare(parse_source(plugins.registry, request.data), rows[0].with_it.spec.vocab_size,
                           progress=progress)
    setting = Setting(request.tokens, request.rows, request.data, prepared.identity, hardware, request.plugin_files)
    return rows, setting, prepared


def _plans(rows: list[Comparison], hardware: Any, plugins: Any) -> dict[str, Any]:
    """Each variant's plan as build.json holds it. Raises Refused when one does not fit or cannot be trained."""
    from tryplicity.model import assemble
    from tryplicity.planner import plan

    plans = {}
    for variant in {v.label: v for row in rows for v in (row.with_it, row.without_it)}.values():
        planned = plan(assemble(variant.spec), hardware, plugins.registry)
        if not planned.fits:
            raise Refused(f"{variant.label}: {variant.spec.name} does not fit on {hardware.name}")
        strategy = plugins.registry.part("parallelism", hardware.options_of(planned.chosen.name)).build()
        if (ranks := strategy.ranks(hardware)) > 1:
            raise Refused(f"{planned.chosen.name} trains on {ranks} ranks, and an ablation measures on one; give it "
                          "hardware.count=1, hardware.nodes=1 and hardware.strategy=single")
        plans[variant.label] = planned.as_dict()
    return plans


def _measure(rows: list[Comparison], setting: Setting, out: Path, plans: dict[str, Any], tokenizer: str,
             stopping: Callable[[], bool]) -> list[str]:
    """Measure what these rows cost, one after another; what went wrong."""
    failures = []
    with display.measuring(len(rows)) as shown:
        for row in rows:
            if stopping():
                break
            try:
                measure(row, setting, out, plans, tokenizer, lambda share, row=row: shown(row.module, share), stopping)
            except Refused as error:
                failures.append(f"the cost of {row.module}: {error}")
    return failures


def _report(request: Request, rows: list[Comparison], cells: list[Cell], setting: Setting) -> dict[str, Any]:
    """All of report.json."""
    finished = {one.key: done for one in cells if (done := result(one.folder(request.out)))}
    costs = known(request.out)
    measured_costs = {row.module: costs[key(row, setting)] for row in rows if key(row, setting) in costs}
    return {
        "spec": rows[0].with_it.spec.name, "command": request.command(), "alone": request.alone,
        "tokens": request.tokens, "seeds": request.seeds, "rows": request.rows,
        "data": portable(request.data),
        "data_identity": setting.data_identity,
        "commits": sorted({done["commit"] for done in finished.values() if done["commit"]}),
        "torch": sorted({done["torch"] for done in finished.values()}), "processor": processor(), "cores": cores(),
        "modules": measured(rows, request.seeds, setting, finished, measured_costs),
        "cells": {"finished": len(finished), "total": len(cells), "each": [
            {"label": one.label, "seed": one.seed, "folder": str(one.folder(request.out).relative_to(request.out)),
             **{name: finished.get(one.key, {}).get(name) for name in (
                 "held_out_bits_per_byte", "training_loss", "tokens", "steps", "seconds", "threads", "commit")}}
            for one in cells]}}


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
