"""C++ beside its Python, compiled when it is first needed and kept.

One call of the compiler that the machine has, no headers but its own. The library is named by a hash of everything
it comes from, so that it is compiled once per machine and again when a source, the compiler or the processor changes.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

COMPILERS = ("g++", "clang++", "c++")
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-pthread", "-fno-math-errno", "-ffp-contract=off")
NATIVE = ("-march=native",) if platform.machine().lower() in ("x86_64", "amd64") else ("-mcpu=native",)
TIMEOUT = 300  # seconds; a library takes 2 to 10

_lock = threading.Lock()
_loaded: dict[str, ctypes.CDLL | None] = {}  # by key
_reason: str | None = None


def compile_library(*sources: Path) -> ctypes.CDLL | None:
    """The sources as one loaded library, or None where there is no compiler (`why_not` says so in a line).

    Headers (*.h) beside the sources belong to it. Set TRYPLICITY_KERNELS=0 to have none, CXX to name a compiler.
    ctypes.CDLL releases the GIL while a function runs.
    """
    global _reason
    if not enabled():
        _reason = "TRYPLICITY_KERNELS=0: plain PyTorch does the ternary products, several times slower"
        return None
    compiler = find_compiler()
    if compiler is None:
        _reason = ("no C++ compiler found (g++, clang++ or $CXX): plain PyTorch does the ternary products, "
                   "several times slower")
        return None
    key = _key(sources, compiler)
    with _lock:
        if key not in _loaded:
            _loaded[key] = _load(sources, compiler, key)
        return _loaded[key]


def why_not() -> str | None:
    """Why a library asked for is missing, in one line; None if none is."""
    return _reason


def enabled() -> bool:
    return os.environ.get("TRYPLICITY_KERNELS", "1") != "0"


def find_compiler() -> Path | None:
    names = (os.environ["CXX"],) if os.environ.get("CXX") else COMPILERS
    found = next(filter(None, map(shutil.which, names)), None)
    return Path(found) if found else None


def cache_folder() -> Path:
    if folder := os.environ.get("TRYPLICITY_CACHE"):
        return Path(folder).expanduser() / "kernels"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "tryplicity" / "kernels"


def _load(sources: tuple[Path, ...], compiler: Path, key: str) -> ctypes.CDLL | None:
    global _reason
    name = f"{sources[0].stem}-{key}.so"
    library = _open(cache_folder() / name)
    if library is not None:
        return library
    problem = "the library it made does not load"
    with _scratch() as scratch:
        built = Path(scratch) / name
        failed = _compile(sources, compiler, built)
        if failed is None:
            library = _open(built)  # what is loaded stays when the file moves
            if library is not None:
                with contextlib.suppress(OSError):  # whole or not at all, also when two processes are at it
                    os.replace(built, cache_folder() / name)
                return library
    _reason = (f"{compiler} cannot compile {sources[0].name} ({failed or problem}): plain PyTorch does the ternary "
               "products, several times slower")
    return None


def _scratch() -> tempfile.TemporaryDirectory:
    """Beside the cache, so that what is made can be renamed into it; elsewhere if that cannot be written to."""
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(dir=cache_folder(), prefix=".compiling-")
    except OSError:
        return tempfile.TemporaryDirectory(prefix="tryplicity-")


def _compile(sources: tuple[Path, ...], compiler: Path, built: Path) -> str | None:
    """None, or the first error in a line. A compiler that does not know the processor does without."""
    problem = None
    for more in (NATIVE, ()):
        try:
            done = subprocess.run([compiler, *FLAGS, *map(str, sources), *more, "-o", str(built)],
                                  capture_output=True, text=True, errors="replace", timeout=TIMEOUT)
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
        if done.returncode == 0 and built.exists():
            return None
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        error = next((line for line in lines if "error" in line), lines[0] if lines else "")
        problem = problem or error[:200] or f"it ended with {done.returncode}"
    return problem


def _open(path: Path) -> ctypes.CDLL | None:
    if not path.exists():
        return None
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        return None


def _key(sources: tuple[Path, ...], compiler: Path) -> str:
    """Two machines may share a home: the processor counts as well."""
    digest = hashlib.sha256()
    headers = sorted({header for source in sources for header in source.parent.glob("*.h")})
    for path in (*sources, *headers):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    real = compiler.resolve()
    stat = real.stat()
    digest.update(repr((str(real), stat.st_size, stat.st_mtime_ns, FLAGS, NATIVE,
                        _processor())).encode())
    return digest.hexdigest()[:24]


@functools.cache
def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            kept = {line.strip() for line in file if line.startswith(("flags", "Features", "model name", "CPU part"))}
            return "\n".join(sorted(kept))
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
