"""A folder, or one file, of the user's own text."""

from __future__ import annotations

import hashlib
import json
import re
import stat
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tryplicity import Conversation, Document, LeftOut, Source, Steps, UserError, escaped
from tryplicity_plugins.sources.chat_rows import conversation_of
from tryplicity_plugins.sources.html_text import charset, html_text
from tryplicity_plugins.sources.rows import BadRow, BadRows, json_lines, parquet_rows, text_of, unix
from tryplicity_plugins.sources.walk import Found, found, walk

VERSION = 2             # raise when the same files would give other documents
_PLAIN = {".txt", ".md", ".markdown", ".rst"}
_PAGES = {".html", ".htm", ".xhtml"}
_ROWS = {".jsonl", ".parquet"}
_CODE = {".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".cxx", ".hh", ".hpp", ".cu", ".cuh", ".m", ".rs", ".go", ".java",
         ".kt", ".scala", ".swift", ".cs", ".js", ".mjs", ".cjs", ".jsx", ".ts", ".tsx", ".rb", ".php", ".pl", ".pm",
         ".lua", ".r", ".jl", ".hs", ".ml", ".mli", ".ex", ".exs", ".erl", ".clj", ".el", ".lisp", ".scm", ".f90",
         ".sh", ".bash", ".zsh", ".ps1", ".sql", ".zig", ".nim", ".dart", ".vue", ".proto", ".cmake"}
_SUFFIXES = _PLAIN | _PAGES | _ROWS | _CODE
_LONGEST_PAGE = 32 << 20    # bytes of an .html file, which is read at once


class Files(Source):
    """Text files of a folder (and its sub-folders), or one file: plain text (.txt, .md, .rst), pages (.html), source
    code (.py, .c, .js, ...), .jsonl and .parquet.

    A row of a .jsonl or .parquet file is a document. Another file is one too, or several where it is longer than
    `document_bytes`: it is cut between paragraphs. Source code is of the domain `code`. For a chat phase each row of
    the .jsonl and .parquet files is a conversation, in OpenAI's form or another common one (see `chat_rows`). What is
    passed over in a folder is counted by reason: other kinds of files, hidden ones, links to folders, unreadable ones,
    files that are not UTF-8.
    """

    name = "files"
    default_for = ("path",)

    @dataclass(frozen=True)
    class Config:
        path: str
        """the folder or file"""
        text_key: str = "text"
        """the key (.jsonl) or column (.parquet) that holds the text"""
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
        for file, part, text in self._read(self._texts):
            some = True
            yield Document(_id(file, part), text, "code" if _suffix(file) in _CODE else self.config.domain,
                           _url(file, part))
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
            raise UserError(f"{self.config.path}: no conversations: they are read from .jsonl and .parquet files" +
                            (f"; {self.left_out}" if self.left_out else ""))

    # --- which files ---

    def _root(self) -> Path:
        return Path(self.config.path).expanduser()

    def _files(self, left_out: LeftOut, suffixes: set[str] = _SUFFIXES) -> list[Found]:
        path = self._root()
        try:
            info = path.stat()
        except OSError as error:
            what = "no such file or folder" if isinstance(error, FileNotFoundError) else error.strerror
            raise UserError(f"{path}: {what}") from None
        if stat.S_ISREG(info.st_mode):
            if path.suffix.lower() not in suffixes:
                raise UserError(f"{path}: {path.suffix or 'a file without a suffix'} is not read; files may be "
                                f"{_listed(suffixes)}")
            return [found(path, path.name, info)]
        if not stat.S_ISDIR(info.st_mode):
            raise UserError(f"{path}: neither a file nor a folder")
        files = list(walk(path, suffixes.__contains__, left_out))
        if not files:
            raise UserError(f"{path}: no text here: looked for {_listed(suffixes)} in it and its sub-folders" +
                            (f"; {left_out}" if left_out else ""))
        return files

    def _read(self, parts: Any, suffixes: set[str] = _SUFFIXES) -> Iterator[tuple[Found, str, Any]]:
        """What `parts` gives of each file, with the file; keeps `read_share` and `left_out`."""
        self.left_out = LeftOut("items")
        files = self._files(self.left_out, suffixes)
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
            before += file.size

    # --- what is in them ---

    def _texts(self, file: Found) -> Iterator[tuple[str, int, str]]:
        """(part, byte offset behind it, text) of a file's documents."""
        suffix = _suffix(file)
        if suffix in _ROWS:
            yield from self._row_texts(file)
        elif suffix in _PAGES:
            yield from self._page(file)
        else:
            yield from self._plain(file)

    def _rows(self, file: Found, columns: list[str] | None) -> Iterator[tuple[int, int, Any]]:
        def bad(odd: BadRow, number: int) -> None:
            bad_rows(odd, *_places(file, number))

        bad_rows = self._bad_rows()
        return parquet_rows(file.path, columns, bad) if _suffix(file) == ".parquet" else json_lines(file.path, bad)

    def _bad_rows(self) -> BadRows:
        path = self.config.path if re.fullmatch(r"[\w./~-]+", self.config.path) else json.dumps(self.config.path)
        return BadRows(self.config.bad_rows, self.left_out, f"'{{type: files, path: {path}, bad_rows: skip}}'")

    def _row_texts(self, file: Found) -> Iterator[tuple[str, int, str]]:
        key, bad = self.config.text_key, self._bad_rows()
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

    def _conversations(self, file: Found) -> Iterator[tuple[str, int, tuple[dict[str, Any], ...]]]:
        bad = self._bad_rows()
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
        if file.size > _LONGEST_PAGE:
            self.left_out.add(f"longer than {_LONGEST_PAGE >> 20} MiB (.html)", file.inner)
            return
        raw = file.path.read_bytes()
        for encoding in ("utf-8-sig", charset(raw)):
            try:
                markup = raw.decode(encoding or "utf-8")
            except (UnicodeDecodeError, LookupError):
                continue
            break
        else:
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
        whole = file.size <= 2 * self.config.document_bytes
        offset, some = 0, False
        with open(file.path, "rb") as opened:
            blocks = iter(lambda: opened.read(1 << 20), b"")
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
                            yield "" if whole else str(number), offset + len(piece), unix(text)
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


def _suffix(file: Found) -> str:
    return file.path.suffix.lower()


def _listed(suffixes: set[str]) -> str:
    return ", ".join(sorted(suffixes - _CODE)) + (" or source code (.py, .c, .js, ...)" if suffixes & _CODE else "")


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
