"""Tensors as checkpoints hold them: safetensors files, and an index of which file has which piece of which tensor.

    model.safetensors  optimizer.safetensors                       what one process wrote
    model-00001-of-00008.safetensors  ...                          what eight wrote, each its share
    index.json    {"model": {name: {dtype, shape, pieces: [{file, key, offsets, shape}]}}, "optimizer": ...}

Nothing here is pickled: reading a folder that somebody sent runs no code of his.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tryplicity.errors import UserError

INDEX = "index.json"
#: safetensors' names, the widest first: tensors in this order are aligned to their own width
DTYPES = {torch.complex64: "C64", torch.float64: "F64", torch.int64: "I64", torch.float32: "F32", torch.int32: "I32",
          torch.bfloat16: "BF16", torch.float16: "F16", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
          torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"}
_ORDER = {dtype: place for place, dtype in enumerate(DTYPES)}
_BY_NAME = {name: dtype for dtype, name in DTYPES.items()}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """A safetensors file of contiguous tensors in CPU memory; its SHA-256, taken while it is written. Equal tensors
    give equal files. Lets other threads run all the while. Raises OSError.

    The format: 8 bytes of length, a JSON header, then the tensors' bytes without gaps
    (huggingface.co/docs/safetensors).
    """
    return write_entries(path, {name: Entry.of(tensor) for name, tensor in tensors.items()})


def write_entries(path: Path, entries: Mapping[str, Entry], done: Callable[[int, int], None] = lambda *_: None) -> str:
    """As `write_tensors`, of tensors that are read one at a time as they are written. done: called with the bytes
    written and all of them."""
    ordered = sorted(entries.items(), key=lambda item: (_ORDER[item[1].dtype], item[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, entry in ordered:
        size = torch.Size(entry.shape).numel() * entry.dtype.itemsize
        header[name] = {"dtype": DTYPES[entry.dtype], "shape": list(entry.shape),
                        "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    digest = hashlib.sha256()
    with path.open("xb") as file:
        def write(part: Any) -> None:
            digest.update(part)
            file.write(part)

        write(len(text).to_bytes(8, "little"))
        write(text)
        for name, entry in ordered:
            if torch.Size(entry.shape).numel():
                write(entry.whole().reshape(-1).view(torch.uint8).numpy())
            done(header[name]["data_offsets"][1], offset)
    return digest.hexdigest()


@dataclass(frozen=True)
class Piece:
    """A stretch of a tensor: where it begins in the whole one, its size, and how it is read."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class Entry:
    """A saved tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Entry:
        """A whole tensor that is in memory already."""
        shape = tuple(tensor.shape)
        return cls(tensor.dtype, shape, (Piece((0,) * len(shape), shape, lambda: tensor),))

    def whole(self) -> Tensor:
        """In CPU memory."""
        if len(self.pieces) == 1:
            return self.pieces[0].read()
        whole = torch.empty(self.shape, dtype=self.dtype)
        for piece in self.pieces:
            at = tuple(slice(start, start + size) for start, size in zip(piece.offsets, piece.shape, strict=True))
            whole[at] = piece.read()
        return whole


class SavedTensors:
    """The tensors of a checkpoint by name, mapped and not read before they are used, one at a time.

    path: the checkpoint. names: of all tensors.
    """

    metadata: Mapping[str, str] = {}

    def __init__(self, path: Path, entries: Mapping[str, Entry], files: Iterable[_Mapped] = ()) -> None:
        self.path, self.entries, self._files = path, entries, tuple(files)
        self.names = set(entries)

    def __getitem__(self, name: str) -> Tensor:
        """The whole tensor, in CPU memory."""
        return self.entries[name].whole()

    def shape(self, name: str) -> list[int]:
        """Known without reading the tensor."""
        return list(self.entries[name].shape)

    def let_go(self) -> None:
        """Of the files' pages, which else count as this process's. What is read after that is mapped anew."""
        for file in self._files:
            file.let_go()


class _Mapped:
    """A safetensors file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._opened: Any = None

    @property
    def opened(self) -> Any:
        if self._opened is None:
            self._opened = safe_open(self.path, framework="pt")
        return self._opened

    def let_go(self) -> None:
        self._opened = None

    def reader(self, key: str) -> Callable[[], Tensor]:
        return lambda: self.opened.get_tensor(key)


def saved_weights(checkpoint: Path) -> SavedTensors:
    """A checkpoint's weights and buffers by their names in the model, whatever wrote it. Raises UserError where they
    cannot be read."""
    if (checkpoint / INDEX).is_file():
        return indexed(checkpoint, "model")
    return _of_file(checkpoint, checkpoint / "model.safetensors")


def indexed(checkpoint: Path, section: str) -> SavedTensors:
    """What the index lists under "model" or "optimizer". Raises UserError."""
    index = checkpoint / INDEX
    try:
        said = json.loads(index.read_text(encoding="utf-8"))[section]
        files = {}
        for name in sorted({piece["file"] for entry in said.values() for piece in entry["pieces"]}):
            if Path(name).name != name:
                raise ValueError(f"{name!r} is no name of a file in it")
            files[name] = _Mapped(checkpoint / name)
        keys = {name: set(file.opened.keys()) for name, file in files.items()}
        return SavedTensors(checkpoint, {name: _entry(entry, files, keys) for name, entry in said.items()},
                            files.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError, RecursionError) as error:
        raise UserError(f"{index}: cannot be read ({' '.join(str(error).split())}); take another checkpoint") from None


def _entry(said: Mapping[str, Any], files: Mapping[str, _Mapped], keys: Mapping[str, set[str]]) -> Entry:
    """Of the index. Raises ValueError where it does not fit the files or the pieces do not make up the whole."""
    shape, pieces, covered = tuple(said["shape"]), [], 0
    for piece in said["pieces"]:
        file, key, offsets, size = piece["file"], piece["key"], tuple(piece["offsets"]), tuple(piece["shape"])
        if key not in keys[file] or (found := tuple(files[file].opened.get_slice(key).get_shape())) != size:
            raise ValueError(f"{file} has no {key} of shape {list(size)}")
        if len(offsets) != len(shape) or len(found) != len(shape) or any(
                not 0 <= start <= start + length <= whole
                for start, length, whole in zip(offsets, size, shape, strict=True)):
            raise ValueError(f"{key} of {file} does not lie in the whole")
        pieces.append(Piece(offsets, size, files[file].reader(key)))
        covered += torch.Size(size).numel()
    if covered != torch.Size(shape).numel():
        raise ValueError("a piece is missing")
    return Entry(_BY_NAME[said["dtype"]], shape, tuple(pieces))


def _of_file(checkpoint: Path, path: Path) -> SavedTensors:
    return open_files(checkpoint, [path])


def open_files(folder: Path, paths: Iterable[Path]) -> SavedTensors:
    """All tensors of some safetensors files, which have different names. Raises UserError."""
    entries: dict[str, Entry] = {}
    files = [_Mapped(path) for path in paths]
    for file in files:
        path = file.path
        try:
            for key in file.opened.keys():  # noqa: SIM118 (no mapping)
                if key in entries:
                    raise UserError(f"{path}: {key} is in another file of {folder} too; remove one of them")
                slice_ = file.opened.get_slice(key)
                shape = tuple(slice_.get_shape())
                entries[key] = Entry(_BY_NAME[slice_.get_dtype()], shape,
                                     (Piece((0,) * len(shape), shape, file.reader(key)),))
        except (SafetensorError, OSError, KeyError) as error:
            raise UserError(f"{path}: cannot be read as safetensors: {error}") from None
    return SavedTensors(folder, entries, files)


def in_memory(checkpoint: Path, tensors: Iterable[tuple[str, Tensor]]) -> SavedTensors:
    """Tensors that were read by another way."""
    return SavedTensors(checkpoint, {name: Entry.of(tensor) for name, tensor in tensors})
