"""Files as bytes, compressed ones too."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tryplicity_plugins.sources.rows import BadRow

_AT_ONCE = 1 << 18      # bytes unpacked at a time


def _zstd(packed: Any) -> Any:
    import pyarrow

    return pyarrow.CompressedInputStream(packed, "zstd")


_UNPACKED = {".gz": lambda packed: gzip.GzipFile(fileobj=packed), ".bz2": bz2.BZ2File, ".xz": lzma.LZMAFile,
             ".zst": _zstd}
COMPRESSED = tuple(_UNPACKED)


def kind(path: Path) -> str:
    """What a file holds, by its suffix in small letters: ".jsonl" for a.jsonl and for a.jsonl.gz."""
    return path.with_suffix("").suffix.lower() if path.suffix.lower() in _UNPACKED else path.suffix.lower()


def whole_suffix(path: Path) -> str:
    """The suffix in small letters, with the one of its compression: ".jsonl.gz"."""
    return kind(path) + path.suffix.lower() if path.suffix.lower() in _UNPACKED else path.suffix.lower()


@contextmanager
def opened(path: Path) -> Iterator[tuple[io.BufferedReader, Callable[[], int]]]:
    """The file, unpacked where it is compressed, and how far into the file on the disk it is read, in bytes. Reading
    raises BadRow where it is damaged or cut short, as far as its compression can tell."""
    with open(path, "rb") as packed:
        unpack = _UNPACKED.get(path.suffix.lower())
        if unpack is None:
            yield packed, packed.tell
        else:
            yield io.BufferedReader(_Unpacked(packed, unpack, path.suffix), _AT_ONCE), packed.tell


class _Unpacked(io.RawIOBase):
    def __init__(self, packed: Any, unpack: Callable[..., Any], suffix: str) -> None:
        self.packed, self.unpack, self.suffix = packed, unpack, suffix
        self.inner: Any = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            if self.inner is None:
                self.inner = self.unpack(self.packed)
            data = self.inner.read1(len(buffer))     # what comes before an error is given first
        except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:      # of the disk, not of the data
                raise
            raise BadRow(f"damaged or cut short ({self.suffix})", " ".join(str(error).split())) from None
        buffer[:len(data)] = data
        return len(data)
