"""`tryplicity eval`: what a model is worth, on held-out text and on tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from tryplicity.commands.options import Number, plugin_options, resolved
from tryplicity.errors import UserError


@click.command("eval")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--data", metavar="SOURCE", help="Other text than what the run held out; all of it.")
@click.option("--share", type=Number(0, 1, min_open=True), metavar="SHARE",
              help="With --data: only so large a share of its documents, the same each time.")
@click.option("--tasks", metavar="TASK,TASK", help="Not held-out text, but tasks of the lm-evaluation-harness.")
@click.option("--tasks-folder", type=click.Path(path_type=Path, exists=True, file_okay=False), metavar="DIR",
              help="With --tasks: YAML files of further tasks.")
@click.option("--limit", type=click.IntRange(1), help="With --tasks: so many documents of each.")
@click.option("--checkpoint", metavar="step-N", help="Not the run's weights, but those of a checkpoint.")
@click.option("--device", default="cpu", show_default=True, help="What the model runs on: cpu, cuda, cuda:1, mps.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@plugin_options
def eval_(run: Path, data: str | None, share: float | None, tasks: str | None, tasks_folder: Path | None,
          limit: int | None, checkpoint: str | None, device: str, as_json: bool, plugins: Any) -> None:
    """Measure the model of RUN (a run folder or an exported file): bits per byte of held-out text by domain; or what it
    reaches in tasks of the lm-evaluation-harness.

    \b
    Example: tryplicity eval runs/first
             tryplicity eval runs/first --checkpoint step-1000 --data my_notes
             tryplicity eval runs/first --tasks arc_easy,hellaswag --limit 100
    """
    if tasks is None and (tasks_folder is not None or limit is not None):
        raise UserError("--tasks-folder and --limit are for --tasks; add it, or leave them out")
    if tasks is not None and data is not None:
        raise UserError("--data is for held-out text, and tasks bring their own; leave one of --data and --tasks out")
    if share is not None and data is None:
        raise UserError("--share is for --data; without it the run's own held-out documents are measured, all of them")
    from tryplicity import pages
    from tryplicity.evaluation.report import evaluate
    from tryplicity.inference.engine import usable_device
    from tryplicity.training.process import limit_spinning, tune_malloc

    limit_spinning()
    tune_malloc()
    run = resolved(run, plugins).path
    what = run if checkpoint is None else _checkpoint(run, checkpoint)
    if tasks is not None:
        said = _tasks(what, plugins, [task.strip() for task in tasks.split(",")], tasks_folder, limit, device)
        click.echo(json.dumps(said, indent=1, ensure_ascii=False, default=str)) if as_json else pages.tasks_page(said)
        return
    usable_device(device)
    with pages.preparation() as progress:
        said = evaluate(what, plugins.registry, data, share or 1.0, device, progress,
                        lambda line: pages.status.print(line, markup=False))
    if as_json:
        click.echo(json.dumps(said, indent=1, ensure_ascii=False))
    else:
        pages.evaluation_page(said)


def _tasks(what: Path, plugins: Any, tasks: list[str], folder: Path | None, limit: int | None,
           device: str) -> dict[str, Any]:
    import importlib.util

    if importlib.util.find_spec("lm_eval") is None:
        raise UserError('--tasks needs the lm-evaluation-harness: pip install "tryplicity[lm-eval]"')
    from tryplicity import pages
    from tryplicity.evaluation.harness import run_tasks
    from tryplicity.inference.engine import Engine

    engine = Engine.load(what, plugins.registry, device, ternary=False)
    try:
        with pages.preparation() as progress:
            return run_tasks(engine, tasks, folder, limit, progress)
    finally:
        engine.close()


def _checkpoint(run: Path, name: str) -> Path:
    """The folder of a run's checkpoint. Raises UserError, with those that are there, where it is none."""
    from tryplicity.run import Run
    from tryplicity.training.checkpoint import steps

    folder = Run.open(run).checkpoints
    found = folder / (f"step-{name}" if name.isdecimal() else name)
    if found.parent != folder or not (found / "complete.json").is_file():
        there = ", ".join(f"step-{step}" for step in steps(folder)) or "none"
        raise UserError(f"--checkpoint {name}: {run} has no such checkpoint; there is {there}")
    return found
