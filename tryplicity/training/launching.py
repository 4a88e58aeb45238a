"""One training, several processes: this machine's, started and watched over here; or those of torchrun and srun.

The ranks of one machine are started by a supervisor of our own, and not by torch's elastic agent, which gives none of
what is wanted here: it answers SIGTERM by ending its workers within seconds, saved or not; it restarts where we want a
name and a reason; and it mixes what all of them print. What is torch's own is the store by which ranks find each other:
it lives in the supervisor (so does the agent's), so that no port is chosen before it is bound, and a rank that hangs
takes nothing with it.

Who is who stands in the environment, in torchrun's names (pytorch.org/docs/stable/elastic/run.html). Loads no torch
until ranks are started.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field
from types import FrameType

from tryplicity.errors import UserError
from tryplicity.run import Run
from tryplicity.training.process import STOPPING, exit_code, say

PARENT = "TRYPLICITY_PARENT"  # in a worker's environment: the process that started it
#: a worker of ours ends with: another rank is gone; the same, and it has named it; stopped with nothing to save
LOST, NAMED, NOTHING_LOST = 77, 78, 79
IN_ORDER = {0, exit_code(signal.SIGINT), exit_code(signal.SIGTERM)}  # and the others go on to their own end
SETTLE = 5.0  # seconds that ranks have to end by themselves once one has failed
TAIL = 12  # lines of a rank's last words
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def is_worker() -> bool:
    """Whether a launcher started this process as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launched() -> bool:
    """Whether the launcher is ours: it holds the run folder, and has prepared the data."""
    return PARENT in os.environ


def rank() -> int:
    return int(os.environ["RANK"]) if is_worker() else 0


def world_size() -> int:
    return int(os.environ["WORLD_SIZE"]) if is_worker() else 1


def local_world_size() -> int:
    """How many of the ranks are on this machine; all, where the launcher does not say."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


def adopt_slurm(environment: MutableMapping[str, str] = os.environ) -> None:
    """Inside a step of several tasks (`srun --ntasks=8 tryplicity train ...`): say who is who in torchrun's names.

    A batch script or an interactive shell is in no step of several tasks, and nothing is done there.
    slurm.schedmd.com/srun.html, "Output environment variables".
    """
    if "RANK" in environment or int(environment.get("SLURM_STEP_NUM_TASKS", 1)) < 2:
        return
    # "gpu[07-09,12],other": the first host, where rank 0 is
    first = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\])?", environment["SLURM_STEP_NODELIST"])
    environment.update(RANK=environment["SLURM_PROCID"], WORLD_SIZE=environment["SLURM_STEP_NUM_TASKS"],
                       LOCAL_RANK=environment["SLURM_LOCALID"])
    environment.setdefault("MASTER_ADDR", first[1] + (first[2] or ""))
    environment.setdefault("MASTER_PORT", str(20000 + int(environment["SLURM_JOB_ID"]) % 20000))
    counts = re.match(r"\d+", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    if counts:
        environment.setdefault("LOCAL_WORLD_SIZE", counts[0])


def tie_to_parent() -> None:
    """End with the launcher, whatever ends that: a worker without one would hold its GPU for ever."""
    parent = int(os.environ.get(PARENT, 0))
    if not parent:
        return
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # reaches a stopped process too
        if os.getppid() != parent:  # it ended before
            os._exit(LOST)
        return

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(LOST)

    threading.Thread(target=look, daemon=True).start()


@contextlib.contextmanager
def in_turn() -> Iterator[None]:
    """One process of this machine after another: the first prepares what the others then find in the cache."""
    from tryplicity.data.cache import cache_root
    from tryplicity.files import locked

    while True:
        with locked(cache_root() / "preparing.lock") as other:
            if other is None:
                yield
                return
        time.sleep(0.1)


@dataclass
class _Worker:
    rank: int
    process: subprocess.Popen
    last_words: deque[str] = field(default_factory=lambda: deque(maxlen=TAIL))
    reader: threading.Thread | None = None

    def listen(self) -> None:
        """Keep the last lines of what it says."""
        def read() -> None:
            for line in self.process.stdout:
                self.last_words.append(line.decode(errors="replace").rstrip())

        self.reader = threading.Thread(target=read, daemon=True)
        self.reader.start()

    def send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)

    def ended(self) -> bool:
        """Whether it has; its number is still its own then, until `end`."""
        return self.process.returncode is not None or os.waitid(
            os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def end(self) -> None:
        """It, and what it started."""
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        if self.reader is not None:
            self.reader.join(1.0)

    @property
    def called(self) -> str:
        return f"rank {self.rank} (process {self.process.pid} on {socket.gethostname()})"


def supervise(line: Sequence[str], ranks: int, run: Run) -> int:
    """Start so many ranks of `tryplicity LINE` on this machine and see them through; what to exit with.

    Rank 0 has this process's output; of the others only the last words are shown, when they fail. A stop signal goes to
    all of them, and they agree on the step. When one dies or hangs, the others are ended, and it is named. Raises
    UserError where MASTER_PORT is another's.
    """
    with _store() as port, _Signals() as signals:
        workers: list[_Worker] = []
        try:
            for number in range(ranks):
                workers.append(_start(line, number, ranks, port))
            ended = _wait(workers, signals)
        finally:
            for worker in workers:
                worker.end()
    return _verdict(workers, ended, signals.received, run)


@contextlib.contextmanager
def _store() -> Iterator[int]:
    """Where the ranks find each other, as long as they run; its port."""
    from torch.distributed import DistNetworkError, TCPStore

    wanted = os.environ.get("MASTER_PORT", "0")
    try:
        store = TCPStore("127.0.0.1", int(wanted), is_master=True, wait_for_workers=False)
    except (ValueError, TypeError):
        raise UserError(f"MASTER_PORT={wanted}: not a port number; leave it out, and any free one is taken") from None
    except DistNetworkError:
        raise UserError(f"MASTER_PORT={wanted}: the port is taken by another process of this machine; leave it out, "
                        "and any free one is taken") from None
    yield store.port


def _start(line: Sequence[str], number: int, ranks: int, port: int) -> _Worker:
    environment = {**os.environ, "RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(ranks),
                   "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                   "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
                   PARENT: str(os.getpid())}
    if sys.platform == "linux":  # a machine's own name may lead nowhere
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    quiet = {} if number == 0 else {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    # a session of its own: a Ctrl-C in the terminal is this process's to pass on
    worker = _Worker(number, subprocess.Popen([sys.executable, "-m", "tryplicity.cli", *line], env=environment,
                                              stdin=subprocess.DEVNULL, start_new_session=True, **quiet))
    if number:
        worker.listen()
    return worker


class _Signals:
    """Stop signals of this process, to be passed on; see `process.StopSignals`."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.waiting: list[int] = []  # not passed on yet
        self._before: dict[int, object] = {}

    def __enter__(self) -> _Signals:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                with contextlib.suppress(ValueError):  # not the main thread
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received is None:
            with contextlib.suppress(OSError):
                os.write(2, f"\n{STOPPING}\n".encode())
        # the first Ctrl-C is a request to save, like SIGTERM; another is meant as it is
        self.waiting.append(number if number == signal.SIGINT and self.received is not None else signal.SIGTERM)
        self.received = number


def _wait(workers: Sequence[_Worker], signals: _Signals) -> dict[int, int]:
    """Until all have ended; once one has failed, or all are to end at once, not for long. How those that ended by
    themselves did, by rank, in order."""
    until, ended = None, {}
    while len(ended) < len(workers) and (until is None or time.monotonic() < until):
        for worker in workers:
            if worker.rank not in ended and worker.ended():
                worker.end()
                ended[worker.rank] = worker.process.returncode
        for number in signals.waiting:
            for worker in workers:
                worker.send(number)
            if number == signal.SIGINT:
                until = until or time.monotonic() + SETTLE
        signals.waiting.clear()
        if until is None and not set(ended.values()) <= IN_ORDER:
            until = time.monotonic() + SETTLE
        time.sleep(0.02)
    return ended


def _verdict(workers: Sequence[_Worker], ended: dict[int, int], stopped: int | None, run: Run) -> int:
    """Say who failed and how, where no rank has said so itself; what to exit with."""
    codes, words = set(ended.values()), {worker.rank: list(worker.last_words) for worker in workers}
    failed = [rank for rank, code in ended.items() if code not in IN_ORDER | {LOST, NAMED, NOTHING_LOST}]
    if stopped is not None and any(ended[rank] in (-signal.SIGTERM, -signal.SIGINT) for rank in failed):
        failed, codes = [], {NOTHING_LOST}  # it had not begun
    if NOTHING_LOST in codes and not failed:
        say("interrupted; nothing is lost. Go on with the same command and --resume")
        return exit_code(stopped or signal.SIGTERM)
    if {ended[rank] for rank in failed} == {ended.get(0)} <= {1, 2, 3}:
        failed = [0]  # all came to the same, and it has said so
    if failed:
        culprit = workers[failed[0]]
        code = ended[culprit.rank]
        if culprit.rank or code not in (1, 2, 3):  # rank 0 has said it already
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
            said = [line.removeprefix("error: ") for line in words[culprit.rank]]
            say(f"error: {culprit.called} {how}{'; what it said last:' if said else ''}")
            for line in said:
                say(f"  rank {culprit.rank}: {line}")
            if code == -signal.SIGABRT and len(ended) < len(workers):  # NCCL ends so who waited too long for another
                say(f"error: {_silent(workers, ended)} had not ended by then")
            say(f"error: {what_is_kept(run)}")
        return code if code in (1, 2, 3) else exit_code(signal.SIGTERM) if code == -signal.SIGTERM else 3
    if NAMED in codes:
        witness = next(rank for rank, code in ended.items() if code == NAMED)
        if witness:
            say("\n".join(words[witness][-1:]))
        say(f"error: {what_is_kept(run)}")
        return 3
    if LOST in codes:
        silent = _silent(workers, ended)
        say(f"error: {silent or 'the ranks'} did not answer {'the others' if silent else 'each other'}; "
            f"{what_is_kept(run)}")
        return 3
    code = ended.get(0) or max(codes, default=0)
    if stopped is not None and (code or len(ended) < len(workers)):
        return exit_code(stopped)  # to them a Ctrl-C came as SIGTERM
    return code


def _silent(workers: Sequence[_Worker], ended: dict[int, int]) -> str:
    return " and ".join(worker.called for worker in workers if worker.rank not in ended)


def what_is_kept(run: Run) -> str:
    """From where a run whose ranks were ended goes on."""
    from tryplicity.training.checkpoint import steps

    saved = steps(run.checkpoints)
    kept = f"the checkpoint of step {saved[-1]} is kept: go on from there" if saved else (
        "there is no checkpoint yet: begin again")
    return f"all ranks were ended; {kept} with the same command and --resume"
