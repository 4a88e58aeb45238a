"""`tryplicity quickstart`: the whole way in minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tryplicity.commands.generate import print_pieces, write
from tryplicity.commands.options import Number, plugin_options, say
from tryplicity.commands.train import Training, train_into


@click.command()
@click.option("--minutes", default=2.0, show_default=True, type=Number(0, 1e9, min_open=True), help="Of training.")
@click.option("--run", "folder", default="runs/quickstart", show_default=True, type=click.Path(path_type=Path))
@click.option("--port", default=5000, show_default=True, type=click.IntRange(0, 65535), help="Of the page.")
@click.option("--no-page", is_flag=True, help="End before the page.")
@plugin_options
def quickstart(minutes: float, folder: Path, port: int, no_page: bool, plugins: Any) -> None:
    """The whole way on this machine: plan, prepare, train a tiny model, let it write and answer, open its page.

    Example: tryplicity quickstart --minutes 2
    """
    from tryplicity import pages
    from tryplicity.builder import build as assemble

    pages.heading("1  Plan", "tryplicity build tiny --hw cpu")
    pages.build_page(assemble("tiny", "cpu", plugins.registry))
    folder = _free(folder)
    pages.heading("2  Train", f"tryplicity train tiny --hw cpu --run {folder} --minutes {minutes:g}")
    train_into(Training("tiny", "cpu", folder), plugins, minutes=minutes)
    from tryplicity.inference.chat import dialogue, reply
    from tryplicity.inference.engine import Engine
    from tryplicity.inference.sampler import Sampling
    from tryplicity.named import named_models

    prompts = ("The function returns", "A list is")
    pages.heading("3  Write", f'tryplicity generate {folder} "{prompts[0]}"')
    engine = Engine.load(folder, plugins.registry)
    for prompt in prompts:
        write(engine, prompt, Sampling(temperature=0.7, top_p=0.95, repetition_penalty=1.1, seed=1), 60)
        say()
    question = "What is list.append?"
    pages.heading("4  Ask", f'tryplicity generate {folder} --chat "{question}" --temperature 0')
    say(click.style(question, bold=True))
    print_pieces(reply(engine, dialogue(question), Sampling(temperature=0), 60))
    engine.close()
    pages.next_steps(folder, named_models(plugins).values())
    if no_page:
        return
    from tryplicity.server.app import serve as run_server

    port = _free_port(port)
    pages.heading("5  Talk to it", f"tryplicity serve {folder} --port {port}")
    run_server(folder, plugins=plugins, port=port,
               say=lambda address: click.echo(f"\nopen {address} in a browser; Ctrl-C ends it"))


def _free_port(wanted: int) -> int:
    """The port, or the next one that is free."""
    import socket

    for port in range(wanted, min(wanted + 20, 65536)):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
    return wanted


def _free(folder: Path) -> Path:
    """The folder, or with a number behind its name if a run is there already."""
    from tryplicity.run import Run

    number, free = 2, folder
    while Run(free).exists():
        free, number = folder.with_name(f"{folder.name}-{number}"), number + 1
    return free
