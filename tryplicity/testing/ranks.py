"""Several ranks on one machine, each a process of its own that talks through gloo: how tests have them."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

#: loaded once, by the process that all ranks are forked from, before it has any thread
PRELOADED = ["torch.distributed.fsdp", "torch.distributed.tensor", "torch.nn.parallel", "torch.optim", "pydantic",
             "tryplicity.training.loop"]


def together(size: int, work: Callable[..., Any], *arguments: Any, limit: float = 120.0,
             environment: dict[str, str] | None = None) -> list[Any]:
    """What `work(world, *arguments)` gives on each of so many ranks, by rank, each on one thread.

    work: a function of a module. It, its arguments and what it gives can be pickled. limit: seconds after which all are
    ended. Raises AssertionError with what each rank has to say where one fails, dies or takes too long.
    """
    from torch.distributed import TCPStore

    # this process is the meeting place: nobody else can take the port
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    ranks = []
    with tempfile.TemporaryDirectory() as folder:
        for rank in range(size):
            ours, theirs = context.Pipe(duplex=False)
            said = os.path.join(folder, str(rank))
            shared = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size,
                      "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
            shared = {name: str(value) for name, value in shared.items()} | (environment or {})
            process = context.Process(target=_rank, args=(theirs, said, shared, limit, work, arguments), daemon=True)
            process.start()
            theirs.close()
            ranks.append((process, ours, said))
        try:
            return _answers(ranks, time.monotonic() + limit + 30)  # the ranks keep the limit, and start late
        finally:
            for process, _, _ in ranks:
                process.kill()
                process.join()


def _answers(ranks: list[tuple[Any, Connection, str]], end: float) -> list[Any]:
    """Each rank's answer; as soon as one has failed, what every one of them has to say."""
    answers, faults = {}, {}

    def hear(rank: int) -> None:
        process, ours, _ = ranks[rank]
        try:
            good, answer = pickle.loads(ours.recv_bytes())
        except EOFError:
            process.join()
            good, answer = False, f"ended with exit code {process.exitcode}"
        (answers if good else faults)[rank] = answer

    while len(answers) < len(ranks) and not faults:
        silent = {ours: rank for rank, (_, ours, _) in enumerate(ranks) if rank not in answers}
        ready = wait(list(silent), timeout=max(0.0, end - time.monotonic()))
        for ours in ready:
            hear(silent[ours])
        if not ready:
            faults |= dict.fromkeys(silent.values(), "took too long")
    if faults:
        for rank, (_, ours, _) in enumerate(ranks):
            if rank not in faults and rank not in answers and ours.poll(1):  # an error that another rank's led to
                hear(rank)
        raise AssertionError("\n".join(f"rank {rank}: {fault}\n{_read(ranks[rank][2])}"
                                       for rank, fault in sorted(faults.items())))
    return [answers[rank] for rank in range(len(ranks))]


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()[-4000:]
    except OSError:
        return ""


def _rank(answer: Connection, said: str, environment: dict[str, str], limit: float, work: Callable[..., Any],
          arguments: tuple[Any, ...]) -> None:
    os.environ.update(environment | {"TRYPLICITY_THREADS": "1"})
    with open(said, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 2)  # what it says belongs to its fault
        faulthandler.dump_traceback_later(limit, exit=True, file=file)
        import torch

        from tryplicity.world import joined

        torch.set_num_threads(1)
        try:
            with joined("cpu") as world:
                found = work(world, *arguments)
        except BaseException:
            answer.send_bytes(pickle.dumps((False, traceback.format_exc())))
        else:
            answer.send_bytes(pickle.dumps((True, found)))
        faulthandler.cancel_dump_traceback_later()
