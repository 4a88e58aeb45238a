"""Pages and texts in a web archive: .warc, .warc.gz."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tryplicity import LeftOut, UserError
from tryplicity_plugins.sources.html_text import decoded_page, html_text
from tryplicity_plugins.sources.opened import opened
from tryplicity_plugins.sources.rows import BadRow, unix

_LONGEST = 32 << 20     # bytes of a record
_PAGES, _TEXTS = ("text/html", "application/xhtml+xml"), ("text/plain",)


def archived(path: Path, inner: str, left_out: LeftOut) -> Iterator[tuple[int, int, str, str]]:
    """(record's number from 1, bytes read so far, text, address) of the pages and texts that were fetched: of
    `response`, `resource` and `conversion` records. Others are counted. Raises BadRow where the archive is damaged."""
    try:
        from warcio.archiveiterator import ArchiveIterator
        from warcio.exceptions import ArchiveLoadFailed
    except ImportError:
        raise UserError(f"{path}: web archives are read by warcio: pip install 'tryplicity[warc]'") from None

    number = 0
    try:
        with opened(path) as (file, read):
            pieces = _Pieces(file)
            for number, record in enumerate(ArchiveIterator(pieces), 1):
                if record.rec_headers.get_header("Content-Length") is None:
                    raise BadRow("damaged or cut short (.warc)", f"record {number} ends in its head")
                place = f"{inner}:{number}"
                reason, what, said = _kind_of(record)
                raw = b"" if reason else record.content_stream().read(_LONGEST + 1)
                while record.raw_stream.read(1 << 16):
                    pass
                if record.raw_stream.limit:
                    raise BadRow("damaged or cut short (.warc)", f"record {number} ends too early")
                if len(raw) > _LONGEST:
                    reason = f"longer than {_LONGEST >> 20} MiB"
                if reason:
                    left_out.add(reason, place)
                    continue
                text = decoded_page(raw, said)
                if text is None:
                    left_out.add("not UTF-8", place)
                elif not (text := html_text(text) if what in _PAGES else unix(text)).strip():
                    left_out.add("empty", place)
                else:
                    yield number, read(), text, record.rec_headers.get_header("WARC-Target-URI") or place
            if not pieces.tail.endswith((b"\n\n", b"\r\n\r\n")):     # as every record does
                raise BadRow("damaged or cut short (.warc)", f"what follows record {number} is not whole")
    except ArchiveLoadFailed as error:
        raise BadRow("damaged or cut short (.warc)", f"behind record {number}: {' '.join(str(error).split())[:200]}"
                     ) from None


class _Pieces:
    """Gives what there is, so that what comes before an error is read first; and keeps the last few bytes."""

    def __init__(self, file: Any) -> None:
        self.file, self.tail = file, b""

    def read(self, size: int) -> bytes:
        piece = self.file.read1(size)
        self.tail = (self.tail + piece[-4:])[-4:]
        return piece


def _kind_of(record: Any) -> tuple[str, str, str | None]:
    """Why a record is left out, or ""; and the kind and encoding that it says it has."""
    if record.rec_type not in ("response", "resource", "conversion"):
        return f"records of another kind ({record.rec_type})", "", None
    answer = record.http_headers
    if answer is not None and answer.get_statuscode() != "200":
        return f"answers with status {answer.get_statuscode()}", "", None
    kind, _, more = ((answer or record.rec_headers).get_header("Content-Type") or "").partition(";")
    kind = kind.strip().lower()
    if kind not in _PAGES + _TEXTS:
        return f"of another kind ({kind or 'none said'})", "", None
    return "", kind, more.lower().partition("charset=")[2].split(";")[0].strip("\"' ") or None
