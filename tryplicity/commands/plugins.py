"""`tryplicity plugins`: who provides what."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from tryplicity.commands import ending
from tryplicity.commands.options import plugin_options, say
from tryplicity.errors import UserError, did_you_mean


@click.group()
def plugins() -> None:
    """Who provides what, and what failed and why."""


@plugins.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@plugin_options
def list_plugins(as_json: bool, plugins: Any) -> None:
    """Every plugin found: where it comes from, what it provides, why it was left out.

    Example: tryplicity plugins list --plugin my_layer.py
    """
    from dataclasses import asdict

    from tryplicity.pages import plugin_table

    ending.verdict = 1 if any(p.cause and not p.disabled for p in plugins.found) else 0
    if as_json:
        click.echo(json.dumps({"plugins": [{**asdict(p), "hooks": p.hooks, "families": p.families}
                                           for p in plugins.found]}, indent=1))
    else:
        plugin_table(plugins)
    sys.exit(ending.verdict)


@plugins.command("show")
@click.argument("name")
@plugin_options
def show_plugin(name: str, plugins: Any) -> None:
    """What the component NAME is and takes: every option, with what it may be and its default.

    Example: tryplicity plugins show gqa
    """
    from tryplicity.reference import lines

    found = [component for component in plugins.registry.components() if component.name == name]
    if not found:
        known = sorted({component.name for component in plugins.registry.components()})
        raise UserError(f"no component is called {name!r}{did_you_mean(name, known)}; `tryplicity plugins list` says "
                        "what there is")
    for component in found:
        for line in lines(component):
            say(line)
