"""`tryplicity search`: an index of passages, made and asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tryplicity.commands.options import plugin_options, say


@click.group()
def search() -> None:
    """An index of passages on this machine, for `serve` and for you.

    Example: tryplicity search ask "How do I join two paths?"
    """


@search.command("index")
@click.argument("source")
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="By default in the user's cache.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@plugin_options
def search_index(source: str, out: Path | None, as_json: bool, plugins: Any) -> None:
    """Index the passages of SOURCE: a folder or file of text, python-docs, or what else --data takes.

    Example: tryplicity search index my_notes --out notes.sqlite
    """
    from tryplicity import pages
    from tryplicity.search import command

    with pages.preparation() as progress:
        answer = command.index(source, out, plugins.registry, progress)
    say(command.as_json(answer) if as_json else command.index_page(answer))


@search.command("ask")
@click.argument("question")
@click.option("--index", "path", type=click.Path(path_type=Path), metavar="FILE",
              help="By default the documentation of this installation.")
@click.option("--limit", default=5, show_default=True, type=click.IntRange(1, 50))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@plugin_options
def search_ask(question: str, path: Path | None, limit: int, as_json: bool, plugins: Any) -> None:
    """The passages for QUESTION, best first.

    Example: tryplicity search ask "How do I join two paths?"
    """
    from tryplicity import pages
    from tryplicity.search import command

    with pages.preparation() as progress:
        answer = command.ask(question, path, limit, plugins.registry, progress)
    say(command.as_json(answer) if as_json else command.ask_page(answer))
