"""`tryplicity import`: a model of another program as a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from tryplicity.commands.options import plugin_options, say


@click.command("import")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--run", required=True, type=click.Path(path_type=Path), metavar="DIR", help="The folder to make.")
@click.option("--name", help="What the model is called; by default as MODEL is.")
@click.option("--context-length", type=click.IntRange(1), metavar="TOKENS", help="By default what MODEL says.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@plugin_options
def import_(model: Path, run: Path, name: str | None, context_length: int | None, as_json: bool,
            plugins: Any) -> None:
    """Read a model in transformers' form (a folder with safetensors), or a GGUF file, into a run folder that generate,
    serve, eval, export and train --from take.

    \b
    Example: tryplicity import downloads/SmolLM2-135M-Instruct --run runs/smollm2
             tryplicity generate runs/smollm2 --chat "What is a tuple?"
    """
    from tryplicity import pages
    from tryplicity.exchange.importing import import_model

    with pages.preparation() as progress:
        done = import_model(model, run, plugins.registry, name=name, context_length=context_length,
                            progress=lambda done, total: progress("importing", done, total))
    if as_json:
        click.echo(json.dumps({"run": str(done.run), "name": done.spec.name, "model_type": done.model_type,
                               "tensors": done.tensors, "parameters": done.parameters, "bytes": done.bytes,
                               "chat": done.chat}, indent=1))
        return
    say(f"{done.run}: {done.spec.name}, a {done.model_type} of {done.parameters:,} parameters in {done.tensors} "
        f"tensors ({done.bytes / 1e6:,.1f} MB)" + ("" if done.chat else "; it brought no way to write conversations"))
