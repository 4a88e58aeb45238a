"""`tryplicity ablate`, from its options to the report."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tryplicity import pages
from tryplicity.ablation import display
from tryplicity.ablation.cells import Cell, Setting, cell, result, table
from tryplicity.ablation.modules import Comparison, comparisons
from tryplicity.ablation.report import Effect
from tryplicity.ablation.runner import Job, cores, run_cells
from tryplicity.errors import Refused


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


def ablate(request: Request, plugins: Any, *, train: bool = True, cost: bool = True, as_json: bool = False) -> int:
    """Train the cells that are missing, measure the cost that is missing, report; returns the exit code.

    Raises UserError and Refused before anything is trained when a variant of the spec cannot be.
    """
    rows, setting, prepared = _prepare(request, plugins)
    cells, failed, stopped = table(rows, request.seeds, setting), [], None
    if train:
        failed, stopped = _train(request, rows, cells, prepared, plugins)
    finished = {one.key: done for one in cells if (done := result(one.folder(request.out)))}
    for row in rows:
        effect = Effect(tuple(_differences(row, request.seeds, setting, finished)))
        print(row.module, effect.mean, effect.deviation, effect.interval, effect.verdict)
    if stopped is not None:
        pages.console.print(f"interrupted; {len(finished)} of {len(cells)} cells are finished and all is saved. Go on "
                            "with the same command")
        return 128 + stopped
    return 1 if failed else 0


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


def _train(request: Request, rows: list[Comparison], cells: list[Cell], prepared: Any,
           plugins: Any) -> tuple[list[Job], int | None]:
    """Train the cells that are not finished; the failed ones, and the signal that ended it, if one did."""
    from tryplicity.training.process import StopSignals

    missing = [one for one in cells if result(one.folder(request.out)) is None]
    plans = _plans(rows, cells[0].setting.hardware, plugins) if missing else {}
    tokenizer = prepared.tokenizer_path.read_text(encoding="utf-8")
    jobs = [Job(one.create(request.out, plans[one.label], tokenizer), f"{one.label}, seed {one.seed}")
            for one in missing]
    if not jobs:
        return [], None
    with StopSignals() as signals, display.cells(len(jobs)) as shown:
        failed = run_cells(jobs, min(request.jobs or cores(), len(jobs)), shown, signals.requested)
    return failed, signals.received


def _plans(rows: list[Comparison], hardware: Any, plugins: Any) -> dict[str, Any]:
    """Each variant's plan as build.json holds it. Raises Refused when one does not fit or cannot be trained."""
    from tryplicity.model import assemble
    from tryplicity.planner import plan

    plans = {}
    for variant in {v.label: v for row in rows for v in (row.with_it, row.without_it)}.values():
        planned = plan(assemble(variant.spec), hardware, plugins.registry)
        if not planned.fits:
            raise Refused(f"{variant.label}: {variant.spec.name} does not fit on {hardware.name}")
        strategy = plugins.registry.part("parallelism", planned.chosen.name).build()
        if strategy.cannot_train:
            raise Refused(strategy.cannot_train)
        plans[variant.label] = planned.as_dict()
    return plans


def _differences(row: Comparison, seeds: int, setting: Setting, finished: dict[str, dict[str, Any]]) -> Any:
    for seed in range(seeds):
        pair = [finished.get(cell(v, seed, setting).key) for v in (row.with_it, row.without_it)]
        if all(pair):
            yield pair[0]["held_out_bits_per_byte"] - pair[1]["held_out_bits_per_byte"]
