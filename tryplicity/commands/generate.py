"""`tryplicity generate`: what a model writes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click

from tryplicity.commands.options import SEED, plugin_options, resolved, say, weights_option
from tryplicity.errors import UserError


def sampling_options(command: Callable) -> Callable:
    for option in reversed([
        click.option("--max-tokens", default=200, show_default=True, type=click.IntRange(1)),
        click.option("--temperature", default=0.8, show_default=True, help="0: always the likeliest token."),
        click.option("--top-k", default=0, show_default=True, help="Choose among the k likeliest; 0: all."),
        click.option("--top-p", default=0.95, show_default=True, help="Choose among the likeliest of this mass."),
        click.option("--min-p", default=0.0, show_default=True,
                     help="Choose among those at least so many times as probable as the likeliest."),
        click.option("--repetition-penalty", default=1.1, show_default=True, help="1: none."),
        click.option("--presence-penalty", default=0.0, show_default=True, help="Off what was written already."),
        click.option("--frequency-penalty", default=0.0, show_default=True, help="Likewise, each time it was."),
        click.option("--seed", type=SEED, help="The same seed writes the same text."),
    ]):
        command = option(command)
    return command


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("prompt")
@sampling_options
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this text. May be repeated.")
@click.option("--chat", is_flag=True, help="PROMPT is a question; the model answers it.")
@click.option("--system", metavar="TEXT", help="With --chat: what the model is told before the question.")
@click.option("--device", default="cpu", show_default=True, help="What the model runs on: cpu, cuda, cuda:1, mps.")
@weights_option
@plugin_options
def generate(run: Path, prompt: str, max_tokens: int, stop: tuple[str, ...], chat: bool, system: str | None,
             device: str, weights: str | None, plugins: Any, **sampling: Any) -> None:
    """Write on from PROMPT with the model of a run folder, as it comes; or answer it.

    \b
    Example: tryplicity generate runs/first "A list is" --temperature 0.7 --seed 1
             tryplicity generate runs/first --chat "What is os.path.join?" --temperature 0
    """
    if system and not chat:
        raise UserError("--system is for --chat; add --chat, or leave it out")
    from tryplicity.training.process import limit_spinning, tune_malloc

    limit_spinning()
    tune_malloc()
    from tryplicity import kernels
    from tryplicity.inference.engine import Engine
    from tryplicity.inference.sampler import Sampling

    chosen = Sampling(**sampling)

    found = resolved(run, plugins)
    engine = Engine.load(found.path, plugins.registry, device, weights=weights or found.weights)
    if device == "cpu" and (reason := kernels.why_not()):
        click.echo(reason, err=True)
    if chat:
        from tryplicity.inference.chat import dialogue, reply

        if not engine.card.chat:
            click.echo(f"warning: {run}: a base model: it has learned no conversations, and what follows is its guess "
                       "at how a text goes on; a chat phase in `phases` teaches them", err=True)
        print_pieces(reply(engine, dialogue(prompt, system), chosen, max_tokens, stop))
    else:
        write(engine, prompt, chosen, max_tokens, stop)


def write(engine: Any, prompt: str, sampling: Any, max_tokens: int, stop: tuple[str, ...] = ()) -> None:
    """The prompt, and the model's text as it comes."""
    pieces = engine.stream(prompt, sampling, max_tokens, stop)
    say(click.style(prompt, bold=True), nl=False)
    print_pieces(pieces)


def print_pieces(pieces: Iterable[str]) -> None:
    """Text as it comes; Ctrl-C ends it where it stands."""
    stopped = False
    try:
        for piece in pieces:
            say(piece, nl=False)
            sys.stdout.flush()
    except KeyboardInterrupt:
        stopped = True
    say()
    if stopped:
        sys.exit(130)  # as a shell says of what Ctrl-C ended
