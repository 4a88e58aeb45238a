"""Gradients that live in the buckets of torch's DistributedDataParallel from the first micro-batch on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.nn.parallel import DistributedDataParallel


class Buckets:
    """Passes that are not sent would make gradients beside the buckets, 4 more bytes a parameter, since a step begins
    without any: so each is given its place in them. Sums, not means, are what comes back.
    """

    def __init__(self, model: DistributedDataParallel) -> None:
        self.model = model
        self.passes, self.sending = 0, False  # backward passes that ended in the buckets; whether this one is sent
        self.places: list[tuple[nn.Parameter, Tensor]] = []
        model.register_comm_hook(self, _summed)

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """As a strategy's own."""
        for parameter, place in self.places if not last else ():
            if parameter.grad is None:
                parameter.grad = place.zero_()
        self.sending = last
        # the very first pass ends in the buckets too, unsent: by its order torch makes them anew, once
        bucketed = last or self.passes == 0
        with nullcontext() if bucketed else self.model.no_sync():
            yield
        self.passes += bucketed
        if last and self.passes > 1:
            self.places = [(p, p.grad) for p in self.model.parameters() if p.grad is not None]


def _summed(buckets, bucket):
    """Where DistributedDataParallel would take the mean of gradients."""
    from torch import distributed, futures

    if not buckets.sending:
        unsent = futures.Future()
        unsent.set_result(bucket.buffer())
        return unsent
    sent = distributed.all_reduce(bucket.buffer(), async_op=True).get_future()
    return sent.then(lambda done: done.value()[0])
