"""Where prepared data is kept, and how what is there becomes visible: whole or not at all. Loads no torch."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from tryplicity.errors import UserError
from tryplicity.files import abandoned, own_name, sync

_BUILDING = ".building-"


def cache_root(cache: str | Path | None = None) -> Path:
    """`cache`, else $TRYPLICITY_CACHE, else $XDG_CACHE_HOME/tryplicity, else ~/.cache/tryplicity."""
    if cache is not None:
        return Path(cache).expanduser()
    if os.environ.get("TRYPLICITY_CACHE"):
        return Path(os.environ["TRYPLICITY_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "tryplicity"


@contextlib.contextmanager
def building(target: Path, named: Callable[[], str] | None = None) -> Iterator[Path]:
    """A folder to write into; renamed to `target` when the block ends well, removed when it does not.

    named: gives the last part of the target then, where it depends on what was written.
    Several processes may build the same target at once: the first to end is kept. Raises UserError when the
    disk is full or the cache cannot be written.
    """
    temporary = target.parent / own_name(_BUILDING)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for left in abandoned(target.parent, _BUILDING):
            shutil.rmtree(left, ignore_errors=True)
        temporary.mkdir()
    except OSError as error:
        raise UserError(f"{target.parent}: cannot write here ({error.strerror}); set TRYPLICITY_CACHE to a "
                        "folder that can be written") from error
    try:
        yield temporary
        for path in temporary.iterdir():
            sync(path)
        if named is not None:
            target = target.with_name(named())
        try:
            os.rename(temporary, target)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
        sync(target.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"{target.parent}: the disk is full; free some space, or set TRYPLICITY_CACHE to "
                            "a folder on another disk") from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)    # gone already where it was renamed
