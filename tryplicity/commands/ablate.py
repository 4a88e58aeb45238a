"""`tryplicity ablate`: what each module buys."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from tryplicity.commands.options import Number, build_options, given_plugins, named, plugin_options
from tryplicity.errors import UserError


@click.command()
@build_options
@click.option("--data", metavar="SOURCE", help="As of `train`.")
@click.option("--without", "modules", multiple=True, required=True, metavar="TYPE[,TYPE...]",
              help="A component that the spec names by this type (spike, hyper_connections, ...): a row of the table. "
                   "May be repeated.")
@click.option("--alone", is_flag=True, help="Add each module to the spec without any of them, instead of taking it "
                                            "from the spec as it is.")
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(1), help="Trainings of each variant.")
@click.option("--tokens", required=True, type=Number(1, 1e18, whole=True),
              help="Tokens of each training (2e6 will do).")
@click.option("--rows", default=256, show_default=True, type=click.IntRange(0),
              help="Held-out rows that a finished training is scored on, spread evenly; 0: all.")
@click.option("--out", required=True, type=click.Path(path_type=Path), metavar="DIR",
              help="Where cells and reports are kept; what is finished there is not done again.")
@click.option("--jobs", type=click.IntRange(1), help="Trainings at once, by default one for each core.")
@click.option("--report", "report_only", is_flag=True, help="Only report what is finished.")
@click.option("--no-cost", is_flag=True, help="Do not measure step time and memory.")
@click.option("--cost-only", is_flag=True, help="Measure step time and memory, and train nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@plugin_options
def ablate(plugins: Any, modules: tuple[str, ...], data: str | None, tokens: int, report_only: bool, no_cost: bool,
           cost_only: bool, as_json: bool, **options: Any) -> None:
    """What each module of SPEC buys: train with and without it, from the same seeds and data, and compare.

    Ctrl-C and SIGTERM save; the same command goes on, and never trains the same cell twice.

    Example: tryplicity ablate tiny --hw cpu --without spike,bitlinear --seeds 3 --tokens 2e6 --out ablations/tiny
    """
    if report_only + no_cost + cost_only > 1:
        raise UserError("give one of --report, --no-cost and --cost-only")
    from tryplicity.ablation.command import Request
    from tryplicity.ablation.command import ablate as run

    without = tuple(name.strip() for text in modules for name in text.split(",") if name.strip())
    request = Request(modules=without, data=named(data, plugins, "pretrain"), tokens=tokens,
                      plugin_files=given_plugins(click.get_current_context()), **options)
    code = run(request, plugins, train=not (report_only or cost_only), cost=not (report_only or no_cost),
               as_json=as_json)
    if code:
        sys.exit(code)
