"""`tryplicity plugins`: who provides what, whether it keeps its promises, and a new one."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from tryplicity.commands import ending
from tryplicity.commands.options import given_plugins, plugin_options, say
from tryplicity.errors import UserError, did_you_mean
from tryplicity.scaffold import KINDS


@click.group()
def plugins() -> None:
    """Who provides what, what failed and why; a new plugin, and whether one keeps its promises."""


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


@plugins.command("new")
@click.argument("name")
@click.option("--kind", required=True, type=click.Choice(KINDS), help="What it brings.")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="The new folder; by default NAME.")
def new_plugin(name: str, kind: str, out: Path | None) -> None:
    """Write an installable package with a component that works at once, for you to change.

    Example: tryplicity plugins new my-mixer --kind mixer
    """
    from tryplicity.scaffold import new_package

    folder = out or Path(name)
    for path in new_package(name, kind, folder):
        say(str(path))
    say(f"next: pip install -e '{folder}[test]' && pytest {folder}; README.md there says how it is used")


@plugins.command("check")
@click.argument("target", metavar="PACKAGE|FILE")
@click.option("--ranks/--no-ranks", default=True, show_default=True, help="Also on two ranks: half a minute each.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@plugin_options
def check_plugin(target: str, ranks: bool, as_json: bool, plugins: Any) -> None:
    """Ask the components of an installed package, or of a file, for all that they owe. Ends with 1 if one is broken.

    \b
    Example: tryplicity plugins check my-mixer
             tryplicity plugins check my_layer.py --no-ranks
    """
    from tryplicity.testing import findings
    from tryplicity.testing.promises import Finding, Promise

    plugins, files = _with_target(target, plugins)
    mine = [p for p in plugins.found if target in p.known_as or Path(p.origin) == Path(target)]
    if not mine:
        known = {name for p in plugins.found for name in p.known_as}
        raise UserError(f"{target}: neither a plugin's file nor an installed plugin{did_you_mean(target, known)}")
    said = []
    for plugin in mine:
        components = [c for c in plugins.registry.components()
                      if plugins.registry.owner(c.family, c.name) == str(plugin)]
        if plugin.cause:
            said.append({"plugin": plugin.name, "component": None, "promise": "it can be loaded", "verdict": "broken",
                         "why": plugin.cause, "read": "docs/plugins.md#a-plugin-that-is-broken"})
        for component in components:
            what = f"{component.family} {component.name}"
            try:
                for finding in findings(component, plugins=files, ranks=ranks):
                    said.append(_told(plugin, what, finding))
                    _show(said[-1], as_json)
            except UserError as error:
                cannot = Promise("its `trials` are options that it can have", (), "trials", print, False)
                said.append(_told(plugin, what, Finding(cannot, "broken", str(error))))
                _show(said[-1], as_json)
    broken = sum(one["verdict"] == "broken" for one in said)
    ending.verdict = 1 if broken else 0
    if as_json:
        click.echo(json.dumps({"target": target, "broken": broken, "findings": said}, indent=1))
    else:
        for one in said:
            if one["component"] is None:
                say(f"{one['plugin']}: {one['why']}")
        kept = sum(one["verdict"] == "kept" for one in said)
        say(f"{target}: {kept} kept, {broken} broken, {len(said) - kept - broken} not asked")
    sys.exit(ending.verdict)


def _with_target(target: str, plugins: Any) -> tuple[Any, tuple[str, ...]]:
    """The plugins with the file that is to be checked, and all files among them."""
    from tryplicity.plugins import load_plugins

    files = given_plugins(click.get_current_context())
    if not target.endswith(".py") or target in files:
        return plugins, files
    if not Path(target).is_file():
        raise UserError(f"{target}: there is no such file")
    return load_plugins((*files, target), plugins.strict), (*files, target)


def _told(plugin: Any, component: str, finding: Any) -> dict[str, Any]:
    from tryplicity.testing.promises import PAGE

    return {"plugin": plugin.name, "component": component, "promise": finding.promise.what,
            "verdict": finding.verdict, "why": finding.why, "read": f"{PAGE}#{finding.promise.read}"}


def _show(one: dict[str, Any], as_json: bool) -> None:
    """A line as soon as it is known: some take seconds."""
    if not as_json:
        why = f": {one['why']}" if one["why"] else ""
        read = f" ({one['read']})" if one["verdict"] == "broken" else ""
        say(f"{one['component']:<24} {one['verdict']:<10} {one['promise']}{why}{read}")
        sys.stdout.flush()
