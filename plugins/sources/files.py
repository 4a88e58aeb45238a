"""A folder, or one file, of the user's own text."""

from __future__ import annotations

import hashlib
import json
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tryplicity import Conversation, Document, LeftOut, Source, Steps, UserError, escaped
from tryplicity_plugins.sources.chat_rows import conversation_of
from tryplicity_plugins.sources.html_text import decoded_page, html_text
from tryplicity_plugins.sources.json_files import json_lines, json_rows
from tryplicity_plugins.sources.opened import COMPRESSED, kind, opened, whole_suffix
from tryplicity_plugins.sources.rows import BadRow, BadRows, Row, sampled, text_column, text_of, unix
from tryplicity_plugins.sources.tables import csv_rows, parquet_rows, text_columns
from tryplicity_plugins.sources.walk import Found, found, walk
from tryplicity_plugins.sources.warc import archived

VERSION = 3             # raise when the same files would give other documents
_PLAIN = {".txt", ".md", ".markdown", ".rst"}
_PAGES = {".html", ".htm", ".xhtml"}
_READERS = {".jsonl": json_lines, ".ndjson": json_lines, ".json": json_rows, ".csv": csv_rows, ".tsv": csv_rows}
_ROWS = {*_READERS, ".parquet"}
_ARCHIVES = {".warc"}
#: in a folder these hold rows of text, or anything else: whether they do is looked up in their first rows
_DOUBTFUL = {".json", ".csv", ".tsv"}
_CODE = {".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".cxx", ".hh", ".hpp", ".cu", ".cuh", ".m", ".rs", ".go", ".java",
         ".kt", ".scala", ".swift", ".cs", ".js", ".mjs", ".cjs", ".jsx", ".ts", ".tsx", ".rb", ".php", ".pl", ".pm",
         ".lua", ".r", ".jl", ".hs", ".ml", ".mli", ".ex", ".exs", ".erl", ".clj", ".el", ".lisp", ".scm", ".f90",
         ".sh", ".bash", ".zsh", ".ps1", ".sql", ".zig", ".nim", ".dart", ".vue", ".proto", ".cmake"}
_KINDS = _PLAIN | _PAGES | _ROWS | _CODE | _ARCHIVES
_LONGEST_PAGE = 32 << 20    # bytes of an .html file, which is read at once


class Files(Source):
    """Text files of a folder (and its sub-folders), or one file: plain text (.txt, .md, .rst), pages (.html), source
    code (.py, .c, .js, ...), rows (.jsonl, .json, .csv, .tsv, .parquet) and web archives (.warc), all but Parquet also
    compressed (.gz, .bz2, .xz, .zst).

    A row is a document, and so is a page of an archive. Another file is one too, or several where it is longer than
    `document_bytes`: it is cut between paragraphs. Source code is of the domain `code`. For a chat phase each row is a
    conversation, in OpenAI's form or another common one (see `chat_rows`). What is passed over in a folder is counted
    by reason: other kinds of files, hidden ones, links to folders, unreadable ones, files that are not UTF-8, .json and
    .csv files whose rows have no column of text.
    """

    name = "files"
    default_for = ("path",)

    @dataclass(frozen=True)
    class Config:
        path: str
        """the folder or file"""
        text_key: str | None = None
        """the key or column that holds the text; by default one of a usual name (text, content, body, ...), or the only
        one with more than single words"""
        domain: Literal["text", "code", "math"] = "text"
        """what kind of text it is; source files are code in any case"""
        bad_rows: Literal["error", "skip"] = "error"
        """a row that cannot be used, or the given file is not UTF-8: stop and say where, or leave it out and count"""
        document_bytes: Steps = 65536
        """a file of text longer than this is cut into documents of about this size"""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.read_share = 0.0   # of the bytes, while `documents` runs

    def fingerprint(self) -> str:
        """From the options and each file's name, size and time of change."""
        left_out = LeftOut("items")
        files = [(file.inner, *file.changed) for file in self._files(left_out)]
        options = asdict(self.config) | {"path": str(self._root().resolve())}
        described = json.dumps([self.name, VERSION, options, files, left_out.as_dict()])
        return hashlib.sha256(described.encode()).hexdigest()

    def documents(self) -> Iterator[Document]:
        """Raises UserError for a path that does not exist or holds no text and, unless they are skipped, for rows that
        cannot be used (naming file and line)."""
        some = False
        for file, part, (text, url) in self._read(self._texts):
            some = True
            yield Document(_id(file, part), text, "code" if kind(file.path) in _CODE else self.config.domain,
                           url or _url(file, part))
        if not some:
            raise UserError(f"{self.config.path}: the corpus is empty: none of its files holds any text" +
                            (f"; {self.left_out}" if self.left_out else ""))

    def conversations(self) -> Iterator[Conversation]:
        """Raises UserError, naming file and line, for what is no conversation, unless it is skipped."""
        some = False
        for file, part, messages in self._read(self._conversations, _ROWS):
            some = True
            yield Conversation(_id(file, part), messages, _url(file, part))
        if not some:
            raise UserError(f"{self.config.path}: no conversations: they are read from .jsonl, .json, .csv, .parquet" +
                            (f"; {self.left_out}" if self.left_out else ""))

    # --- which files ---

    def _root(self) -> Path:
        return Path(self.config.path).expanduser()

    def _files(self, left_out: LeftOut, kinds: set[str] = _KINDS) -> list[Found]:
        path, suffixes = self._root(), _with_compressed(kinds)
        try:
            info = path.stat()
        except OSError as error:
            what = "no such file or folder" if isinstance(error, FileNotFoundError) else error.strerror
            raise UserError(f"{path}: {what}") from None
        if stat.S_ISREG(info.st_mode):
            if whole_suffix(path) not in suffixes:
                raise UserError(f"{path}: {whole_suffix(path) or 'a file without a suffix'} is not read; files may be "
                                f"{_listed(kinds)}")
            return [found(path, path.name, info)]
        if not stat.S_ISDIR(info.st_mode):
            raise UserError(f"{path}: neither a file nor a folder")
        files = list(walk(path, suffixes.__contains__, left_out))
        if not files:
            raise UserError(f"{path}: no text here: looked for {_listed(kinds)} in it and its sub-folders" +
                            (f"; {left_out}" if left_out else ""))
        return files

    def _read(self, parts: Any, kinds: set[str] = _KINDS) -> Iterator[tuple[Found, str, Any]]:
        """What `parts` gives of each file, with the file; keeps `read_share` and `left_out`."""
        self.left_out = LeftOut("items")
        files = self._files(self.left_out, kinds)
        total, before = sum(file.size for file in files) or 1, 0
        for file in files:
            try:
                for part, offset, what in parts(file):
                    self.read_share = (before + min(offset, file.size)) / total
                    yield file, part, what
            except OSError as error:        # gone or locked since it was found
                if file.path == self._root():
                    raise UserError(f"{file.path}: cannot be read ({error.strerror})") from None
                self.left_out.add(f"unreadable ({error.strerror})", file.inner)
            except BadRow as odd:           # its compression, or its archive, is damaged
                self._bad_rows()(odd, *_places(file, 0))
            before += file.size

    # --- what is in them ---

    def _texts(self, file: Found) -> Iterator[tuple[str, int, tuple[str, str]]]:
        """(part, bytes of the file read so far, its text and address) of a file's documents."""
        if kind(file.path) in _ARCHIVES:
            for number, offset, text, url in archived(file.path, file.inner, self.left_out):
                yield str(number), offset, (text, url)
            return
        read = self._row_texts if kind(file.path) in _ROWS else self._page if kind(file.path) in _PAGES else self._plain
        for part, offset, text in read(file):
            yield part, offset, (text, "")

    def _rows(self, file: Found, columns: list[str] | None) -> Iterator[Row]:
        def bad(odd: BadRow, number: int) -> None:
            bad_rows(odd, *_places(file, number))

        bad_rows = self._bad_rows()
        return _rows_of(file.path, columns, bad)

    def _bad_rows(self) -> BadRows:
        path = self.config.path if re.fullmatch(r"[\w./~-]+", self.config.path) else json.dumps(self.config.path)
        return BadRows(self.config.bad_rows, self.left_out, f"'{{type: files, path: {path}, bad_rows: skip}}'")

    def _row_texts(self, file: Found) -> Iterator[tuple[str, int, str]]:
        key, bad = self.config.text_key or self._column(file), self._bad_rows()
        if key is None:
            return
        for number, offset, row in self._rows(file, [key]):
            try:
                text = text_of(row.get(key) if isinstance(row, dict) else None, key, row)
            except BadRow as odd:
                bad(odd, *_places(file, number))
                continue
            if text is None or not text.strip():
                bad.empty(_places(file, number)[1])
            else:
                yield str(number), offset, unix(text)

    def _column(self, file: Found) -> str | None:
        """The column that is taken for the text; None where none can be, and the file is left out."""
        columns = dict.fromkeys(text_columns(file.path)) if kind(file.path) == ".parquet" else {}
        rows = sampled(_rows_of(file.path, None, _ignored))
        column = text_column([columns]) or text_column(rows)
        if column is None and kind(file.path) in _DOUBTFUL and file.path != self._root():
            self.left_out.add("without a column of text", file.inner)
            return None
        others = {**columns, **next((row for row in rows if isinstance(row, dict)), {})}.keys() - {column}
        if column is not None and column != "text" and others:
            self.left_out.add(f"other columns than {column!r}, which is taken for the text", file.inner)
        return column or "text"

    def _conversations(self, file: Found) -> Iterator[tuple[str, int, tuple[dict[str, Any], ...]]]:
        bad = self._bad_rows()
        if kind(file.path) in _DOUBTFUL and file.path != self._root() and not any(
                map(_is_conversation, sampled(_rows_of(file.path, None, _ignored)))):
            self.left_out.add("without conversations", file.inner)
            return
        for number, offset, row in self._rows(file, None):
            try:
                messages, unused = conversation_of(row)
            except BadRow as odd:
                bad(odd, *_places(file, number))
                continue
            for key in unused:
                self.left_out.add(f"fields {key!r} of rows", _places(file, number)[1])
            yield str(number), offset, messages

    def _page(self, file: Found) -> Iterator[tuple[str, int, str]]:
        with opened(file.path) as (page, _):
            raw = page.read(_LONGEST_PAGE + 1)
        if len(raw) > _LONGEST_PAGE:
            self.left_out.add(f"longer than {_LONGEST_PAGE >> 20} MiB (.html)", file.inner)
            return
        markup = decoded_page(raw)
        if markup is None:
            return self._not_utf8(file, raw, 0)
        text = html_text(markup)
        if not text.strip():
            self.left_out.add("empty", file.inner)
            return
        pieces = list(_pieces(iter([text.encode("utf-8", "replace")]), self.config.document_bytes))
        for number, piece in enumerate(pieces, 1):
            if piece.strip():
                yield str(number) if len(pieces) > 1 else "", file.size * number // len(pieces), piece.decode()

    def _plain(self, file: Found) -> Iterator[tuple[str, int, str]]:
        """The whole file, or its parts in order, numbered from 1."""
        whole = file.size <= 2 * self.config.document_bytes and file.path.suffix.lower() not in COMPRESSED
        offset, some = 0, False
        with opened(file.path) as (plain, read):
            blocks = iter(lambda: plain.read1(1 << 20), b"")
            for number, piece in enumerate(_pieces(blocks, self.config.document_bytes), 1):
                if b"\0" in piece:
                    self.left_out.add("binary", file.inner)
                    some = True
                    if number == 1:
                        return
                else:
                    try:
                        text = piece.decode("utf-8-sig" if number == 1 else "utf-8")
                    except UnicodeDecodeError:
                        self._not_utf8(file, piece, offset)
                        some = True
                    else:
                        if text.strip():
                            some = True
                            yield "" if whole else str(number), read(), unix(text)
                offset += len(piece)
        if not some:
            self.left_out.add("empty", file.inner)

    def _not_utf8(self, file: Found, raw: bytes, offset: int) -> None:
        """Leave out what is not UTF-8, or say where if it is the only file."""
        try:
            raw.decode("utf-8")
        except UnicodeDecodeError as error:
            if file.path == self._root() and self.config.bad_rows == "error":
                raise UserError(f"{file.path}: not UTF-8 at byte {offset + error.start} (0x{raw[error.start]:02x}); "
                                "save it as UTF-8, or leave out what is not: bad_rows: skip") from None
        self.left_out.add("not UTF-8", file.inner)


def _with_compressed(kinds: set[str]) -> set[str]:
    return kinds | {one + packed for one in kinds - {".parquet"} for packed in COMPRESSED}


def _listed(kinds: set[str]) -> str:
    return (", ".join(sorted(kinds - _CODE)) + (" or source code (.py, .c, .js, ...)" if kinds & _CODE else "") +
            f"; also compressed ({', '.join(COMPRESSED)})")


def _rows_of(path: Path, columns: list[str] | None, bad: Callable[[BadRow, int], None]) -> Iterator[Row]:
    return parquet_rows(path, columns, bad) if kind(path) == ".parquet" else _READERS[kind(path)](path, bad)


def _ignored(odd: BadRow, number: int) -> None:
    """What cannot be used is counted when it is read."""


def _is_conversation(row: Any) -> bool:
    try:
        conversation_of(row)
    except BadRow:
        return False
    return True


def _id(file: Found, part: str) -> str:
    return escaped(file.inner) + (f":{part}" if part else "")


def _url(file: Found, part: str) -> str:
    return file.path.resolve().as_uri() + (f"?part={part}" if part else "")


def _places(file: Found, number: int) -> tuple[str, str]:
    """A row's place for a message, and for an example."""
    line = f":{number}" if number else ""
    return f"{file.path}{line}", f"{file.inner}{line}"


def _pieces(blocks: Iterator[bytes], target: int) -> Iterator[bytes]:
    """Bytes cut into pieces of about `target` that join to the whole; what is at most twice as long is not cut."""
    rest, at, ended, first = b"", 0, False, True
    while True:
        while not ended and len(rest) - at <= 2 * target:
            block = next(blocks, b"")
            rest, at, ended = rest[at:] + block, 0, not block
        left = len(rest) - at
        if not left or (first and left <= 2 * target):
            if left:
                yield rest[at:]
            return
        first = False
        piece = rest[at:at + 2 * target]
        cut = left if left < 2 * target else _cut(piece, target)
        yield piece[:cut]
        at += cut


def _cut(piece: bytes, target: int) -> int:
    """Where to cut, near `target`: after an empty line, a line or a space; never inside a character."""
    for mark in (b"\n\n", b"\n", b" "):
        place = piece.rfind(mark, target // 2, target + target // 2)
        if place >= 0:
            return place + len(mark)
    cut = target
    while cut > max(target - 4, 1) and piece[cut] & 0xC0 == 0x80:   # a continuation byte
        cut -= 1
    return cut
