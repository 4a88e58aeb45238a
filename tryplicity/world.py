"""The processes that train one model together, each with a device of its own, and what they must agree on.

Launchers (torchrun, a scheduler, `tryplicity train` itself) say in the environment who is who: RANK, WORLD_SIZE,
LOCAL_RANK, MASTER_ADDR and MASTER_PORT, as pytorch.org/docs/stable/elastic/run.html describes. Nothing of
torch.distributed is touched in a world of one that does not ask for it.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from tryplicity.errors import PluginFault, Refused, UserError

BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
#: what ranks do together may take so long, since one may compile for minutes after another has; a rank that is dead or
#: silent is noticed earlier, by `training.peers`
PATIENCE = timedelta(minutes=10)


@dataclass(frozen=True)
class World:
    """rank: this process's number among `size`. device: its own. local_size: how many of them share this machine."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    local_size: int = 1

    @property
    def first_rank(self) -> bool:
        """Whether this is the rank that speaks, writes and decides."""
        return self.rank == 0

    def total(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Each tensor summed over the ranks, which give the same shapes in the same order."""
        if self.size == 1 or not tensors:
            return list(tensors)
        from torch import distributed

        # fp64 holds a count and a sum of fp32 numbers alike; one message for all of them
        flat = torch.cat([tensor.detach().reshape(-1).double() for tensor in tensors])
        distributed.all_reduce(flat)
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.view(tensor.shape).to(tensor.dtype) for part, tensor in zip(parts, tensors, strict=True)]

    def any(self, flag: bool) -> bool:
        """True on every rank where it is true on one."""
        if self.size == 1:
            return flag
        return bool(self.total([torch.tensor(float(flag), device=self.device)])[0] > 0)

    def first(self, value: Any) -> Any:
        """Rank 0's value, which can be pickled, on every rank."""
        if self.size == 1:
            return value
        from torch import distributed

        held = [value if self.first_rank else None]
        distributed.broadcast_object_list(held, src=0, device=self.device)
        return held[0]

    def gathered(self, value: Any) -> list[Any]:
        """Every rank's value, which can be pickled, on every rank, by rank."""
        if self.size == 1:
            return [value]
        from torch import distributed

        held: list[Any] = [None] * self.size
        distributed.all_gather_object(held, value)
        return held

    def decided(self, action: Callable[[], Any]) -> Any:
        """What rank 0 gets by an action that it alone does; the error that this ends in is raised on every rank."""
        if self.size == 1:
            return action()
        value, error = None, None
        if self.first_rank:
            try:
                value = action()
            except (UserError, Refused, PluginFault) as raised:
                error = raised
        value, error = self.first((value, error))
        if error is not None:
            raise error
        return value

    def group(self) -> None:
        """Have a process group there in a world of one too: what shards needs one, be it of this process alone."""
        from torch import distributed

        if not distributed.is_initialized():
            distributed.init_process_group(BACKENDS[self.device.type], store=distributed.HashStore(), rank=0,
                                           world_size=1)
            atexit.register(distributed.destroy_process_group)

    def part(self, rows: int) -> slice:
        """Which of so many rows are this rank's: a stretch of them; the ranks' sizes differ by one at most."""
        return slice(rows * self.rank // self.size, rows * (self.rank + 1) // self.size)

    def most(self, rows: int) -> int:
        """The size of the largest part of so many rows."""
        return -(-rows // self.size)


def is_worker() -> bool:
    """Whether a launcher started this process as one of several (or the only one of its own)."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


@contextmanager
def joined(kind: str) -> Iterator[World]:
    """This process's world, as long as the training lasts; a world of one where no launcher started it.

    kind: of the devices, "cpu" or "cuda".
    """
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cpu") if kind == "cpu" else torch.device(kind, local)
    if kind != "cpu":
        torch.cuda.set_device(device)
    if not is_worker() or int(os.environ["WORLD_SIZE"]) == 1:
        yield World(device=device)
        return
    from torch import distributed

    distributed.init_process_group(BACKENDS[kind], timeout=PATIENCE)
    try:
        size = distributed.get_world_size()
        yield World(distributed.get_rank(), size, device, int(os.environ.get("LOCAL_WORLD_SIZE", size)))
    finally:
        distributed.destroy_process_group()
