"""`tryplicity export`: a model in one file, or as another program keeps it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from tryplicity.commands.options import plugin_options, resolved, say
from tryplicity.errors import UserError


@click.command()
@click.argument("run")
@click.option("--format", "format_", type=click.Choice(["packed", "ternary", "transformers", "gguf"]), default="packed",
              show_default=True, help="packed: every linear as it packs itself, bitlinear at 1.6 bits a weight; "
                                      "ternary: the same; transformers: a folder of an imported run, as it was, or of "
                                      "one whose spec is that of an architecture there; gguf: a file of a Llama.")
@click.option("--rest", type=click.Choice(["bf16", "int8", "fp32"]), default="bf16", show_default=True,
              help="What is not packed; int8: the embedding, with a scale for each row, all else in bf16.")
@click.option("--linear", metavar="FORM",
              help="How linears are packed that else are not: plain ones as int8, with a scale for each row, or bf16.")
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE",
              help="By default RUN/model-FORMAT.safetensors, such as model-ternary.safetensors; for transformers a "
                   "folder that is not there yet, which has to be said.")
@click.option("--initialised", is_flag=True, help="RUN is a spec: pack its initial weights, module by module.")
@click.option("--tokenizer", type=click.Path(path_type=Path), metavar="FILE",
              help="With --initialised: the tokenizer.json to put inside.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@plugin_options
def export(run: str, format_: str, rest: str, linear: str | None, out: Path | None, initialised: bool,
           tokenizer: Path | None, as_json: bool, plugins: Any) -> None:
    """Pack the model of a run folder into one file, with its spec and tokenizer inside.

    \b
    Example: tryplicity export runs/first --format ternary
             tryplicity export runs/plain --linear int8 --rest int8
             tryplicity export full --initialised --rest int8 --out full.safetensors
             tryplicity export runs/smollm2 --format transformers --out smollm2-again
    """
    run = run if initialised else str(resolved(run, plugins).path)
    if format_ in ("transformers", "gguf"):
        _as_theirs(format_, run, out, initialised, plugins.registry, as_json)
        return
    from tryplicity import pages
    from tryplicity.inference.exported import export as export_file

    with pages.preparation() as progress:
        sizes = export_file(run, plugins.registry, out, rest, linear=linear, initialised=initialised,
                            tokenizer=tokenizer, progress=lambda done, total: progress("packing", done, total))
    if as_json:
        click.echo(json.dumps({"path": str(sizes.path), "format": sizes.packed_as, "rest": sizes.rest,
                               "packed_weights": sizes.packed_weights, "packed_bytes": sizes.packed_bytes,
                               "rest_bytes": sizes.rest_bytes, "file_bytes": sizes.file_bytes,
                               "smaller_than_fp16": round(sizes.ratio, 3)}, indent=1))
    else:
        pages.export_page(sizes)


def _as_theirs(format_: str, run: str, out: Path | None, initialised: bool, registry: Any, as_json: bool) -> None:
    from tryplicity import pages
    from tryplicity.exchange.exporting import export_transformers
    from tryplicity.exchange.gguf_writing import export_gguf

    if out is None or initialised:
        raise UserError(f"--format {format_}: give --out, and a run that was imported or trained")
    with pages.preparation() as progress:
        export_ = export_gguf if format_ == "gguf" else export_transformers
        done = export_(Path(run), out, registry, progress=lambda done, total: progress("writing", done, total))
    for name in done.left_out:
        click.echo(f"note: left out: {name}, which a {done.model_type} has no place for", err=True)
    if as_json:
        click.echo(json.dumps({"path": str(done.path), "model_type": done.model_type, "tensors": done.tensors,
                               "bytes": done.bytes, "left_out": list(done.left_out)}, indent=1))
    else:
        say(f"{done.path}: a {done.model_type} of {done.tensors} tensors ({done.bytes / 1e6:,.1f} MB)")
