"""Documents in Parquet files of a bounded size, and what is known of a folder of them. Loads no torch.

A row: id, text, domain (text, code or math), url, source (the portion's name), quality (what the source says of it, or
null). `files`, as --data takes it, reads such a folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tryplicity.errors import UserError
from tryplicity.files import whole_file

if TYPE_CHECKING:
    from tryplicity.components import Document

COMPRESSION = "zstd"


def schema() -> Any:
    import pyarrow

    return pyarrow.schema([("id", pyarrow.string()), ("text", pyarrow.string()), ("domain", pyarrow.string()),
                           ("url", pyarrow.string()), ("source", pyarrow.string()), ("quality", pyarrow.float64())])


def path_of(folder: Path, number: int) -> Path:
    return folder / f"part-{number:05d}.parquet"


def write(path: Path, documents: Sequence[Document], source: str) -> None:
    """A shard, whole or not at all; the same documents give the same bytes."""
    import pyarrow
    from pyarrow import parquet

    columns = {name: [getattr(document, name) for document in documents] for name in
               ("id", "text", "domain", "url", "quality")}
    columns["text"] = [text.encode("utf-8", "replace").decode() for text in columns["text"]]
    table = pyarrow.table({**columns, "source": [source] * len(documents)}, schema=schema())
    try:
        with whole_file(path) as temporary:
            parquet.write_table(table, temporary, compression=COMPRESSION)
    except OSError as error:        # a full disk, as a rule
        raise UserError(f"{path}: cannot be written ({os.strerror(error.errno) if error.errno else error}); free some "
                        "space there; what is there is kept: run the same command again to go on") from error


def read_shard(path: Path) -> Iterator[tuple[Document, str]]:
    """The documents of a shard, each with the name of its source. Raises UserError for a file that is no such shard."""
    import pyarrow
    from pyarrow import parquet

    from tryplicity.components import Document

    try:
        file = parquet.ParquetFile(path)
        for batch in file.iter_batches(batch_size=256):
            for row in batch.to_pylist():
                yield Document(row["id"], row["text"], row["domain"], row["url"], row["quality"]), row["source"]
    except (OSError, KeyError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: not a shard of a corpus, or damaged ({reason}); remove it, and run the same command "
                        "again") from None


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*.parquet"))
