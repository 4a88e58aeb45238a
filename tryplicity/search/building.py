"""The index of `index`, built: documents cut into passages, their words counted, in one file."""

from __future__ import annotations

import hashlib
import json
import re
import sqlite3
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tryplicity.errors import UserError
from tryplicity.files import may_be_written, whole_file
from tryplicity.leftout import LeftOut
from tryplicity.search.cutting import cut
from tryplicity.search.index import APPLICATION, FORMAT
from tryplicity.search.words import DOTTED, folded, humps, joined, parted

if TYPE_CHECKING:
    from tryplicity.components import Document, Source
    from tryplicity.progress import Progress
    from tryplicity.registry import Registry

DEFAULT_SOURCE = "python-reference"
_TABLES = """
    PRAGMA journal_mode = OFF;
    PRAGMA synchronous = OFF;
    PRAGMA cache_size = -65536;
    CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
    CREATE TABLE passages (number INTEGER PRIMARY KEY, id TEXT NOT NULL, title TEXT NOT NULL, url TEXT NOT NULL,
                           text TEXT NOT NULL, names TEXT NOT NULL);
    CREATE VIRTUAL TABLE words USING fts5 (title, lead, text, names, content = '',
                                           tokenize = "porter ascii tokenchars '+#'");
    INSERT INTO words (words, rank) VALUES ('hashsize', 16777216);
"""


def build_index(documents: Iterable[Document], path: str | Path, progress: Progress | None = None, *,
                source: Any = None, fingerprint: str = "") -> Path:
    """Cut documents into passages and write the index `path`, whole or not at all.

    A passage with the title and text of one before is left out. progress: called as `progress(stage, done, total)`.
    source: where the documents come from, asked for its `read_share`, for what it `left_out`, and for the origin that
    comes `first` (documents of an origin follow one another, and its name begins their ids: `python/...`). Raises
    UserError when there is no text, and when the file cannot be written or is something else.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise UserError(f"{path}: this is a folder; give the file to write")
    may_be_written(path, "a search index", is_index)
    seen: set[bytes] = set()
    identity = hashlib.sha256()
    try:
        with whole_file(path) as temporary:
            connection = sqlite3.connect(temporary, isolation_level=None)
            try:
                connection.executescript(_TABLES)
                connection.execute("BEGIN")
                number = 0
                repeated = LeftOut("passages")
                first = getattr(source, "first", "")
                origins: dict[str, list[int]] = {first: [0, 0]} if first else {}
                for count, document in enumerate(documents, 1):
                    rows = list(_rows(document, seen, number, repeated))
                    connection.executemany("INSERT INTO passages VALUES (?, ?, ?, ?, ?, ?)", rows)
                    connection.executemany("INSERT INTO words (rowid, title, lead, text, names) VALUES (?, ?, ?, ?, ?)",
                                           [(row[0], *map(parted, (row[2], _lead(row[4]), row[4], row[5])))
                                            for row in rows])
                    number += len(rows)
                    if first and rows:
                        span = origins.setdefault(document.id.partition("/")[0], [0, 0])
                        span[:] = span[0] or rows[0][0], number
                    for row in rows:
                        identity.update(f"{row[2]}\0{row[4]}\0".encode())
                    if progress and count % 64 == 0:
                        share = getattr(source, "read_share", None)
                        progress("cutting into passages", *((number, None) if share is None else (share, 1.0)))
                if not number:
                    raise UserError(f"{path}: nothing to index: no document has any text in it")
                if progress:
                    progress("indexing words", 0.0, 1.0)
                connection.execute("INSERT INTO words (words) VALUES ('optimize')")
                meta = {"format": FORMAT, "passages": number, "source": getattr(source, "name", ""),
                        "fingerprint": fingerprint, "identity": identity.hexdigest(),
                        "origins": json.dumps(origins),
                        "left_out": json.dumps([asdict(one) for one in (getattr(source, "left_out", None), repeated)
                                                if one])}
                connection.executemany("INSERT INTO meta VALUES (?, ?)", [(k, str(v)) for k, v in meta.items()])
                connection.execute("COMMIT")
                connection.execute(f"PRAGMA application_id = {APPLICATION}")
                connection.execute(f"PRAGMA user_version = {FORMAT}")
                if progress:
                    progress("indexing words", 1.0, 1.0)
            finally:
                connection.close()
    except sqlite3.Error as error:
        if "fts5" in str(error):
            raise UserError("this Python's SQLite was built without FTS5, which search needs; use another Python, "
                            "such as one from python.org, conda or a Linux distribution") from error
        raise UserError(f"{path}: the index cannot be written ({error}); is the disk full?") from error
    except OSError as error:
        failed = Path(error.filename or path)
        if failed.parent != path.parent and failed not in path.parents:  # a document's
            raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from error
        raise UserError(f"{path}: the index cannot be written ({error.strerror or error})") from error
    return path


def is_index(path: Path) -> bool:
    """Whether a file is a search index, of whatever format."""
    with open(path, "rb") as file:
        header = file.read(72)
    return header.startswith(b"SQLite format 3\0") and header[68:72] == APPLICATION.to_bytes(4, "big")


def _rows(document: Document, seen: set[bytes], number: int, repeated: LeftOut) -> Iterable[tuple[Any, ...]]:
    for part, (title, text) in enumerate(cut(document), 1):
        title, text = _storable(title), _storable(text)
        digest = hashlib.blake2b(f"{title}\0{' '.join(text.split())}".encode(), digest_size=12).digest()
        if digest in seen:
            repeated.add("the same as one before", title)
            continue
        seen.add(digest)
        number += 1
        yield number, f"{_storable(document.id)}:{part}", title, _storable(document.url), text, _names(title, text)


_SIGNATURE = re.compile(r"[\w.]+\([^\n]*\)[^\n]*\n")


def _lead(text: str) -> str:
    """How a passage begins, behind a signature: what it is about is said there."""
    text = text[found.end():] if (found := _SIGNATURE.match(text)) else text
    return text.lstrip().partition("\n\n")[0]


def _storable(text: str) -> str:
    """Without what SQLite cannot keep: lone surrogates, and the NUL that would end the text."""
    return text.encode("utf-8", "replace").decode().replace("\0", " ")


def _names(title: str, text: str) -> str:
    """Words that the text holds only inside names."""
    dotted = [form for name in DOTTED.findall(folded(title)) for form in joined(name)]
    return " ".join(dict.fromkeys([*dotted, *humps(title), *humps(text)]))


def ensure_index(source: str | Mapping[str, Any] | Source, registry: Registry | None = None,
                 progress: Progress | None = None, cache: str | Path | None = None) -> Path:
    """The index of a source in the user's cache: found by the source's fingerprint, or built now.

    source: what a user may write for --data (then `registry` is needed), or a Source. Several processes may call it
    at once. Raises UserError as `parse_source`, the source and `build_index` do.
    """
    from tryplicity.data.cache import building, cache_root

    if isinstance(source, str | Mapping):
        from tryplicity.data import parse_source

        source = parse_source(registry, source, "SOURCE")
    described = json.dumps([FORMAT, source.name, source.fingerprint()])
    fingerprint = hashlib.sha256(described.encode()).hexdigest()
    folder = cache_root(cache) / "search" / fingerprint[:24]
    path = folder / "index.sqlite"
    if not path.exists():
        with building(folder) as temporary:
            build_index(source.documents(), temporary / path.name, progress, source=source, fingerprint=fingerprint)
    return path
