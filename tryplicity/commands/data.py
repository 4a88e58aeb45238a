"""`tryplicity data`: corpora by recipe: download, filter, inspect. Loads no torch until a judge needs it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click

from tryplicity.commands.options import given_plugins, plugin_options
from tryplicity.errors import UserError


@click.group()
def data() -> None:
    """A corpus by a recipe: downloaded, freed of copies, judged; then train on it with --data corpus:DIR.

    Example: tryplicity data download python-small --out corpora/small
    """


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
        click.echo(_as_json(downloading.forecast(loaded)) if as_json else downloading.forecast_page(loaded, out))
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
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON object.")
@plugin_options
def filter_(corpus: Path, workers: int | None, as_json: bool, plugins: Any) -> None:
    """Leave out of a downloaded CORPUS what is there twice and what its recipe's judges vote against. Ctrl-C saves; the
    same command goes on where it stopped.

    Example: tryplicity data filter corpora/small
    """
    from tryplicity import pages
    from tryplicity.corpus.filtering import filter_corpus, read_corpus
    from tryplicity.corpus.report import markdown, report
    from tryplicity.files import write_text
    from tryplicity.training.process import StopSignals, exit_code, say

    recipe = read_corpus(corpus, plugins.registry)
    with StopSignals("stopping: the shard at hand is finished first") as signals, pages.preparation() as progress:
        summaries = filter_corpus(corpus, plugins.registry, progress, workers=workers or _workers(),
                                  plugin_files=given_plugins(click.get_current_context()), say=say,
                                  stopping=signals.requested)
    if summaries is None:
        raise SystemExit(exit_code(signals.received or 2))
    said = report(recipe.name, summaries)
    write_text(corpus / "report.json", json.dumps(said, indent=1, ensure_ascii=False))
    write_text(corpus / "report.md", markdown(said))
    if as_json:
        click.echo(_as_json(said))
    else:
        click.echo(f"{recipe.name}: kept {said['documents']:,} documents, {said['bytes'] / 1e6:,.1f} MB of text; left "
                   f"out {said['dropped']:,}: see {corpus / 'report.md'}\ntrain on it: --data corpus:{corpus}")
    if not said["documents"]:
        raise UserError(f"{corpus}: nothing is left: see {corpus / 'report.md'} for the reasons")


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


def _workers() -> int:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return torch.cuda.device_count() or cores


def _as_json(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False)
