"""`tryplicity launch`: write what a rented machine needs, and start it."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import click

from tryplicity.commands.options import Number, build_options, given_plugins, plugin_options
from tryplicity.errors import Refused, UserError

FORMS = {"shell": "sh", "slurm": "sbatch", "skypilot": "yaml"}  # -> the ending of the file


@click.command()
@build_options
@click.option("--to", "form", type=click.Choice(list(FORMS)), required=True,
              help="shell: a script for any machine; slurm: a batch script; skypilot: a task for a cloud.")
@click.option("--data", metavar="SOURCE",
              help="As of `train`. A file or folder of this machine goes along to SkyPilot; Slurm and a shell must "
                   "find it under the same path.")
@click.option("--chat-data", metavar="SOURCE", help="Likewise.")
@click.option("--steps", type=Number(1, whole=True), help="The budget, as of `train`.")
@click.option("--tokens", type=Number(1, 1e18, whole=True), help="Likewise.")
@click.option("--minutes", type=Number(0, 1e9, min_open=True), help="Likewise.")
@click.option("--dollars", type=Number(0, 1e9, min_open=True), help="Likewise.")
@click.option("--copy-to", metavar="URL", help="Where every checkpoint is copied to: s3://..., gs://..., file://...")
@click.option("--folder", metavar="DIR", help="The run folder there, by default runs/NAME.")
@click.option("--install", metavar="REQUIREMENT", help="What pip installs there: by default the sources that this "
                                                       "tryplicity runs from, else its version.")
@click.option("--spot", is_flag=True, help="SkyPilot: a machine that may be taken away, for less.")
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="By default launch-NAME, with the form's "
                                                                             "ending.")
@click.option("--run", "start", is_flag=True, help="Start it, too: bash, sbatch, or sky launch.")
@plugin_options
def launch(spec: str, hardware: str, settings: tuple[str, ...], form: str, data: str | None, chat_data: str | None,
           copy_to: str | None, folder: str | None, install: str | None, spot: bool, out: Path | None, start: bool,
           plugins: Any, **budget: Any) -> None:
    """Write what a rented machine needs to train SPEC: set-up, files, training under a budget, checkpoints home.

    \b
    Example: tryplicity launch full --hw h200 --to skypilot --dollars 500 --copy-to s3://mine/full
             tryplicity launch tiny --hw cpu --to shell --minutes 2 --run
    """
    if sum(x is not None for x in budget.values()) != 1:
        raise UserError("say when to end: exactly one of --steps, --tokens, --minutes and --dollars")
    from tryplicity import launch as forms
    from tryplicity import pages
    from tryplicity.builder import build as assemble
    from tryplicity.files import may_be_written, write_text

    with pages.working("planning"):
        built = assemble(spec, hardware, plugins.registry, settings)
    if not built.plan.fits:
        pages.build_page(built)
        raise Refused(f"{built.spec.name} does not fit on {built.hardware.name}")
    if budget["dollars"] is not None and not built.hardware.price_per_hour:
        raise UserError(f"--dollars: {built.hardware.name} has no price; give one (--set hardware.price_per_hour=2.5), "
                        "or end by --minutes")
    here = {option: Path(value).resolve() for option, value in (("--data", data), ("--chat-data", chat_data))
            if value is not None and Path(value).exists()}
    named = {option: value for option, value in (("--data", data), ("--chat-data", chat_data), ("--copy-to", copy_to))
             if value is not None and option not in here}
    for name, value in budget.items():
        if value is not None:
            named[f"--{name}"] = f"{value:.15g}"
    options = tuple(text for option, value in named.items() for text in (option, str(value)))
    files = tuple(Path(file) for file in given_plugins(click.get_current_context()))
    job = forms.Job(built, folder or f"runs/{built.spec.name}", options, install or _sources(),
                    forms.planned_hours(built, **budget), files, here, spot)
    path = out or Path(f"launch-{built.spec.name}.{FORMS[form]}")
    text = {"shell": forms.shell, "slurm": forms.slurm, "skypilot": forms.skypilot}[form](job)
    may_be_written(path, "a file of `tryplicity launch`",
                   lambda file: "by tryplicity " in file.read_text(encoding="utf-8", errors="replace"))
    write_text(path, text)
    command = {"shell": ["bash", str(path)], "slurm": ["sbatch", str(path)],
               "skypilot": ["sky", "launch", "--yes", "--cluster", job.name, str(path)]}[form]
    for line in job.told():
        click.echo(line, err=start)
    click.echo(f"{path}: {' '.join(command)}", err=start)
    if form == "skypilot" and copy_to is None:
        click.echo(f"without --copy-to the run is on that machine alone: rsync -a {job.name}:"
                   f"{'sky_workdir/' if Path(job.install).is_dir() else ''}{job.folder} .", err=True)
    if start:
        if shutil.which(command[0]) is None:
            raise UserError(f"{command[0]}: not found on this machine; take {path} to one that has it")
        sys.stdout.flush()
        os.execvp(command[0], command)


def _sources() -> str:
    """The folder that this tryplicity runs from, or what pip finds under its name."""
    from tryplicity import __version__

    root = Path(__file__).resolve().parents[2]
    return str(root) if (root / "setup.cfg").is_file() else f"tryplicity=={__version__}"
