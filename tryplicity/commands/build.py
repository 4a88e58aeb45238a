"""`tryplicity build`: what a model takes on a machine."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from tryplicity.commands import ending
from tryplicity.commands.options import build_options, given_plugins, plugin_options


@click.command()
@build_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--simulate", "simulating", is_flag=True,
              help="Run a training step on tensors without data too (a minute for nine billion parameters): the memory "
                   "it takes, and the fastest batch, checkpointing and strategy that fit.")
@plugin_options
def build(spec: str, hardware: str, settings: tuple[str, ...], as_json: bool, simulating: bool, plugins: Any) -> None:
    """Check SPEC on a machine before renting it: parameters, memory, strategy, speed, money.

    SPEC is a YAML file or the name of an installed spec (tiny, 5090, full). Exits with 1 if it does not fit.

    Active parameters are all but those of the experts that a token does not choose, as model cards count: embeddings
    and heads are in them.

    Example: tryplicity build specs/full.yaml --hw hardware/h200.yaml
    """
    import gc

    gc.disable()  # a short life: collecting takes a tenth of it
    from tryplicity import pages
    from tryplicity.builder import build as assemble

    with pages.working("planning"):
        built = assemble(spec, hardware, plugins.registry, settings)
    verdict = None
    if simulating:
        from tryplicity.planner.verdict import judge, question_of

        files = given_plugins(click.get_current_context())
        with pages.working("simulating a training step"):
            verdict = judge(built.model, built.plan, built.registry,
                            question_of(spec, hardware, settings, files, built.plan))
    ending.verdict = 0 if (verdict or built.plan).fits else 1
    if as_json:
        click.echo(json.dumps(built.plan.as_dict() | (verdict.as_dict() if verdict else {}), indent=1))
    else:
        pages.build_page(built, verdict)
    sys.exit(ending.verdict)
