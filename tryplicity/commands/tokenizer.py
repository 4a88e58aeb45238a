"""`tryplicity tokenizer`: train one apart from a run, and look at one. Loads no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from tryplicity.commands.options import named, plugin_options
from tryplicity.errors import UserError


@click.group()
def tokenizer() -> None:
    """Byte-level BPE tokenizers: train one on any data, see what one does with a text.

    Example: tryplicity tokenizer train corpus:corpora/small --vocab-size 4096 --out words.json
    """


@tokenizer.command()
@click.argument("source")
@click.option("--vocab-size", default=32_000, show_default=True, type=click.IntRange(1), help="Tokens, all counted.")
@click.option("--out", required=True, type=click.Path(path_type=Path), metavar="FILE", help="tokenizer.json to write.")
@plugin_options
def train(source: str, vocab_size: int, out: Path, plugins: Any) -> None:
    """Train a tokenizer on the training part of SOURCE (what --data takes): a sample with an equal share of text, code
    and mathematics, as far as there is so much. Numbers are parted by three digits at most, indentation stays together.

    Example: tryplicity tokenizer train corpus:corpora/small --vocab-size 4096 --out words.json
    """
    from tryplicity import pages
    from tryplicity.data import parse_source
    from tryplicity.data.cache import cache_root
    from tryplicity.data.documents import collect
    from tryplicity.data.prepared import trained_tokenizer
    from tryplicity.data.tokenizer import load_tokenizer
    from tryplicity.files import may_be_written, write_text

    _not_a_run_s(out)
    may_be_written(out, "a tokenizer", lambda path: _is_tokenizer(path))
    with pages.preparation() as progress:
        root = cache_root()
        collection = collect(parse_source(plugins.registry, source, "SOURCE"), root, progress)
        found = trained_tokenizer(collection, vocab_size, root, progress)
    write_text(out, found.read_text(encoding="utf-8"))
    click.echo(f"{out}: {load_tokenizer(out).get_vocab_size():,} tokens, byte-level BPE; numbers by three digits, "
               "indentation together; train with it: --tokenizer " + str(out))


@tokenizer.command()
@click.argument("path", type=click.Path(path_type=Path), metavar="FILE")
@click.option("--data", metavar="SOURCE", help="The text to try it on; by default what comes with Python.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@plugin_options
def inspect(path: Path, data: str | None, as_json: bool, plugins: Any) -> None:
    """What the tokenizer in FILE (or a run folder) does with a text: bytes a token by domain, pieces that are hardly
    used, whether every document comes back.

    Example: tryplicity tokenizer inspect runs/first --data my_notes
    """
    from tryplicity import pages
    from tryplicity.data import parse_source
    from tryplicity.data.cache import cache_root
    from tryplicity.data.documents import collect
    from tryplicity.data.pieces import inspect, page
    from tryplicity.data.tokenizer import load_tokenizer

    found = load_tokenizer(path / "tokenizer.json" if path.is_dir() else path)
    with pages.preparation() as progress:
        collection = collect(parse_source(plugins.registry, named(data, plugins, "pretrain"), "--data"), cache_root(),
                             progress)
        said = inspect(found, collection.documents())
    click.echo(json.dumps(said, indent=1, ensure_ascii=False) if as_json else page(said))


def _not_a_run_s(out: Path) -> None:
    """Raises UserError for the tokenizer of a run, whose weights know no other."""
    if out.exists() and (out.parent / "spec.yaml").exists():
        raise UserError(f"{out}: the tokenizer of the run in {out.parent}, whose weights are of no use with another; "
                        "give another --out")


def _is_tokenizer(path: Path) -> bool:
    from tryplicity.data.tokenizer import load_tokenizer

    try:
        load_tokenizer(path)
    except UserError:
        return False
    return True
