"""A strategy as a stranger writes it, from what the base class says: a copy on every rank, gradients summed."""

from contextlib import contextmanager

from torch import distributed

from tryplicity import MemoryPlan, Parallelism, hookimpl, initialise


class AllReduce(Parallelism):
    """Every rank holds everything; each gradient is summed over all when the step's last backward pass is done."""

    name = "all_reduce"

    def __init__(self, config):
        pass

    def memory(self, facts, hardware):
        return MemoryPlan({"everything": (8 + facts.optimizer_state_bytes) * facts.parameters}, "optimizer step")

    def place(self, model, world, seed, precision="fp32"):
        return initialise(model, world.device, seed)

    @contextmanager
    def micro_batch(self, model, last):
        yield
        if last:
            for parameter in model.parameters():
                distributed.all_reduce(parameter.grad)


@hookimpl
def tryplicity_parallelism():
    return [AllReduce]
