"""`tryplicity serve`: the page and the API."""

from __future__ import annotations

from typing import Any

import click

from tryplicity.commands.options import plugin_options, resolved, weights_option


@click.command()
@click.argument("run", required=False)
@click.option("--host", default="127.0.0.1", show_default=True, help="Where to listen; wider than this machine needs a "
                                                                     "key, or --allow-public.")
@click.option("--port", default=5000, show_default=True, type=click.IntRange(0, 65535), help="0: any free one.")
@click.option("--api-key", metavar="KEY", help="What clients must send; also from TRYPLICITY_API_KEY.")
@click.option("--allow-public", is_flag=True, help="Listen wider than this machine without a key.")
@click.option("--cors", multiple=True, metavar="ORIGIN", help="Another page that may call, as https://example.org.")
@click.option("--name", "hosts", multiple=True, metavar="HOST", help="A name under which the server may be reached.")
@click.option("--search", default="passages", show_default=True, metavar="RETRIEVER",
              help="passages, semantic, '{type: passages, index: FILE}', '{type: searxng, url: ...}', or none.")
@click.option("--conversations", metavar="FILE",
              help="Where they are kept, by default in the run folder, or without one in your data folder; none: not "
                   "at all.")
@click.option("--slots", default=8, show_default=True, type=click.IntRange(1), help="Texts written at once.")
@click.option("--device", default="cpu", show_default=True, help="What the model runs on: cpu, cuda, cuda:1, mps.")
@weights_option
@click.option("--max-tokens", default=2048, show_default=True, type=click.IntRange(1), help="Most of one request.")
@plugin_options
def serve(run: str | None, plugins: Any, weights: str | None, cors: tuple[str, ...], hosts: tuple[str, ...],
          **options: Any) -> None:
    """A page to ask and search on, and OpenAI's API, from the model of RUN: a run folder or an exported file.

    Without RUN there is search alone. Ctrl-C and SIGTERM let what runs end first.

    Example: tryplicity serve runs/first --port 5000
    """
    from tryplicity.server.app import serve as run_server
    from tryplicity.training.process import limit_spinning, tune_malloc

    limit_spinning()
    tune_malloc()
    if run is not None:
        found = resolved(run, plugins)
        run, weights = str(found.path), weights or found.weights
    run_server(run, plugins=plugins, weights=weights, cors=cors, hosts=hosts, **options)
