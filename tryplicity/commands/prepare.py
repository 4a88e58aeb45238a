"""`tryplicity data prepare`: all that a recipe names, from its sources to a trained model, in one go."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import click

from tryplicity.commands.options import given_plugins, plugin_options
from tryplicity.commands.train import Training, train_into
from tryplicity.errors import UserError


@click.command()
@click.argument("recipe")
@click.option("--out", required=True, type=click.Path(path_type=Path), metavar="DIR", help="The corpus's folder.")
@click.option("--workers", type=click.IntRange(1), help="Processes that judge; by default one for each GPU, or core.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end.")
@click.option("--set", "settings", multiple=True, metavar="PATH=VALUE",
              help="Change a value of the recipe (bytes=1e9, train=null).")
@plugin_options
def prepare(recipe: str, out: Path, workers: int | None, as_json: bool, settings: tuple[str, ...],
            plugins: Any) -> None:
    """All that RECIPE (a YAML file, or an installed one) names, in one go: download, filter, tokenizer, token files,
    and the training under its `train`. Ctrl-C saves; the same command goes on where it stopped, whatever stopped it,
    and passes over what is done.

    Example: tryplicity data prepare five-judges --out corpora/five
    """
    from tryplicity import pages
    from tryplicity.corpus import load_recipe
    from tryplicity.corpus.download import download
    from tryplicity.corpus.filtering import default_workers, filter_corpus
    from tryplicity.corpus.report import write_report
    from tryplicity.run import Run
    from tryplicity.training.process import StopSignals, exit_code, say

    loaded, summaries = load_recipe(recipe, plugins.registry, settings), None
    files = given_plugins(click.get_current_context())
    vocab_size = _vocab_size(loaded, plugins)
    with StopSignals("stopping: what is at hand is finished first") as signals, pages.preparation() as progress:
        download(loaded, out, progress, signals.requested, say=say)
        if not signals.requested():
            summaries = filter_corpus(out, plugins.registry, progress, workers=workers or default_workers(),
                                      plugin_files=files, say=say, stopping=signals.requested)
    if summaries is None:
        raise SystemExit(exit_code(signals.received or 2))
    report = write_report(out, loaded.name, summaries)
    pages.status.print(f"{loaded.name}: kept {report['documents']:,} documents, {report['bytes'] / 1e6:,.1f} MB of "
                       f"text; left out {report['dropped']:,}: see {out / 'report.md'}", markup=False)
    if not report["documents"]:
        raise UserError(f"{out}: nothing is left: see {out / 'report.md'} for the reasons")
    said = {"folder": str(out), **{key: report[key] for key in ("documents", "bytes", "dropped")}}
    if vocab_size is not None:
        said["tokens"] = _tokenised(out, vocab_size, plugins)
    if loaded.train is not None:
        run = Run(out / "run")
        if run.weights.exists():
            pages.status.print(f"{run.folder}: trained", markup=False)
        else:
            goal, data = loaded.train, f"corpus:{out}"
            line = [word for name in goal.settings for word in ("--set", name)]
            line += [word for file in files for word in ("--plugin", file)]
            line += [word for name, value in goal.budget().items() if value for word in (f"--{name}", str(value))]
            line += ["--hw", goal.hw, "--data", data, "--run", str(run.folder), *["--resume"] * run.exists()]
            with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
                train_into(Training(goal.spec, goal.hw, run.folder, tuple(goal.settings), data, resume=run.exists(),
                                    plugin_files=files, line=("train", *line, "--", goal.spec)), plugins,
                           **goal.budget(), dollars=None)
        said["run"] = str(run.folder)
    if as_json:
        click.echo(json.dumps(said, indent=1, ensure_ascii=False))


def _vocab_size(recipe: Any, plugins: Any) -> int | None:
    """Of the tokenizer; None where the recipe wants none. Raises UserError where the recipe and its spec differ."""
    if recipe.train is None:
        return recipe.vocab_size
    from tryplicity.hardware import load_hardware
    from tryplicity.spec import load_spec

    own = [setting for setting in recipe.train.settings if not setting.startswith("hardware.")]
    load_hardware(recipe.train.hw, plugins.registry)
    wanted = load_spec(recipe.train.spec, plugins.registry, own).vocab_size
    if recipe.vocab_size not in (None, wanted):
        raise UserError(f"recipe {recipe.name}: vocab_size is {recipe.vocab_size:,}, and the spec under train "
                        f"({recipe.train.spec}) has {wanted:,}; leave vocab_size out, or set it to {wanted}")
    return wanted


def _tokenised(out: Path, vocab_size: int, plugins: Any) -> dict[str, int]:
    """Train the tokenizer and write the token files, or find them; tokens by part."""
    from tryplicity import data, pages
    from tryplicity.files import write_text

    (out / "prepared").mkdir(exist_ok=True)
    with pages.preparation() as progress:
        prepared = data.prepare(data.parse_source(plugins.registry, f"corpus:{out}"), vocab_size, progress=progress)
    write_text(out / "tokenizer.json", prepared.tokenizer_path.read_text(encoding="utf-8"))
    tokens = {name: part["tokens"] for name, part in prepared.manifest["parts"].items()}
    pages.status.print(f"{tokens['train']:,} tokens to train on and {tokens['heldout']:,} held out, of a vocabulary of "
                       f"{vocab_size:,}; train on them: --data corpus:{out}", markup=False)
    return tokens
