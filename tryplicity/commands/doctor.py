"""`tryplicity doctor`: what this machine has, and whether it is right."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from tryplicity.commands import ending
from tryplicity.commands.options import plugin_options


@click.command()
@click.argument("spec", default="tiny")
@click.option("--hw", "hardware", metavar="HW", help="Examine it as this profile says: device, precision. By default "
                                                     "what is here.")
@click.option("--set", "settings", multiple=True, metavar="PATH=VALUE", help="As of `build`.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@plugin_options
def doctor(spec: str, hardware: str | None, settings: tuple[str, ...], as_json: bool, plugins: Any) -> None:
    """What this machine has, which way the layers of SPEC go on it, and whether the fast ways are right here.

    One block of each kind is tried: compiled, with packed documents, token by token, packed. Exits with 1 if one of
    these differs from the plain way.

    Example: tryplicity doctor 5090
    """
    from tryplicity import doctor as examination
    from tryplicity import pages
    from tryplicity.hardware import load_hardware
    from tryplicity.spec import load_spec

    own = [s for s in settings if not s.startswith("hardware.")]
    profile = load_hardware(hardware, plugins.registry, [s.removeprefix("hardware.") for s in settings
                                                         if s not in own]) if hardware else None
    loaded = load_spec(spec, plugins.registry, own)
    with pages.working("trying"):
        findings = examination.examine(loaded, profile)
    ending.verdict = 0 if findings.healthy else 1
    if as_json:
        click.echo(json.dumps(findings.as_dict(), indent=1))
    else:
        pages.doctor_page(findings)
    sys.exit(ending.verdict)
