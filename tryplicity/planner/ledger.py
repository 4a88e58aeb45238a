"""Who holds how much memory while a training step runs on fake tensors.

A fake tensor (torch's FakeTensorMode) has a storage of the right size and no bytes in it. The ledger stands between
the step and the fake mode: it sees every storage come, grow, shrink and go, remembers the moment at which most was
held, and then says of what. It answers most operations itself, from what the fake mode answered before.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tryplicity.planner.measure import BLOCK
from tryplicity.planner.operations import kind_of

#: namespaces of operators between devices
_BETWEEN_DEVICES = ("c10d", "_c10d_functional", "fsdp", "symm_mem")
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Place:
    """Where in a step something happens."""

    phase: str
    """forward, backward, optimizer step, or between these."""
    stage: str
    """The embedding, a layer or the losses; empty outside of the model."""
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.phase} of {self.stage}" if self.phase in ("forward", "backward") else self.phase


class Ledger(TorchDispatchMode):
    """Enter it inside a FakeTensorMode.

    truth: what a host is told that asks for a truth value, such as whether a loss is finite.
    """

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self.truth = False
        self.phase, self.stage, self.micro_batch = "before", "", 0
        self.live = self.peak = 0
        self.peak_at = Place("before", "", 0)
        self.counting = True
        self._shortcuts = _Shortcuts(fake)
        self._sizes: dict[int, int] = {}  # by serial number
        self._born: dict[int, Place] = {}
        self._kinds: dict[int, str] = {}
        self._at_peak: dict[int, int] | None = {}
        self._serial = 0

    # --- what holds memory ---

    def here(self) -> Place:
        backward = torch._C._current_graph_task_id() != -1
        return Place("backward" if backward else self.phase, self.stage, self.micro_batch)

    def start(self) -> None:
        """Forget the peak so far."""
        self.peak, self._at_peak, self.peak_at = self.live, None, self.here()

    def label(self, kind: str, tensors: Iterable[Tensor], *, strong: bool = True) -> None:
        """These are weights, say. strong: whatever was said of them before."""
        for tensor in tensors:
            serial = getattr(_local(tensor).untyped_storage(), "serial", None)
            if serial is not None and (strong or serial not in self._kinds):
                self._kinds[serial] = kind

    def parts(self) -> dict[str, int]:
        """The bytes held at the peak, by kind. What nobody labelled is `workspace` of the stage at work, `activations`
        kept by others, and, where it is no stage's, `buffers` (the batch, the results)."""
        at, found = self.peak_at, {}
        held = self._sizes if self._at_peak is None else self._at_peak
        for serial, size in held.items():
            kind = self._kinds.get(serial) or self._kind_by_birth(self._born[serial], at)
            found[kind] = found.get(kind, 0) + size
        return found

    @staticmethod
    def _kind_by_birth(born: Place, at: Place) -> str:
        if born.micro_batch != at.micro_batch or born.phase not in ("forward", "backward"):
            return "optimizer" if born.phase == "optimizer step" else "buffers"
        return "activations" if born.phase == "forward" and born.stage != at.stage else "workspace"

    def _hold(self, storage: Any) -> None:
        serial = self._serial = self._serial + 1
        storage.serial = serial
        self._sizes[serial], self._born[serial] = 0, self.here()
        weakref.finalize(storage, self._resize, serial, None)
        self._resize(serial, storage.nbytes())

    def _resize(self, serial: int, size: int | None) -> None:
        """A storage has this many bytes from now on; None: it is gone."""
        old = self._sizes[serial]
        more = -old if size is None else -(-size // BLOCK) * BLOCK - old
        if more < 0 and self._at_peak is None and self.live == self.peak:
            self._at_peak = dict(self._sizes)  # the peak is over: what made it up
        self.live += more
        self._sizes[serial] = old + more
        if size is None:
            del self._sizes[serial]
        if self.live > self.peak:
            self.peak, self._at_peak, self.peak_at = self.live, None, self.here()

    @contextmanager
    def watching_resizes(self) -> Iterator[None]:
        """Storages that are emptied and filled again in place, which no operation tells of."""
        original = torch.UntypedStorage.resize_

        def resize_(storage: Any, size: int) -> Any:
            result = original(storage, size)
            if (serial := getattr(storage, "serial", None)) in self._sizes:
                self._resize(serial, storage.nbytes())
            return result

        torch.UntypedStorage.resize_ = resize_
        try:
            yield
        finally:
            torch.UntypedStorage.resize_ = original

    @contextmanager
    def looking_away(self) -> Iterator[None]:
        """What is computed inside is about shapes, and would be in no real step."""
        before, self.counting = self.counting, False
        try:
            yield
        finally:
            self.counting = before

    # --- operations ---

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:
            return getattr(args[0], "fake_device", _CPU)
        if any(not issubclass(kind, FakeTensor) and kind not in (Tensor, torch.nn.Parameter) for kind in types):
            return NotImplemented  # a tensor made of others: its own operations come by one by one
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and getattr(args[0], "constant", None) is None:
            if args[0].dtype == torch.bool:
                return self.truth
            if args[0].is_floating_point() and self.here().phase not in ("forward", "backward"):
                return 1.0  # a sum that goes into a report: no shape hangs on it
        out = self._shortcuts(func, args, kwargs)
        if self.counting:
            for tensor in (out,) if isinstance(out, Tensor) else tree_leaves(out):
                if isinstance(tensor, FakeTensor) and tensor.fake_device.type != "meta":
                    storage = tensor.untyped_storage()
                    if not hasattr(storage, "serial"):
                        self._hold(storage)
            if func.namespace in _BETWEEN_DEVICES:
                gathers = any(word in func.__name__ for word in ("all_gather", "allgather", "split_with_sizes"))
                self.label("gathered" if gathers else "buckets",
                           [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, FakeTensor)], strong=False)
        return out


def _local(tensor: Tensor) -> Tensor:
    """What this device has of a tensor that is spread over several."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


class _Shortcuts:
    """Runs operations on fake tensors: most of a model's come by again and again with the same shapes, and looking the
    answer up here takes a fifth of the time that the fake mode takes."""

    def __init__(self, fake: FakeTensorMode) -> None:
        self.fake = fake
        self._seen: dict[Any, Any] = {}

    def __call__(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        kind = kind_of(func)
        key = None
        if kind.how in ("new", "view", "writes"):
            try:
                key = (func, _key(args), _key(tuple(kwargs.items())) if kwargs else None)
                hash(key)
            except (_Unknown, TypeError):
                key = None
        if key is None:
            return func(*args, **kwargs)
        found = self._seen.get(key)
        if found is None:
            result = func(*args, **kwargs)
            self._seen[key] = self._remember(kind.how, result)
            return result
        if found is NotImplemented:
            return func(*args, **kwargs)
        if kind.how == "writes":
            back = [kwargs[place] if isinstance(place, str) else args[place] for place in kind.returns]
            return back[0] if len(back) == 1 else tuple(back) or None
        if kind.how == "view":
            with in_kernel_invocation_manager(self.fake):
                result = func(*args, **kwargs)
            device = found
            if isinstance(result, Tensor):
                return FakeTensor(self.fake, result, device)
            return [FakeTensor(self.fake, one, device) for one in result]
        with no_dispatch():
            return self._fresh(found)

    def _fresh(self, found: Any) -> Any:
        if found.__class__ is _Like:
            return FakeTensor(self.fake, torch.empty_strided(found.shape, found.stride, dtype=found.dtype,
                                                             device="meta"), found.device)
        return found.__class__(map(self._fresh, found))

    def _remember(self, how: str, result: Any) -> Any:
        if how == "writes":
            return True
        tensors = [result] if isinstance(result, Tensor) else list(result) if isinstance(result, list | tuple) else []
        if not tensors or any(type(t) is not FakeTensor or t.constant is not None for t in tensors):
            return NotImplemented
        if how == "view":
            return tensors[0].fake_device if type(result) in (FakeTensor, list) else NotImplemented
        likes = [_Like(t.shape, t.stride(), t.dtype, t.fake_device) for t in tensors]
        whole = all(t.storage_offset() == 0 and t.layout is torch.strided and not t.is_conj() and not t.is_neg()
                    and t.untyped_storage().nbytes() == _bytes(t) for t in tensors)
        distinct = len({t.untyped_storage()._cdata for t in tensors}) == len(tensors)
        if not whole or not distinct or type(result) not in (FakeTensor, list, tuple):
            return NotImplemented
        return likes[0] if isinstance(result, Tensor) else type(result)(likes)


@dataclass(frozen=True, slots=True)
class _Like:
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class _Unknown(Exception):
    """An argument of which not all is known that matters."""


def _bytes(t: Tensor) -> int:
    """Of the smallest storage that holds t."""
    if t.numel() == 0:
        return 0
    return (1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))) * t.element_size()


def _key(value: Any) -> Any:
    """What of an argument decides the result's sizes and dtype."""
    kind = value.__class__
    if kind is FakeTensor:
        if value.constant is not None or value.is_conj() or value.is_neg():
            raise _Unknown
        return value.shape, value.stride(), value.dtype, value.fake_device
    if kind is int:
        return value
    if isinstance(value, Tensor):
        raise _Unknown
    if kind is list or kind is tuple or isinstance(value, list | tuple):
        return tuple(map(_key, value))
    return kind, value  # 1, 1.0 and True are equal and give different dtypes
