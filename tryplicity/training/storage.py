"""Where torch.distributed.checkpoint writes to and reads from: the files of `saved`, each rank its own.

Which rank saves which piece of which tensor, and what of it another world loads, is planned by
torch.distributed.checkpoint (pytorch.org/docs/stable/distributed.checkpoint.html); names are "model.NAME" and
"optimizer.PARAMETER.NAME".
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from tryplicity.errors import Refused
from tryplicity.training.saved import DTYPES, SavedTensors
from tryplicity.world import World

SECTIONS = ("model", "optimizer")


@dataclass(frozen=True)
class Staged:
    """A rank's share of a checkpoint, copied to CPU memory: training may go on while it is written."""

    files: dict[str, dict[str, Tensor]]  # file -> key -> tensor
    index: dict[str, Any]  # of all ranks' files; on rank 0


def stage(tensors: Mapping[str, Tensor], world: World, buffers: Buffers) -> Staged:
    """Copy what this rank is to save; called on all ranks, each with all names."""
    writer = _Writer(world, buffers)
    with _plain_errors():
        dcp.save(dict(tensors), storage_writer=writer, no_dist=world.size == 1)
    buffers.wait()
    return Staged(writer.files, writer.index)


def fill(tensors: Mapping[str, Tensor], saved: Mapping[str, SavedTensors], world: World) -> None:
    """Read into these tensors, of which each rank takes what it holds; called on all ranks."""
    with _plain_errors():
        dcp.load(dict(tensors), storage_reader=_Reader(saved), no_dist=world.size == 1)


class Buffers:
    """CPU memory to copy to. Of an accelerator's tensors it is page-locked, which the copy needs to be quick and which
    costs much to get: so it is kept from one checkpoint to the next."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, torch.Size], Tensor] = {}
        self._device: torch.device | None = None

    def copy(self, name: str, tensor: Tensor) -> Tensor:
        if tensor.device.type == "cpu":
            return tensor.clone(memory_format=torch.contiguous_format)
        place = (name, tensor.shape)
        if place not in self._kept or self._kept[place].dtype != tensor.dtype:
            self._kept[place] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        self._device = tensor.device
        return self._kept[place].copy_(tensor, non_blocking=tensor.is_cuda)

    def wait(self) -> None:
        """Until all copies are there."""
        if self._device is not None:
            torch.accelerator.synchronize(self._device)


@contextmanager
def _plain_errors() -> Iterator[None]:
    """torch wraps what a rank raised, a Ctrl-C too; and it warns of a world of one, which is what is meant."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        for kind in (KeyboardInterrupt, Refused):
            if found := [cause for cause in causes if isinstance(cause, kind)]:
                raise found[0] from None
        raise RuntimeError("; ".join(f"rank {rank}: {cause}" for rank, (cause, _) in error.failures.items())) from (
            causes[0] if causes else None)


def file_of(section: str, rank: int, size: int) -> str:
    return f"{section}.safetensors" if size == 1 else f"{section}-{rank + 1:05}-of-{size:05}.safetensors"


class _Writer(StorageWriter):
    """Copies what the plan gives this rank, and indexes what all are given."""

    def __init__(self, world: World, buffers: Buffers) -> None:
        self.world, self.buffers = world, buffers
        self.files: dict[str, dict[str, Tensor]] = {
            file_of(section, world.rank, world.size): {} for section in SECTIONS}
        self.index: dict[str, Any] = {section: {} for section in SECTIONS}

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results = []
        for item in plan.items:
            whole, chunk = item.tensor_data.size, item.tensor_data.chunk
            if whole.numel() and not chunk.sizes.numel():
                continue  # a rank of more than there are rows
            section, _, name = item.index.fqn.partition(".")
            tensor = planner.resolve_data(item)
            if tensor.dtype not in DTYPES:
                raise Refused(f"{name} is {tensor.dtype}, which a checkpoint cannot hold")
            key = name if chunk.sizes == whole else f"{name}@{','.join(map(str, chunk.offsets))}"
            file = file_of(section, self.world.rank, self.world.size)
            self.files[file][key] = self.buffers.copy(f"{section}.{key}", tensor.detach())
            piece = {"file": file, "key": key, "offsets": list(chunk.offsets), "shape": list(chunk.sizes)}
            results.append(WriteResult(item.index, tensor.nbytes, (section, name, DTYPES[tensor.dtype], list(whole),
                                                                   piece)))
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        for section, name, dtype, shape, piece in (result.storage_data for own in results for result in own):
            entry = self.index[section].setdefault(name, {"dtype": dtype, "shape": shape, "pieces": []})
            entry["pieces"].append(piece)
        self.index = {section: {name: {**entry, "pieces": sorted(entry["pieces"], key=lambda piece: piece["offsets"])}
                                for name, entry in sorted(entries.items())}
                      for section, entries in self.index.items()}

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return False


class _Reader(StorageReader):
    """Gives each rank the parts of saved tensors that it asks for."""

    def __init__(self, saved: Mapping[str, SavedTensors]) -> None:
        self.entries = {f"{section}.{name}": entry for section, tensors in saved.items()
                        for name, entry in tensors.entries.items()}

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return Metadata({name: TensorStorageMetadata(
            TensorProperties(dtype=entry.dtype), torch.Size(entry.shape),
            [ChunkStorageMetadata(torch.Size(piece.offsets), torch.Size(piece.shape)) for piece in entry.pieces])
            for name, entry in self.entries.items()})

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            index: MetadataIndex = item.storage_index
            tensor = next(piece for piece in self.entries[index.fqn].pieces
                          if index.offset is None or piece.offsets == tuple(index.offset)).read()
            for dimension, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                tensor = tensor.narrow(dimension, start, length)
            target = planner.resolve_tensor(item).detach()
            target.copy_(tensor)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return False
