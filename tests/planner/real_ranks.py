"""The memory that a training step takes on one of several real ranks, as the C library's allocator has it."""

import ctypes

import torch
from planning_tools import make_spec
from torch.utils._python_dispatch import TorchDispatchMode

from tryplicity import load_plugins
from tryplicity.data.packing import Batch
from tryplicity.model import assemble
from tryplicity.training.step import decay_groups, training_step


class _Mallinfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")]


_mallinfo2 = ctypes.CDLL(None).mallinfo2
_mallinfo2.restype = _Mallinfo2


def allocated() -> int:
    """Bytes that malloc gave and did not get back."""
    now = _mallinfo2()
    return now.uordblks + now.hblkhd


class Highest(TorchDispatchMode):
    """The most that was allocated after any operation."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(not issubclass(kind, torch.Tensor) or kind.__name__ == "DTensor" for kind in types):
            return NotImplemented
        out = func(*args, **(kwargs or {}))
        self.bytes = max(self.bytes, allocated())
        return out


def peak(world, text, settings, hardware, strategy_name):
    """Bytes of weights, state, buffers and the buckets of copies, and the most that a step takes beside them, in the
    thriftiest of ten."""
    registry = load_plugins().registry
    spec = make_spec(registry, text, *settings)
    strategy = registry.part("parallelism", strategy_name).build()
    model = strategy.place(assemble(spec), world, 0, hardware.precision).train()
    model.activation_checkpointing = hardware.activation_checkpointing
    optimizer = spec.training.optimizer.build().build(*decay_groups(model))
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]

    def step():
        rows = hardware.batch * hardware.accumulation
        ids = torch.randint(0, spec.vocab_size, (rows, spec.context_length))
        batch = Batch(ids, ids.roll(-1, 1), torch.zeros_like(ids), ())
        training_step(model, optimizer, strategy, batch, step=1, micro_batch=hardware.batch, precision="fp32",
                      max_norm=1.0, learning_rate_factor=1.0, world=world)

    step()
    step()
    held = [*model.parameters(), *model.buffers()]
    held += [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    held = [t.to_local() if hasattr(t, "to_local") else t for t in held]
    static = sum(t.numel() * t.element_size() for t in held)
    if strategy_name == "ddp":  # whose buckets, as large as all weights, are no tensors that anyone could ask for
        static += sum(4 * p.numel() for p in model.parameters())
    taken = []
    for _ in range(10):  # gloo's thread at times lets go of what was sent a moment late
        before = allocated()
        with Highest() as highest:
            step()
        taken.append(highest.bytes - before)
    return static + min(taken)
