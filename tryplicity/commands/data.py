"""`tryplicity data`: corpora by recipe: download, filter, inspect. Loads no torch until a judge needs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from tryplicity.commands.options import given_plugins, plugin_options
from tryplicity.commands.prepare import prepare
from tryplicity.errors import UserError


@click.group()
def data() -> None:
    """A corpus by a recipe: downloaded, freed of copies, judged; then train on it with --data corpus:DIR. `prepare`
    does all of it in one go.

    Example: tryplicity data prepare python-small --out corpora/small
    """


data.add_command(prepare)


def recipe_options(command: Any) -> Any:
    command = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")(command)
    command = click.option("--set", "settings", multiple=True, metavar="PATH=VALUE",
                           help="Change a value of the recipe (bytes=1e9, sources[0].share=2).")(command)
    return command


@data.command()
@click.argument("recipe")
@click.option("--out", required=True, type=click.Path(path_type=Path), metavar="DIR", help="The corpus's folder.")
@click.option("--dry-run", is_flag=True, help="Say what it would fetch and need, and fetch nothing.")
@recipe_options
@plugin_options
def download(recipe: str, out: Path, dry_run: bool, settings: tuple[str, ...], as_json: bool, plugins: Any) -> None:
    """Fetch RECIPE (a YAML file, or an installed one: web-40gb, python-small) into a folder. Ctrl-C saves; the same
    command goes on where it stopped.

    Example: tryplicity data download python-small --out corpora/small
    """
    from tryplicity import pages
    from tryplicity.corpus import download as downloading
    from tryplicity.corpus import load_recipe
    from tryplicity.training.process import StopSignals, exit_code, say

    loaded = load_recipe(recipe, plugins.registry, settings)
    if dry_run:
        click.echo(_as_json(downloading.forecast(loaded, out)) if as_json else downloading.forecast_page(loaded, out))
        return
    with StopSignals("stopping: what is at hand is finished first") as signals, pages.preparation() as progress:
        done = downloading.download(loaded, out, progress, signals.requested, say=say)
    if as_json:
        click.echo(_as_json(done.as_dict()))
    else:
        click.echo(downloading.page(done))
    if signals.received is not None:
        raise SystemExit(exit_code(signals.received))


@data.command("filter")
@click.argument("corpus", type=click.Path(path_type=Path))
@click.option("--workers", type=click.IntRange(1), help="Processes; by default one for each GPU, or each core.")
@click.option("--executor", type=click.Choice(["local", "ray", "slurm"]),
              help="By datatrove: with its executor for this machine, a Ray cluster (RAY_ADDRESS) or a Slurm cluster.")
@click.option("--tasks", type=click.IntRange(1), default=2, show_default=True, help="Of that executor.")
@click.option("--executor-option", "executor_options", multiple=True, metavar="NAME=VALUE",
              help="Of that executor: partition=gpu, time=24:00:00, gpus_per_task=1, workers=8, ...")
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON object.")
@plugin_options
def filter_(corpus: Path, workers: int | None, executor: str | None, tasks: int, executor_options: tuple[str, ...],
            as_json: bool, plugins: Any) -> None:
    """Leave out of a downloaded CORPUS what is there twice and what its recipe's judges vote against. Ctrl-C saves; the
    same command goes on where it stopped.

    \b
    Example: tryplicity data filter corpora/small
             tryplicity data filter corpora/small --executor slurm --tasks 64 --executor-option partition=cpu \\
                 --executor-option time=24:00:00
    """
    from tryplicity import pages
    from tryplicity.corpus.filtering import default_workers, filter_corpus, read_corpus
    from tryplicity.corpus.report import write_report
    from tryplicity.training.process import StopSignals, exit_code, say

    recipe = read_corpus(corpus, plugins.registry)
    if executor is not None and not _filtered_by(executor, corpus, plugins, tasks, executor_options):
        click.echo(f"{corpus}: its jobs are with Slurm; when they are done the report is in {corpus / 'report.md'}")
        return
    with StopSignals("stopping: the shard at hand is finished first") as signals, pages.preparation() as progress:
        summaries = filter_corpus(corpus, plugins.registry, progress, workers=workers or default_workers(),
                                  plugin_files=given_plugins(click.get_current_context()), say=say,
                                  stopping=signals.requested)
    if summaries is None:
        raise SystemExit(exit_code(signals.received or 2))
    said = write_report(corpus, recipe.name, summaries)
    if as_json:
        click.echo(_as_json(said))
    else:
        click.echo(f"{recipe.name}: kept {said['documents']:,} documents, {said['bytes'] / 1e6:,.1f} MB of text; left "
                   f"out {said['dropped']:,}: see {corpus / 'report.md'}\ntrain on it: --data corpus:{corpus}")
    if not said["documents"]:
        raise UserError(f"{corpus}: nothing is left: see {corpus / 'report.md'} for the reasons")


def _filtered_by(executor: str, corpus: Path, plugins: Any, tasks: int, options: tuple[str, ...]) -> bool:
    """Filter with datatrove's executor; False where that goes on elsewhere."""
    from tryplicity.corpus.executing import filter_with
    from tryplicity.spec import parse_value

    parts = [option.partition("=") for option in options]
    if wrong := [name for name, equals, _ in parts if not equals]:
        raise UserError(f"--executor-option {wrong[0]}: write it as NAME=VALUE")
    values = {name: value if ":" in value else parse_value(value, name) for name, _, value in parts}
    return filter_with(executor, corpus, plugins.registry, tasks, values, given_plugins(click.get_current_context()))


@data.command()
@click.argument("corpus", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@plugin_options
def inspect(corpus: Path, as_json: bool, plugins: Any) -> None:
    """What is in a CORPUS: documents, bytes, domains, reading levels, lengths, copies, samples.

    Example: tryplicity data inspect corpora/small
    """
    from tryplicity import pages
    from tryplicity.corpus import inspecting
    from tryplicity.corpus.filtering import read_corpus

    recipe = read_corpus(corpus, plugins.registry)
    with pages.preparation() as progress:
        said = inspecting.inspect(recipe, corpus, progress)
    click.echo(_as_json(said) if as_json else inspecting.page(said))


def _as_json(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False)
