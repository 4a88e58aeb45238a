"""What a training or generating process sets once: memory allocation, threads, stop signals."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tryplicity.hardware import Hardware

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h
STOPPING = "stopping: what is at hand is finished and saved first; Ctrl-C again ends at once, without saving"
#: seconds that a step may go on after a stop signal where nothing would be lost without it: something compiles
PROMPT = float(os.environ.get("TRYPLICITY_PROMPT", "5"))


def tune_malloc() -> None:
    """Let glibc keep big blocks from now on: torch on CPU otherwise maps and faults every large tensor anew. What is
    free at this moment goes back to the system.

    Halves the time of bandwidth-bound operations; resident memory grows by up to half. No effect elsewhere.
    """
    if sys.platform != "linux":
        return
    try:
        libc = ctypes.CDLL(None)
        libc.malloc_trim(0)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    except (OSError, AttributeError):
        pass  # another C library: slower, nothing else


def limit_spinning() -> None:
    """Before torch is imported: let a waiting OpenMP thread spin about a tenth of a millisecond, then sleep.

    GNU OpenMP spins much longer by itself, which ruins both sides when the cores are shared; sleeping at once
    (OMP_WAIT_POLICY=PASSIVE) costs a fifth of the speed when they are not. What the user set stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "30000")


def allocator_settings(hardware: Hardware) -> None:
    """Before the first allocation on a GPU, which is when torch reads them: what the profile says of its allocator
    (pytorch.org/docs/stable/notes/cuda.html, "Memory management"). What the user set stays."""
    if hardware.device != "cpu" and not {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = f"expandable_segments:{hardware.expandable_segments}"


def say(text: str) -> None:
    """A line on stderr. A terminal that is gone costs the line, not the training."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def exit_code(number: int) -> int:
    """Of a process that ended in good order because of a signal: 130 after a Ctrl-C, 143 after SIGTERM or SIGHUP."""
    return 130 if number == signal.SIGINT else 143


class Stopped(BaseException):
    """A stop signal ended a step in the middle, because nothing is lost by that. Like KeyboardInterrupt no Exception,
    so that nothing on the way takes it for a failure."""


class StopSignals:
    """Turns the first SIGTERM, SIGHUP (the terminal is gone) or Ctrl-C into a request that the loop polls; a second
    Ctrl-C ends at once. A signal that this process was started to ignore, as nohup does with SIGHUP, stays ignored."""

    def __init__(self, answer: str = "") -> None:
        """answer: what is said at once to the first Ctrl-C."""
        self.received: int | None = None
        self._answer = answer
        self._before: dict[int, object] = {}
        self._fruitless = self._late = False

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_IGN:
                continue
            with contextlib.suppress(ValueError):  # not the main thread: whoever started it handles signals
                self._before[number] = signal.signal(number, self._receive)
        return self

    def requested(self) -> bool:
        """Whether to stop."""
        return self.received is not None

    @contextlib.contextmanager
    def nothing_to_lose(self, sure: bool = True) -> Iterator[None]:
        """Inside, Stopped is raised where a signal has not been heard for PROMPT seconds: compilation takes minutes,
        and who sends SIGTERM seldom waits so long. sure: whether there really is nothing that is not saved."""
        self._fruitless = sure
        try:
            yield
        finally:
            self._fruitless = False

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._late and self._fruitless:
            raise Stopped
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received is None and number == signal.SIGINT and self._answer:
            with contextlib.suppress(OSError):  # not print: the signal may have come in the middle of one
                os.write(2, f"\n{self._answer}\n".encode())
        if self.received is None and self._fruitless:
            timer = threading.Timer(PROMPT, self._remind)
            timer.daemon = True
            timer.start()
        if not self._late:
            self.received = number

    def _remind(self) -> None:
        """Have the handler called once more, in the main thread, wherever that is."""
        self._late = True
        if self._fruitless:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)
