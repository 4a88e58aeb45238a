"""The files of a folder in a fixed order; what is passed over is counted with its reason."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from tryplicity import LeftOut
from tryplicity_plugins.sources.opened import whole_suffix


class Found(NamedTuple):
    """A regular file."""

    path: Path
    inner: str              # its path below the folder, with / between the parts
    size: int               # bytes
    changed: tuple[int, ...]    # of no meaning but that another value means another content


def walk(root: Path, wanted: Callable[[str], bool], left_out: LeftOut) -> Iterator[Found]:
    """The regular files of `root` and its sub-folders whose suffix (".txt" or ".jsonl.gz", in small letters) is wanted:
    a folder's files by name, then its folders by name. Nothing else is opened; links to files are followed, links to
    folders are not, since they may lead in a circle."""
    folders = [(root, "")]
    while folders:
        folder, inside = folders.pop()
        try:
            with os.scandir(folder) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            left_out.add(_unreadable(error), inside or folder)
            continue
        inner_folders = []
        for entry in found:
            inner = inside + entry.name
            if entry.name.startswith("."):
                left_out.add("hidden", inner)
            elif entry.is_dir(follow_symlinks=False):
                inner_folders.append((Path(entry.path), f"{inner}/"))
            elif file := _file(entry, inner, wanted, left_out):
                yield file
        folders += reversed(inner_folders)


def _file(entry: os.DirEntry, inner: str, wanted: Callable[[str], bool], left_out: LeftOut) -> Found | None:
    path = Path(entry.path)
    try:
        info = entry.stat()
    except FileNotFoundError:
        left_out.add("linked to nothing", inner)
    except OSError as error:
        left_out.add(_unreadable(error), inner)
    else:
        suffix = whole_suffix(path)
        if stat.S_ISDIR(info.st_mode):
            left_out.add("linked to a folder", inner)
        elif not stat.S_ISREG(info.st_mode):
            left_out.add("no regular file", inner)
        elif not wanted(suffix):
            left_out.add(f"of another kind ({suffix or 'no suffix'})", inner)
        elif not info.st_size:
            left_out.add("empty", inner)
        else:
            return found(path, inner, info)
    return None


def found(path: Path, inner: str, info: os.stat_result) -> Found:
    # the time of change alone misses what was written within a tick of the clock, or set back
    return Found(path, inner, info.st_size, (info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_ino))


def _unreadable(error: OSError) -> str:
    return f"unreadable ({error.strerror})"
