"""Rows of data sets: read with a bound on their size, and one policy for those that cannot be used.

    bad_rows: error     stop at the first one, with its place and a remedy
    bad_rows: skip      leave it out, and count it by its reason
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Literal

from tryplicity import LeftOut, UserError

Policy = Literal["error", "skip"]
MOST_BYTES = 1 << 27        # of one row; reading it takes a few times as much memory
Row = tuple[int, int, Any]      # its number from 1, bytes of the file read so far, and what it holds
SAMPLED = 20    # rows that a column is guessed from
#: what people call the column that holds the text, the likeliest first
_NAMES = ("text", "content", "body", "document", "raw_content", "article", "markdown", "full_text", "story", "passage",
          "abstract")
NOT_UTF8 = re.compile("[\udc80-\udcff]")      # what is no UTF-8, read with "surrogateescape"


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


def text_column(sample: Sequence[Any]) -> str | None:
    """The column of these rows that holds the text: one of a usual name, or else the only one with more than single
    words; None where that is none, or several."""
    objects = [row for row in sample if isinstance(row, dict)]
    columns = list(dict.fromkeys(key for row in objects for key in row))
    for name in _NAMES:
        for column in columns:
            if str(column).lower() == name:
                return column
    if len(objects) < 2:        # one object alone is more likely settings than a row
        return None
    wordy = [column for column in columns
             if any(isinstance(text := row.get(column), str) and " " in text.strip() for row in objects)]
    return wordy[0] if len(wordy) == 1 else None


def sampled(found: Iterator[Row]) -> list[Any]:
    """What the first rows hold."""
    return [row for _, _, row in islice(found, SAMPLED)]
