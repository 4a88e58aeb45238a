"""A run's model packed into one file: the other half of `packed`, which says what the file holds."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tryplicity.components import Linear
from tryplicity.data.tokenizer import load_tokenizer
from tryplicity.data.vocabulary import config_text
from tryplicity.errors import Refused, UserError
from tryplicity.files import may_be_written, whole_file
from tryplicity.inference.packed import (
    FORMAT,
    MappedWeights,
    ask_for,
    can_pack,
    for_inference,
    formats,
    linears_of,
    packed_by,
    rows_of_table,
    run_and_weights,
)
from tryplicity.model import Table
from tryplicity.progress import CountProgress
from tryplicity.spec import load_spec
from tryplicity.training.saved import SavedTensors

#: safetensors' names, the widest first: tensors in this order are aligned to their own width
_NAMES = {torch.int64: "I64", torch.float32: "F32", torch.int32: "I32", torch.bfloat16: "BF16", torch.float16: "F16",
          torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"}


@dataclass
class Sizes:
    """Bytes of an exported file."""

    path: Path
    packed_as: str = ""  # "ternary"
    packed_weights: int = 0
    packed_bytes: int = 0
    rest_bytes: int = 0
    file_bytes: int = 0
    rest: dict[str, int] = field(default_factory=dict)  # bytes by dtype

    @property
    def ratio(self) -> float:
        """How much smaller than fp16 the packed weights are."""
        return 2 * self.packed_weights / max(self.packed_bytes, 1)


def export(what: str | Path, registry, out: Path | None = None, rest: str = "bf16", *, linear: str | None = None,
           initialised: bool = False, tokenizer: Path | None = None, seed: int = 0,
           progress: CountProgress | None = None) -> Sizes:
    """Pack a run, or one of its checkpoints, into one file.

    rest: the form of what is not packed: bf16; int8 (tables of the vocabulary, a scale for each row; the rest in bf16);
    fp32. Vectors stay fp32. linear: a form ("int8", "bf16") in which linears are packed that else are not, and are kept
    by who loads the file. initialised: `what` is a spec, whose initial weights are packed module by module, never all
    in memory at once. Raises UserError where `what` is not that or `out` cannot be written, Refused where nothing
    of it can be packed.
    """
    if initialised:
        spec = load_spec(str(what), registry)
        words = tokenizer and load_tokenizer(tokenizer, spec.vocab_size)
        sources = [Path(what), *([tokenizer] if tokenizer else [])]
    else:
        run, weights = run_and_weights(Path(what))
        spec = load_spec(str(run.spec), registry)
        words = load_tokenizer(run.tokenizer, spec.vocab_size)
        sources = [weights.path, *(path for path in run.folder.rglob("*")
                                           if path.is_file() and not is_exported(path))]
    if out is not None and out.is_dir():
        raise UserError(f"{out}: this is a folder; give the file to write")
    model = for_inference(spec)
    if linear and not ask_for(model, linear):
        forms = sorted({form for module in linears_of(model) for form in module.forms})
        raise Refused(f"{spec.name}: no linear of this spec packs as {linear}; " +
                      (f"they can as {' or '.join(forms)}" if forms else "leave --linear out"))
    packing = {path: module for path, module in model.named_modules() if can_pack(module)}
    if not packing:
        able = [name for name in registry.names("linear")
                if registry.get("linear", name).packed_like is not Linear.packed_like
                and not registry.get("linear", name).forms]
        forms = sorted({form for module in linears_of(model) for form in module.forms})
        asked = f" give --linear {' or '.join(forms)};" if forms else ""
        raise Refused(f"{spec.name}: no linear of this spec can be packed unasked;{asked} or use "
                      f"`linear: {{type: {' or '.join(able)}}}`, or serve the run folder itself")
    packed_as = formats(packing.values())
    if out is None:
        ending = f"-{packed_as.replace(' ', '-')}.safetensors"
        out = Path(spec.name + ending) if initialised else run.folder / f"model{ending}"
    may_be_written(out, "an exported model", is_exported, sources)
    weights_of = _initial(seed) if initialised else _of_run(weights)
    total = sum(tensor.numel() for tensor in model.state_dict().values())
    done, sizes = 0, Sizes(out, packed_as)
    with _told_as(out), whole_file(out) as temporary, open(temporary, "wb") as file:
        told = {"tokenizer": words.to_str(), "tokenizer_config": config_text(words)} if words else {"tokenizer": ""}
        told |= {"linear": linear} if linear else {}
        writer = _Writer(file, {"format": FORMAT, "spec": spec.as_yaml(), **told},
                         2 * len(model.state_dict()) + sum(len(m.packed_like()) for m in packing.values()))
        loose: list[tuple[str, Tensor]] = []
        kept: dict[str, tuple[str, ...]] = {}  # of what is packed: its tensors
        for path, module in model.named_modules():
            own = dict(module.named_parameters(recurse=False)) | {
                name: b for name, b in module.named_buffers(recurse=False)
                if name not in module._non_persistent_buffers_set}
            if path in packing:
                kept[path] = tuple(own)
                own.pop("weight")
            if own:
                for name, tensor in weights_of(path, module, list(own)).items():
                    full = f"{path}.{name}" if path else name
                    loose += _rest(full, tensor, module, rest)
                    if loose[-1][1].dtype not in _NAMES:
                        raise Refused(f"{spec.name}: {full} is {tensor.dtype}, which an exported file cannot hold")
                    done += tensor.numel()
        for dtype in _NAMES:
            for name, tensor in loose:
                if tensor.dtype == dtype:
                    writer.add(name, tensor)
                    sizes.rest_bytes += tensor.nbytes
                    sizes.rest[_NAMES[dtype]] = sizes.rest.get(_NAMES[dtype], 0) + tensor.nbytes
            for path, module in packing.items():  # room for what is packed, which is written as it is made
                for name, like in module.packed_like().items():
                    if like.dtype == dtype:
                        writer.reserve(f"{path}.{name}", dtype, like.shape)
        del loose
        for path, module in packing.items():
            for name, tensor in weights_of(path, module, list(kept[path])).items():  # packing may depend on all of them
                held = module._parameters if name in module._parameters else module._buffers
                tensor = tensor.float() if tensor.is_floating_point() else tensor
                held[name] = nn.Parameter(tensor, requires_grad=False) if held is module._parameters else tensor
            if not module.ready_to_pack():
                raise UserError(f"{path} (linear {module.name}): its rounding has not faded in yet; train it to the "
                                "end of its fade_steps, or serve the run folder, as it is")
            numbers = module.weight.numel()
            for name, tensor in packed_by(path, module).items():
                writer.fill(f"{path}.{name}", tensor)
                sizes.packed_bytes += tensor.nbytes
            module.weight = None
            sizes.packed_weights += numbers
            done += numbers
            if progress:
                progress(done, total)
        writer.finish()
        sizes.file_bytes = file.seek(0, 2)
    return sizes


def is_exported(path: Path) -> bool:
    """Whether `export` wrote this file."""
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (SafetensorError, OSError):
        return False


@contextmanager
def _told_as(out: Path) -> Iterator[None]:
    """An error of the system names the file that the user knows."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror or error})") from None


def _of_run(weights: MappedWeights | SavedTensors) -> Callable[[str, nn.Module, list[str]], dict[str, Tensor]]:
    def get(path: str, module: nn.Module, names: list[str]) -> dict[str, Tensor]:
        full = {name: f"{path}.{name}" if path else name for name in names}
        missing = [name for name in full.values() if name not in weights.names]
        if missing:
            raise UserError(f"{weights.path}: these weights belong to another spec: {missing[0]} is missing")
        return {name: weights[found] for name, found in full.items()}

    return get


def _initial(seed: int) -> Callable[[str, nn.Module, list[str]], dict[str, Tensor]]:
    """The initial weights of one module at a time; each module's own numbers, whatever the order."""
    def get(path: str, module: nn.Module, names: list[str]) -> dict[str, Tensor]:
        single = copy.copy(module)
        single._modules = {}
        single._parameters = {name: p if p is None else nn.Parameter(_room(p), requires_grad=False)
                              for name, p in module._parameters.items()}
        single._buffers = {name: b if b is None else _room(b) for name, b in module._buffers.items()}
        torch.manual_seed(int.from_bytes(hashlib.sha256(f"{seed} {path}".encode()).digest()[:8], "big") >> 1)
        single.reset_parameters()
        return {name: (single._parameters.get(name) if name in single._parameters else single._buffers[name]).detach()
                for name in names}

    return get


def _room(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="cpu")


def _rest(name: str, tensor: Tensor, module: nn.Module, rest: str) -> Iterator[tuple[str, Tensor]]:
    """How a tensor that is not packed is stored."""
    if not tensor.is_floating_point() or tensor.ndim < 2 or rest == "fp32":
        yield name, tensor.float() if tensor.is_floating_point() else tensor
    elif rest == "int8" and isinstance(module, Table):
        rows_VD, scale_V = rows_of_table(tensor, rest)
        yield name, rows_VD
        yield f"{name.removesuffix('weight')}scale_V", scale_V
    else:
        yield name, tensor.to(torch.bfloat16)


class _Writer:
    """A safetensors file written as its tensors come; the header, for which room is left, last.

    The format: 8 bytes with the length of a JSON header (which spaces may fill up), the header with each tensor's
    dtype, shape and offsets, then the bytes of all tensors without gaps (huggingface.co/docs/safetensors).
    """

    def __init__(self, file, metadata: Mapping[str, str], tensors: int) -> None:
        self.file, self.header = file, {"__metadata__": dict(metadata)}
        self.room = (len(json.dumps(self.header).encode()) + 300 * tensors + 4096) // 8 * 8
        self.offset = 0
        file.seek(8 + self.room)

    def reserve(self, name: str, dtype: torch.dtype, shape: Iterable[int]) -> None:
        size = torch.Size(shape).numel() * dtype.itemsize
        self.header[name] = {"dtype": _NAMES[dtype], "shape": list(shape),
                             "data_offsets": [self.offset, self.offset + size]}
        self.offset += size
        self.file.seek(size, 1)

    def fill(self, name: str, tensor: Tensor) -> None:
        end = self.file.tell()
        assert self.header[name]["shape"] == list(tensor.shape), name
        self.file.seek(8 + self.room + self.header[name]["data_offsets"][0])
        self.file.write(_raw(tensor))
        self.file.seek(end)

    def add(self, name: str, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        self.header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape),
                             "data_offsets": [self.offset, self.offset + size]}
        self.offset += size
        self.file.write(_raw(tensor))

    def finish(self) -> None:
        text = json.dumps(self.header, separators=(",", ":")).encode()
        assert len(text) <= self.room, "the header outgrew its room"
        self.file.seek(0)
        self.file.write(self.room.to_bytes(8, "little"))
        self.file.write(text.ljust(self.room))
        self.file.flush()


def _raw(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().contiguous().flatten().view(torch.uint8).numpy())
