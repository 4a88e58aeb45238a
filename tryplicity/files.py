"""Files that become visible whole or not at all. Loads no torch."""

from __future__ import annotations

import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def sync(path: Path) -> None:
    """Wait until the disk has it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def own_name(beginning: str) -> str:
    """The name of something this process is writing, told from what other processes and machines write."""
    return f"{beginning}{_host()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


def abandoned(folder: Path, beginning: str) -> list[Path]:
    """What processes of this machine that no longer run left under such names."""
    ours = re.compile(re.escape(f"{beginning}{_host()}-") + r"(\d+)-[0-9a-f]{8}")
    named = [(folder / name, ours.fullmatch(name)) for name in os.listdir(folder)]
    return [path for path, name in named if name and not _runs(int(name[1]))]


def _host() -> str:
    return socket.gethostname().replace("-", "_")


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Write to the path given; it becomes `path` at the end, or nothing does. What a killed process left half written
    of the same file is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beginning = f".{path.name}.tmp-"
    for left in abandoned(path.parent, beginning):
        left.unlink(missing_ok=True)
    temporary = path.with_name(own_name(beginning))
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Fill the folder given; it becomes `path` at the end, in place of one that is there, or nothing does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
    replaced = temporary.with_suffix(".old.tmp")
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            sync(file)
        sync(temporary)
        if path.exists():
            os.replace(path, replaced)
        try:
            os.replace(temporary, path)
        except OSError:
            if replaced.exists():
                os.replace(replaced, path)
            raise
        sync(path.parent)
    finally:
        for folder in (temporary, replaced):
            shutil.rmtree(folder, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
