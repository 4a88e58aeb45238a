"""Files that become visible whole or not at all. Loads no torch."""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tryplicity.errors import UserError

#: of a file system that has no locks: there, what a lock's file says must do
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


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


def _may_run(process: str) -> bool:
    """Of "process 12 on host"; what another host runs nobody can say."""
    said = re.fullmatch(r"process (\d+) on (.+)", process)
    return said is not None and (said[2] != socket.gethostname() or _runs(int(said[1])))


def _host() -> str:
    return re.sub("[-.]", "_", socket.gethostname())


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def may_be_written(out: Path, kind: str, is_kind: Callable[[Path], bool], sources: Iterable[Path] = ()) -> None:
    """Refuse to write `out` over what is read, or over anything but an earlier one of its kind; an empty file or folder
    holds nothing to lose.

    kind: what the command writes, as "a search index"; is_kind: whether a file (or folder, for what is one) is such.
    sources: files and folders that the command reads. Raises UserError.
    """
    if not os.path.lexists(out):
        return
    for source in sources:
        if source.exists() and out.exists() and out.samefile(source):
            raise UserError(f"{out}: this is what is read; writing {kind} here would destroy it; give another --out")
    if not out.exists() and out.is_symlink():
        return      # its place is taken, not what it names
    if not out.is_file() and not out.is_dir():
        raise UserError(f"{out}: not a plain file; give another --out")
    try:
        kept = any(out.iterdir()) if out.is_dir() else out.stat().st_size > 0
        refused = kept and not is_kind(out)
    except OSError as error:
        raise UserError(f"{out}: cannot be read ({error.strerror or error}), so it is not written over; give another "
                        "--out") from error
    if refused:
        raise UserError(f"{out}: exists and is not {kind}; it is not written over; give another --out, or remove it")


@contextmanager
def locked(path: Path) -> Iterator[str | None]:
    """Hold the file `path` for this process alone; gives None, or who has it: "process 12 on host". The lock goes with
    the process, however that ends, and the file with the lock; one that is left over holds nobody up."""
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.exists(path) and os.path.samestat(os.fstat(descriptor), os.stat(path)):
                break
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, *NO_LOCKS):
                raise
            who = os.read(descriptor, 1000).decode(errors="replace").strip()
            if error.errno in NO_LOCKS and not _may_run(who):
                break
            os.close(descriptor)
            yield who or "another process"
            return
        os.close(descriptor)  # whoever had it removed the file just now
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield None
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _mode_of_new(probe: Path) -> int | None:
    """The mode that a new file gets, by making one; os.umask would change it for other threads for a moment."""
    try:
        with open(probe, "xb") as file:
            return stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    except OSError:
        return None
    finally:
        probe.unlink(missing_ok=True)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Write to the path given; it becomes `path` at the end, or nothing does. What a killed process left half written
    of the same file is removed. Its mode is that of any new file, whatever the writer made it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beginning = f".{path.name}.tmp-"
    for left in abandoned(path.parent, beginning):
        left.unlink(missing_ok=True)
    temporary = path.with_name(own_name(beginning))
    mode = _mode_of_new(path.with_name(own_name(beginning)))  # if killed, it goes as the half-written file does
    try:
        yield temporary
        if mode is not None:  # some writers make files that only their owner may read (safetensors)
            temporary.chmod(mode)
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Fill the folder given; it becomes `path` at the end, in place of one that is there, or nothing does. What a
    killed process left half filled of the same folder is removed."""
    if path.parent.is_dir():
        clear_folders(path.parent, of=path.name)
    temporary = begin_folder(path)
    try:
        yield temporary
        commit_folder(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def begin_folder(path: Path) -> Path:
    """A new folder to fill, which `commit_folder` makes `path`, and `clear_folders` removes if nobody did."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{own_name(f'.{path.name}.')}.tmp")
    temporary.mkdir()
    return temporary


def commit_folder(temporary: Path, path: Path) -> None:
    """Make a folder that is filled `path`, in place of one that is there."""
    replaced = temporary.with_suffix(".old.tmp")
    for file in temporary.rglob("*"):
        sync(file)
    sync(temporary)
    try:
        if path.exists():  # killed between the next two lines: see `clear_folders`
            os.replace(path, replaced)
        try:
            os.replace(temporary, path)
        except OSError:
            if replaced.exists():
                os.replace(replaced, path)
            raise
        sync(path.parent)
    finally:
        shutil.rmtree(replaced, ignore_errors=True)


def clear_folders(parent: Path, of: str | None = None) -> tuple[int, int]:
    """What killed processes left of `whole_folder` in here. A folder that was being replaced goes back to its place if
    that is empty. How many were removed, and their bytes.

    of: the one folder meant, where others may be writing it; then only what this machine's ended processes left.
    Without it, everything: only for who knows that no other is writing here.
    """
    removed = size = 0
    for left in sorted(parent.glob(".*.tmp")) if parent.is_dir() else ():
        named = re.fullmatch(r"\.(.+)\.(?:([^.-]+)-)?(\d+)-[0-9a-f]{8}(\.old)?\.tmp", left.name)
        if not named or not left.is_dir():
            continue
        name, host, process, replaced = named.groups()
        if of is not None and (name != of or host != _host() or _runs(int(process))):
            continue
        if replaced and not (parent / name).exists():
            os.replace(left, parent / name)
            continue
        size += sum(file.stat().st_size for file in left.rglob("*") if file.is_file())
        shutil.rmtree(left, ignore_errors=True)
        removed += 1
    return removed, size


def write_text(path: Path, text: str) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
