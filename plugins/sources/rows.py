"""Rows of data sets: read with a bound on their size, and one policy for those that cannot be used.

    bad_rows: error     stop at the first one, with its place and a remedy
    bad_rows: skip      leave it out, and count it by its reason
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from tryplicity import LeftOut, UserError

Policy = Literal["error", "skip"]
MOST_BYTES = 1 << 27        # of one row; reading it takes a few times as much memory


class BadRow(Exception):
    """A row that cannot be used. The reason is the same for all such rows: they are counted by it."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


class BadRows:
    """What becomes of rows that cannot be used."""

    def __init__(self, policy: Policy, left_out: LeftOut, remedy: str) -> None:
        """remedy: how to say it as an option, for the message."""
        self.policy, self.left_out, self.remedy = policy, left_out, remedy

    def __call__(self, bad: BadRow, where: str, example: str) -> None:
        """Count one, or raise UserError that begins with `where`. example: its place in fewer words."""
        if self.policy == "error":
            raise UserError(f"{where}: {bad}; mend it, or leave such rows out: {self.remedy}") from bad
        with_ = "with " if bad.reason.startswith(("a ", "an ", "no ", "content ")) else ""
        self.left_out.add(with_ + bad.reason, example)

    def empty(self, example: str) -> None:
        """A row whose text is null or blank: there is nothing in it to be wrong."""
        self.left_out.add("empty", example)


def text_of(value: Any, key: str, row: Any) -> str | None:
    """The text under the key of a row; None where it is null. Raises BadRow where there is none."""
    if value is None and isinstance(row, dict) and key in row:
        return None
    if not isinstance(value, str):
        has = f"its keys are {', '.join(map(str, row)) or 'none'}" if isinstance(row, dict) else "it is not an object"
        raise BadRow(f"no text under the key {key!r}", f"{has}; name the key that holds the text: text_key")
    return value


def decoded(raw: bytes) -> str:
    """Raises BadRow where it is not UTF-8."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRow("not UTF-8", f"byte {error.start} of it is 0x{raw[error.start]:02x}") from None


def unix(text: str) -> str:
    return text.replace("\r\n", "\n")


def json_lines(path: Path, bad: Callable[[BadRow, int], None]) -> Iterator[tuple[int, int, Any]]:
    """(line number, byte offset behind it, what its JSON holds) of a .jsonl file; blank lines are none. bad: called
    with what cannot be used and its line."""
    number = offset = 0
    with open(path, "rb") as file:
        while raw := file.readline(MOST_BYTES):
            number, offset = number + 1, offset + len(raw)
            whole = raw.endswith(b"\n") or len(raw) < MOST_BYTES
            while not whole:
                more = file.readline(1 << 20)
                offset += len(more)
                whole = not more or more.endswith(b"\n")
                raw = b""
            try:
                if not raw:
                    raise BadRow(f"longer than {MOST_BYTES >> 20} MiB")
                if number == 1:
                    raw = raw.removeprefix(b"\xef\xbb\xbf")
                if line := decoded(raw).strip(" \t\r\n"):
                    del raw
                    row = _parsed(line)
                    del line
                    yield number, offset, row
            except BadRow as odd:
                bad(odd, number)


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except RecursionError:
        raise BadRow("not JSON", "nested too deeply") from None
    except ValueError as error:
        raise BadRow("not JSON", f"{error}; each line must be one JSON object") from None


def parquet_rows(path: Path, columns: list[str] | None, bad: Callable[[BadRow, int], None]
                 ) -> Iterator[tuple[int, int, dict[str, Any]]]:
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
                rows = max(1, min(256, about.num_rows * (4 << 20) // max(about.total_byte_size, 1)))
                for batch in file.iter_batches(batch_size=rows, row_groups=[group], columns=columns):
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
