"""Rows of .csv, .tsv and .parquet files, one at a time."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from tryplicity_plugins.sources import rows
from tryplicity_plugins.sources.opened import opened
from tryplicity_plugins.sources.rows import NOT_UTF8, BadRow, Row, decoded


def csv_rows(path: Path, bad: Callable[[BadRow, int], None]) -> Iterator[Row]:
    """The rows of a .csv or .tsv file by the names in its first row. Their numbers are those of their last lines. The
    comma may be a semicolon or a tab: whichever is more frequent in the first line."""
    csv.field_size_limit(rows.MOST_BYTES)
    line = 0
    try:
        with opened(path) as (file, read):
            lines = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")
            first = lines.readline(rows.MOST_BYTES)
            reader = csv.reader(chain([first], lines), delimiter=max(",;\t", key=first.count), strict=True)
            names = None
            while True:
                try:
                    row = next(reader)
                    line = reader.line_num
                    if names is None:
                        names = row
                    elif row:
                        yield line, read(), _named(names, row)
                except StopIteration:
                    return
                except csv.Error as error:
                    line = reader.line_num
                    bad(BadRow("not CSV", str(error)), line)
                except BadRow as odd:
                    if odd.reason.startswith("damaged"):
                        raise
                    bad(odd, line)
    except BadRow as odd:
        bad(odd, line + 1)


def _named(names: list[str], row: list[str]) -> dict[str, str]:
    if len(row) != len(names):
        raise BadRow("a number of columns unlike the first row's", f"{len(row)}, not {len(names)}")
    if any(map(NOT_UTF8.search, row)):
        raise BadRow("not UTF-8")
    return dict(zip(names, row, strict=True))


def parquet_rows(path: Path, columns: list[str] | None, bad: Callable[[BadRow, int], None]
                 ) -> Iterator[Row]:
    """(row number from 1, bytes read so far, about, the row) of a Parquet file. columns: only these. bad: as in
    `json_lines`; its row is 0 where the file itself cannot be used. Texts come as str or bytes."""
    import pyarrow
    import pyarrow.parquet

    size = path.stat().st_size
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        return bad(BadRow("not a Parquet file, or one cut short", " ".join(str(error).split())), 0)
    with file:
        names = file.schema_arrow.names
        if columns is not None:
            column = columns[0]
            if column not in names or not _is_text(file.schema_arrow.field(column).type):
                return bad(BadRow(f"no column {column!r} of text", f"its columns are {', '.join(names)}; name the one "
                                  "that holds the text: text_key"), 0)
        else:
            columns = [name for name in names if not _is_binary(file.schema_arrow.field(name).type)]    # pictures
        total, number = max(file.metadata.num_rows, 1), 0
        try:
            for group in range(file.metadata.num_row_groups):
                about = file.metadata.row_group(group)
                # few rows at a time where they are long
                at_once = max(1, min(256, about.num_rows * (4 << 20) // max(about.total_byte_size, 1)))
                for batch in file.iter_batches(batch_size=at_once, row_groups=[group], columns=columns):
                    for values in zip(*map(_as_bytes, batch.columns), strict=True):
                        number += 1
                        try:
                            row = dict(zip(batch.schema.names, map(_plain, values), strict=True))
                        except BadRow as odd:
                            bad(odd, number)
                        else:
                            yield number, size * number // total, row
        except (pyarrow.ArrowException, OSError) as error:
            bad(BadRow("not a Parquet file, or one cut short", " ".join(str(error).split())), number + 1)


def text_columns(path: Path) -> list[str]:
    """The columns of a Parquet file that may hold text; none where it is none."""
    import pyarrow
    import pyarrow.parquet

    try:
        return [field.name for field in pyarrow.parquet.read_schema(path) if _is_text(field.type)]
    except (pyarrow.ArrowException, OSError):
        return []


def _is_text(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return _is_binary(kind) or any(test(kind) for test in (types.is_string, types.is_large_string,
                                                           types.is_string_view, types.is_null))


def _is_binary(kind: Any) -> bool:
    import pyarrow.types as types

    return any(test(kind) for test in (types.is_binary, types.is_large_binary, types.is_binary_view,
                                       types.is_fixed_size_binary))


def _as_bytes(column: Any) -> Any:
    """Texts as bytes, so that one that is not UTF-8 spoils no other."""
    import pyarrow

    if not _is_text(column.type) or pyarrow.types.is_null(column.type):
        return column
    return column.cast(pyarrow.large_binary())


def _plain(scalar: Any) -> Any:
    try:
        value = scalar.as_py()
    except UnicodeDecodeError:      # inside a list or a struct
        raise BadRow("not UTF-8") from None
    return decoded(value) if isinstance(value, bytes) else value
