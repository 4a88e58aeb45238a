"""`tryplicity brain`: what the modules of a run did."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--follow", is_flag=True, help="Draw it anew every few seconds, until Ctrl-C.")
def brain(run: Path, as_json: bool, follow: bool) -> None:
    """What the layers and brain modules of a run did: statistics by layer and over time, stages, phases, sleeps.

    Example: tryplicity brain runs/first --follow
    """
    from tryplicity.brain_page import show

    show(run, as_json=as_json, follow=follow)
