"""A folder, or one file, of the user's own text."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tryplicity import Conversation, Document, Source, Steps, UserError
from tryplicity_plugins.sources.chat_rows import messages_of

_PLAIN = {".txt", ".md"}
_SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")


class Files(Source):
    """Text files of a folder (and its sub-folders), or one file: .txt, .md, .jsonl and .parquet.

    A row of a .jsonl or .parquet file is a document. A .txt or .md file is one too, or several where it is
    longer than `document_bytes`: it is cut between paragraphs. For a chat phase each row of the .jsonl files is a
    conversation, in OpenAI's form or another common one (see `chat_rows`).
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
        """what kind of text it is"""
        encoding_errors: Literal["error", "skip"] = "error"
        """text that is not UTF-8: stop and say where, or leave that document out and count it"""
        document_bytes: Steps = 65536
        """a plain text file longer than this is cut into documents of about this size"""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.read_share = 0.0   # of the bytes, while `documents` runs
        self.skipped = 0        # documents left out for not being UTF-8

    def fingerprint(self) -> str:
        """From the options and each file's name, size and time of change."""
        root = self._root()
        files = [(path.relative_to(root).as_posix(), (stat := path.stat()).st_size, stat.st_mtime_ns)
                 for path in self._files()]
        described = json.dumps([self.name, asdict(self.config), str(root.resolve()), files])
        return hashlib.sha256(described.encode()).hexdigest()

    def documents(self) -> Iterator[Document]:
        """Raises UserError for a path that does not exist or holds no text, for text that is not UTF-8
        (naming file and byte) and for rows without the text."""
        root, files = self._root(), self._files()
        total, before, found = sum(path.stat().st_size for path in files) or 1, 0, False
        self.skipped = 0
        for path in files:
            suffix = path.suffix.lower()
            read = {".jsonl": self._json_lines, ".parquet": self._parquet}.get(suffix, self._plain)
            size = path.stat().st_size
            for part, offset, text in read(path):
                self.read_share = (before + min(offset, size)) / total
                if text.strip():
                    found = True
                    inner = path.relative_to(root).as_posix()
                    yield Document(f"{inner}:{part}" if part else inner, text, self.config.domain,
                                   path.resolve().as_uri() + (f"?part={part}" if part else ""))
            before += size
        if not found:
            raise UserError(f"{self.config.path}: the corpus is empty: none of its {len(files)} files "
                            f"({', '.join(_SUFFIXES)}) holds any {'usable ' if self.skipped else ''}text")

    def conversations(self) -> Iterator[Conversation]:
        """Raises UserError, naming file and line, for what is no conversation."""
        root, files = self._root(), [path for path in self._files() if path.suffix.lower() == ".jsonl"]
        if not files:
            raise UserError(f"{self.config.path}: no conversations: they are read from .jsonl files, and there is none")
        total, before = sum(path.stat().st_size for path in files) or 1, 0
        for path in files:
            for number, offset, row in self._rows(path):
                self.read_share = (before + offset) / total
                yield Conversation(f"{path.relative_to(root).as_posix()}:{number}",
                                   messages_of(row, f"{path}:{number}"), f"{path.resolve().as_uri()}?part={number}")
            before += path.stat().st_size

    def _root(self) -> Path:
        path = Path(self.config.path).expanduser()
        return path if path.is_dir() else path.parent

    def _files(self) -> list[Path]:
        path = Path(self.config.path).expanduser()
        if path.is_file():
            if path.suffix.lower() not in _SUFFIXES:
                raise UserError(f"{path}: {path.suffix or 'a file without a suffix'} is not read; files may "
                                f"be {', '.join(_SUFFIXES)}")
            return [path]
        if not path.is_dir():
            raise UserError(f"{path}: no such file or folder")
        files = []
        for folder, folders, names in os.walk(path):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            files += [Path(folder, name) for name in sorted(names)
                      if not name.startswith(".") and name.lower().endswith(_SUFFIXES)]
        if not files:
            raise UserError(f"{path}: no text here: looked for "
                            f"{', '.join('*' + suffix for suffix in _SUFFIXES)} in it and its sub-folders")
        return files

    def _decoded(self, raw: bytes, path: Path, offset: int) -> str | None:
        """Text, or None where it is left out. offset: where in the file `raw` begins."""
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            if self.config.encoding_errors == "skip":
                self.skipped += 1
                return None
            raise UserError(f"{path}: not UTF-8 at byte {offset + error.start} (0x{raw[error.start]:02x}); "
                            "save the file as UTF-8, or leave such text out: "
                            f"'{{type: files, path: {self.config.path}, encoding_errors: skip}}'") from error

    def _plain(self, path: Path) -> Iterator[tuple[str, int, str]]:
        """(part, byte offset behind it, text): the whole file, or its parts in order, numbered from 1."""
        target = self.config.document_bytes
        whole = path.stat().st_size <= 2 * target
        with open(path, "rb") as file:
            rest, offset, number = b"", 0, 0
            while True:
                block = file.read() if whole else file.read(2 * target - len(rest))
                piece = rest + block
                if not piece:
                    return
                cut = len(piece) if whole or len(piece) < 2 * target else _cut(piece, target)
                piece, rest = piece[:cut], piece[cut:]
                number += 1
                text = self._decoded(piece, path, offset)
                if text is not None:
                    yield "" if whole else str(number), offset + cut, _unix(text)
                offset += cut

    def _rows(self, path: Path) -> Iterator[tuple[int, int, Any]]:
        """(line number, byte offset behind it, what its JSON holds)."""
        offset = 0
        with open(path, "rb") as file:
            for number, raw in enumerate(file, 1):
                line = self._decoded(raw, path, offset)
                offset += len(raw)
                if line is None or not line.strip("\ufeff \t\r\n"):
                    continue
                try:
                    row = json.loads(line.lstrip("\ufeff"))
                except ValueError as error:
                    raise UserError(f"{path}:{number}: not JSON ({error}); each line must be one JSON "
                                    "object") from error
                yield number, offset, row

    def _json_lines(self, path: Path) -> Iterator[tuple[str, int, str]]:
        key = self.config.text_key
        for number, offset, row in self._rows(path):
            if not isinstance(row, dict) or not isinstance(row.get(key), str):
                has = f"its keys are {', '.join(row)}" if isinstance(row, dict) else "it is not an object"
                raise UserError(f"{path}:{number}: no text under the key {key!r}: {has}; name the key "
                                "that holds the text: text_key")
            yield str(number), offset, _unix(row[key])

    def _parquet(self, path: Path) -> Iterator[tuple[str, int, str]]:
        import pyarrow
        import pyarrow.parquet

        key, number, size = self.config.text_key, 0, path.stat().st_size
        try:
            file = pyarrow.parquet.ParquetFile(path)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{path}: not a Parquet file, or one cut short ({error})") from error
        with file:
            kind = file.schema_arrow.field(key).type if key in file.schema_arrow.names else None
            if kind not in (pyarrow.string(), pyarrow.large_string()):
                raise UserError(f"{path}: no column {key!r} of text; its columns are "
                                f"{', '.join(file.schema_arrow.names)}; name the one that holds the text: "
                                "text_key")
            rows = max(file.metadata.num_rows, 1)
            for batch in file.iter_batches(batch_size=256, columns=[key]):
                for raw in batch.column(0).cast(pyarrow.large_binary()):
                    number += 1
                    value = raw.as_py()
                    if value is None:
                        continue
                    try:
                        yield str(number), size * number // rows, _unix(value.decode("utf-8"))
                    except UnicodeDecodeError as error:
                        if self.config.encoding_errors == "error":
                            raise UserError(f"{path}: row {number}: not UTF-8 at byte {error.start} of the "
                                            "text; mend it, or set encoding_errors: skip") from error
                        self.skipped += 1


def _unix(text: str) -> str:
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


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
