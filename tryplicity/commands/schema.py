"""`tryplicity schema`: what a file may say."""

from __future__ import annotations

import json
from typing import Any

import click

from tryplicity.commands.options import plugin_options


@click.command()
@click.option("--hardware", is_flag=True, help="Of a hardware profile instead.")
@plugin_options
def schema(hardware: bool, plugins: Any) -> None:
    """Print the JSON Schema of a spec, composed from the installed plugins, for your editor.

    Example: tryplicity schema > spec.schema.json
    """
    from tryplicity.hardware import hardware_schema
    from tryplicity.spec import spec_schema

    compose = hardware_schema if hardware else spec_schema
    click.echo(json.dumps(compose(plugins.registry), indent=1))
