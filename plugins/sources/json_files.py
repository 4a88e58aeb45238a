"""Rows of .jsonl and .json files, one at a time."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tryplicity_plugins.sources import rows
from tryplicity_plugins.sources.opened import opened
from tryplicity_plugins.sources.rows import NOT_UTF8, BadRow, Row, decoded

_SPACE = re.compile(r"\s*")


def json_lines(path: Path, bad: Callable[[BadRow, int], None]) -> Iterator[Row]:
    """(line number, bytes of the file read so far, what its JSON holds) of a .jsonl file; blank lines are none. bad:
    called with what cannot be used and its line."""
    number = 0
    try:
        with opened(path) as (file, read):
            while raw := file.readline(rows.MOST_BYTES):
                number += 1
                whole = raw.endswith(b"\n") or len(raw) < rows.MOST_BYTES
                while not whole:
                    more = file.readline(1 << 20)
                    whole = not more or more.endswith(b"\n")
                    raw = b""
                try:
                    if not raw:
                        raise BadRow(f"longer than {rows.MOST_BYTES >> 20} MiB")
                    if number == 1:
                        raw = raw.removeprefix(b"\xef\xbb\xbf")
                    line = decoded(raw).strip(" \t\r\n")
                    del raw
                    row = parsed(line, "each line must be one JSON object") if line else None
                except BadRow as odd:
                    bad(odd, number)
                    continue
                if line:
                    del line
                    yield number, read(), row
    except BadRow as odd:       # of the file: what comes behind cannot be read
        bad(odd, number + 1)


def parsed(text: str, wanted: str) -> Any:
    """What the JSON holds. Raises BadRow; wanted: how it should be."""
    try:
        return json.loads(text)
    except RecursionError:
        raise BadRow("not JSON", "nested too deeply") from None
    except ValueError as error:
        raise BadRow("not JSON", f"{error}; {wanted}") from None


def json_rows(path: Path, bad: Callable[[BadRow, int], None]) -> Iterator[Row]:
    """The rows of a .json file: of a list its entries, read one after the other, of JSON lines the lines; or the one
    object that it holds. bad: as in `json_lines`; what comes behind an error in a list is not read."""
    number = 0
    try:
        with opened(path) as (file, read):
            start = file.peek(4096).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
            if start == b"[":
                for number, entry in enumerate(_entries(file), 1):
                    if isinstance(entry, BadRow):
                        bad(entry, number)
                    else:
                        yield number, read(), entry
                return
            first = file.readline(rows.MOST_BYTES)
            if not _is_object(first):
                text = first + file.read(max(0, rows.MOST_BYTES - len(first)))
                if len(text) >= rows.MOST_BYTES:
                    raise BadRow(f"longer than {rows.MOST_BYTES >> 20} MiB")
                if text := decoded(text.removeprefix(b"\xef\xbb\xbf")).strip():
                    yield 1, read(), parsed(text, "the file must hold a list of objects, or one")
                return
        yield from json_lines(path, bad)
    except BadRow as odd:
        bad(odd, number + 1)


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(parsed(decoded(line.removeprefix(b"\xef\xbb\xbf")), ""), dict)
    except BadRow:
        return False


def _entries(file: io.BufferedReader) -> Iterator[Any]:
    """The entries of a list, each decoded as soon as it is read; a BadRow in place of one that is not UTF-8. Raises
    BadRow where the list is none."""
    text = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")
    decoder, held, at, ended = json.JSONDecoder(), "", 0, False

    def more() -> None:
        nonlocal held, at, ended
        if len(held) - at > rows.MOST_BYTES:
            raise BadRow(f"longer than {rows.MOST_BYTES >> 20} MiB")
        block = text.read(max(1 << 18, len(held) - at))     # twice as much each time: the work stays in proportion
        held, at, ended = held[at:] + block, 0, not block

    def sign() -> str:
        """The next one that is no white space, which is passed over."""
        nonlocal at
        while True:
            at = _SPACE.match(held, at).end()
            if at < len(held) or ended:
                at += 1
                return held[at - 1:at]
            more()

    between = sign()
    if (first := sign()) == "]":
        between = first
    else:
        at -= 1
    while between != "]":
        if between not in ("[", ","):
            raise BadRow("not JSON", f"{between!r} where the next entry of the list should begin" if between else
                         "it ends inside the list")
        sign()
        at -= 1
        while True:
            try:
                entry, end = decoder.raw_decode(held, at)
                if end < len(held) or ended:        # else a number may go on
                    break
            except RecursionError:
                raise BadRow("not JSON", "nested too deeply") from None
            except ValueError as error:
                if ended:
                    raise BadRow("not JSON", f"{error.msg}, in what follows on the entry before") from None
            more()
        yield BadRow("not UTF-8") if NOT_UTF8.search(held, at, end) else entry
        at = end
        between = sign()
    if sign():
        raise BadRow("not JSON", "there is more behind the end of the list")
