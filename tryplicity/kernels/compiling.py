"""C++ beside its Python, compiled when it is first needed and kept.

One call of the compiler that the machine has, no headers but its own. The library is named by a hash of everything
it comes from, so that it is compiled once per machine and again when a source, the compiler or the processor changes,
and by a hash of itself, so that one that was cut short is made anew and never run.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import glob
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

COMPILERS = ("g++", "clang++", "c++")
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-pthread", "-fno-fast-math", "-fno-math-errno", "-ffp-contract=off")
NATIVE = ("-march=native",) if platform.machine().lower() in ("x86_64", "amd64") else ("-mcpu=native",)
TIMEOUT = 300  # seconds; a library takes 2 to 10
UNUSED = 30 * 86400  # seconds after which a library that nobody loaded is removed

log = logging.getLogger("tryplicity.kernels")

_lock = threading.Lock()
_loaded: dict[str, ctypes.CDLL | None] = {}  # by key
_reasons: dict[str, str] = {}  # by the name of a library that is missing


def compile_library(*sources: Path) -> ctypes.CDLL | None:
    """The sources as one loaded library, or None where there is no compiler (`why_not` says so in a line).

    Headers (*.h) beside the sources belong to it. Set TRYPLICITY_KERNELS=0 to have none; CXX names a compiler, with
    arguments if need be ("ccache g++"), and CXXFLAGS more of them, which ours follow. It is kept in the user's cache
    (TRYPLICITY_CACHE, XDG_CACHE_HOME), or where nothing can be kept or run there, in memory or a temporary folder.
    ctypes.CDLL releases the GIL while a function runs.
    """
    name = sources[0].stem if len(sources) == 1 else sources[0].parent.name
    if not enabled():
        return _without(name, "TRYPLICITY_KERNELS=0")
    compiler = find_compiler()
    if isinstance(compiler, str):
        return _without(name, compiler)
    key = _key(sources, compiler)
    with _lock:
        if key not in _loaded:
            _loaded[key] = _load(name, sources, compiler, key)
        if _loaded[key] is not None:
            _reasons.pop(name, None)
        return _loaded[key]


def _without(name: str, reason: str) -> None:
    _reasons[name] = reason


def why_not() -> str | None:
    """Why libraries asked for are missing, in one line; None if none is."""
    if not _reasons:
        return None
    by_reason: dict[str, list[str]] = {}
    for name, reason in _reasons.items():
        by_reason.setdefault(reason, []).append(name)
    told = "; ".join(f"{reason} ({' and '.join(names)})" for reason, names in by_reason.items())
    return f"{told}: plain PyTorch does the ternary products and the layers' steps, several times slower"


def enabled() -> bool:
    return os.environ.get("TRYPLICITY_KERNELS", "1") != "0"


def find_compiler() -> list[str] | str:
    """The words that call the compiler; or why there is none."""
    wanted = os.environ.get("CXX", "").strip()
    if not wanted:
        found = next(filter(None, map(shutil.which, COMPILERS)), None)
        return [found] if found else f"no C++ compiler found ({', '.join(COMPILERS)} or $CXX)"
    if found := shutil.which(wanted):  # also one whose name has spaces
        return [found]
    try:
        words = shlex.split(wanted)
    except ValueError as error:
        return f"CXX={wanted!r} cannot be read: {error}"
    found = shutil.which(words[0]) if words else None
    return [found, *words[1:]] if found else f"no C++ compiler found: CXX={wanted!r} names none"


def cache_folder() -> Path:
    """Where libraries are kept. Raises RuntimeError where the user has no home."""
    if folder := os.environ.get("TRYPLICITY_CACHE"):
        return Path(folder).expanduser() / "kernels"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "tryplicity" / "kernels"


def _folders() -> Iterator[Path]:
    """Folders to keep libraries in and run them from, the best first."""
    try:
        yield cache_folder()
    except RuntimeError as error:  # no home
        log.warning("compiled libraries cannot be kept in the user's cache: %s", error)
    user = str(os.getuid()) if hasattr(os, "getuid") else "user"
    for folder, own in ((os.environ.get("XDG_RUNTIME_DIR"), "tryplicity-kernels"),
                        ("/dev/shm", f"tryplicity-kernels-{user}"),
                        (tempfile.gettempdir(), f"tryplicity-kernels-{user}")):
        if folder and os.path.isdir(folder) and _is_ours(Path(folder) / own):
            yield Path(folder) / own


def _is_ours(folder: Path) -> bool:
    """Whether it is not there yet, or nobody else can write to it: what lies there is run, and others write beside."""
    try:
        found = folder.lstat()
    except OSError:
        return True
    return not hasattr(os, "getuid") or (
        stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022)


def _load(name: str, sources: tuple[Path, ...], compiler: list[str], key: str) -> ctypes.CDLL | None:
    """From the first folder that has it and can run it, or else made there."""
    problems, built = [], None
    with contextlib.ExitStack() as scratches:
        for folder in _folders():
            try:
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                library = _kept(folder, name, key)
                if library is None:
                    scratch = scratches.enter_context(_scratch(folder))
                    made = scratch / f"{name}.so"
                    if built is None:
                        if failed := _compile(sources, compiler, made):
                            return _without(name, f"{shlex.join(compiler)} cannot compile {sources[0].name} ({failed})")
                        built = made
                    else:
                        shutil.copyfile(built, made)
                    library = _open(made)  # what is loaded stays when the file moves
                    _keep(made, folder, name, key)
                if problems:
                    log.warning("the compiled library of %s is kept in %s: %s", name, folder, "; ".join(problems))
                return library
            except OSError as error:
                problems.append(f"{folder}: {error.strerror or str(error)[:200]}")
    made = f"the library that {shlex.join(compiler)} made does not load" if built else "there is no place for a library"
    return _without(name, f"{made} ({'; '.join(problems)})")


def _kept(folder: Path, name: str, key: str) -> ctypes.CDLL | None:
    """A library that was made before; those that are not as they were made are removed."""
    for path in folder.glob(f"{glob.escape(name)}-{key}.*.so"):
        try:
            if _digest(path) == path.suffixes[-2].lstrip("."):
                library = _open(path)
                with contextlib.suppress(OSError):
                    os.utime(path)  # it is in use
                return library
            log.warning("%s is damaged, and is made anew", path)
            path.unlink()
        except FileNotFoundError:  # another process has just replaced it
            continue
    return None


def _keep(made: Path, folder: Path, name: str, key: str) -> None:
    """Whole or not at all, also when two processes are at it. Without room it is made again the next time."""
    kept = folder / f"{name}-{key}.{_digest(made)}.so"
    try:
        os.replace(made, kept)
        for path in folder.glob(f"{glob.escape(name)}-*.so"):
            same = path.name.startswith(f"{name}-{key}.")
            if path != kept and (same or time.time() - path.stat().st_mtime > UNUSED):
                path.unlink()
    except OSError as error:
        if not kept.exists():
            log.warning("the compiled library of %s cannot be kept in %s: %s", name, folder, error.strerror)


@contextlib.contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A folder to compile in, beside where the library goes; those of processes that were killed are removed."""
    mine = f".compiling-{re.sub('[^A-Za-z0-9.]', '_', platform.node())}-"
    for path in folder.glob(".compiling-*"):
        with contextlib.suppress(OSError, ValueError):
            left = time.time() - path.stat().st_mtime > 2 * TIMEOUT
            if left or (path.name.startswith(mine) and not _lives(int(path.name[len(mine):].split("-")[0]))):
                shutil.rmtree(path, ignore_errors=True)
    scratch = Path(tempfile.mkdtemp(dir=folder, prefix=f"{mine}{os.getpid()}-"))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def _compile(sources: Sequence[Path], compiler: Sequence[str], built: Path) -> str | None:
    """None, or the first error in a line. A compiler that does not know the processor does without, and one that does
    not know what CXXFLAGS says, without that. Raises OSError where there is no room for what it makes."""
    problem, own, environment = None, _user_flags(), {**os.environ, "LC_ALL": "C", "TMPDIR": str(built.parent)}
    for more, native in ((own, NATIVE), (own, ()), *([((), NATIVE), ((), ())] if own else [])):
        try:
            done = subprocess.run([*compiler, *more, *FLAGS, *map(str, sources), *native, "-o", str(built)],
                                  capture_output=True, text=True, errors="replace", timeout=TIMEOUT,
                                  stdin=subprocess.DEVNULL, env=environment)
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
        if done.returncode == 0 and built.exists():
            if more != own:
                log.warning("compiled without CXXFLAGS=%r: %s", shlex.join(own), problem)
            return None
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        if any("No space left" in line or "Disk quota" in line for line in lines):
            raise OSError(28, "No space left on device")
        error = next((line for line in lines if "error" in line), lines[0] if lines else "")
        problem = problem or error[:200] or f"it ended with {done.returncode}"
    return problem


def _user_flags() -> tuple[str, ...]:
    try:
        return tuple(shlex.split(os.environ.get("CXXFLAGS", "")))
    except ValueError:
        return ()


def _open(path: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(path))


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _key(sources: Sequence[Path], compiler: Sequence[str]) -> str:
    """Two machines may share a home: the processor counts as well."""
    digest = hashlib.sha256()
    headers = sorted({header for source in sources for header in source.parent.glob("*.h")})
    for path in (*sources, *headers):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    programs = [Path(found).resolve() for word in compiler if (found := shutil.which(word))]
    stats = [(str(program), program.stat().st_size, program.stat().st_mtime_ns) for program in programs]
    digest.update(repr((stats, tuple(compiler[1:]), _user_flags(), FLAGS, NATIVE, _processor())).encode())
    return digest.hexdigest()[:24]


@functools.cache
def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            kept = {line.strip() for line in file if line.startswith(("flags", "Features", "model name", "CPU part"))}
            return "\n".join(sorted(kept))
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
