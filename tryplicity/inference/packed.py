"""Models for inference: from a run, or from one exported file with its spec and tokenizer inside.

The file is a safetensors file. A linear that can pack itself (`Linear.packed_like`) is stored as what it packs to,
some only in a form that was asked for (`Linear.forms`), tables of the vocabulary in the form asked for, everything else
in bf16 or fp32; loading maps the file, and a linear takes what it packed from there as it is (`Linear.adopt`), never
through floats.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tryplicity import kernels
from tryplicity.components import Linear
from tryplicity.data.tokenizer import SPECIAL_TOKENS, load_tokenizer
from tryplicity.data.vocabulary import OURS, attach, config_text, size_of, vocabulary_of
from tryplicity.errors import PluginFault, Refused, UserError
from tryplicity.files import may_be_written, whole_file
from tryplicity.inference.text import token_bytes
from tryplicity.model import Model, Table, assemble
from tryplicity.planner.count import count
from tryplicity.progress import CountProgress
from tryplicity.run import Run
from tryplicity.spec import Spec, load_spec
from tryplicity.spec.loader import parse_yaml
from tryplicity.training import checkpoint
from tryplicity.training.saved import SavedTensors, saved_weights

FORMAT = "tryplicity-1"  # of the exported file; another number for another meaning of its tensors
RESTS = ("bf16", "int8", "fp32")
#: safetensors' names, the widest first: tensors in this order are aligned to their own width
_NAMES = {torch.int64: "I64", torch.float32: "F32", torch.int32: "I32", torch.bfloat16: "BF16", torch.float16: "F16",
          torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"}



@dataclass(frozen=True)
class Info:
    """What a loaded model is."""

    name: str
    format: str  # "fp32", "bf16", "ternary, tables in bf16", ...: what linears say that they pack to, and the tables
    path: Path
    parameters: int
    active_parameters: int
    packed_bytes: int  # of the weights as they lie in memory or in the mapped file
    packed_bytes_per_token: int
    context_length: int
    chat: bool  # whether it has learned conversations
    layers: tuple[str, ...]  # of each layer: its mixer and feed-forward
    weights_hash: str  # SHA-256 of the file they came from


# --- what both ways share ---

def _for_inference(spec: Spec) -> Model:
    """On the meta device, without what only training needs."""
    model = assemble(spec)
    model.objectives = nn.ModuleDict()
    for block in model.layers:
        block.objectives = nn.ModuleDict()
    return model.eval().requires_grad_(False)


def _packs(module: nn.Module) -> bool:
    return isinstance(module, Linear) and bool(module.packed_like())


def _pack(path: str, linear: Linear) -> dict[str, Tensor]:
    """What it packs to. Raises PluginFault where that is not what it said before."""
    packed, told = linear.pack(), linear.packed_like()
    said, found = ({name: (list(t.shape), t.dtype) for name, t in (own or {}).items()} for own in (told, packed))
    if found != said:
        raise PluginFault(f"{path} (linear {linear.name}, {inspect.getsourcefile(type(linear))}): pack gave {found}, "
                          f"and packed_like says {said}; they must be alike")
    return packed


def _ask_for(model: Model, form: str | None) -> bool:
    """Have the linears that can pack so. Whether there are any."""
    able = [module for module in _linears(model) if form in module.forms]
    for module in able:
        module.form = form
    return bool(able)


def _formats(linears: Iterable[Linear]) -> str:
    return " and ".join(sorted({linear.packed_format for linear in linears}))


def _info(model: Model, spec: Spec, path: Path) -> dict[str, Any]:
    """What is known before the weights are; counted on the meta model."""
    counts = count(model)
    layers = tuple(" + ".join(part for part in (layer.mixer, layer.feed_forward) if part) for layer in counts.layers)
    return {"name": spec.name, "path": path, "parameters": counts.total, "active_parameters": counts.active,
            "packed_bytes_per_token": counts.packed_bytes_per_token, "context_length": spec.context_length,
            "chat": any(phase.kind == "chat" for phase in spec.phases), "layers": layers}


# --- loading ---

class _Weights:
    """The tensors of a safetensors file by name, mapped and not read before they are used."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: cannot be read as safetensors: {error}") from None
        self.names = set(self._file.keys())
        self.metadata = self._file.metadata() or {}

    def __getitem__(self, name: str) -> Tensor:
        return self._file.get_tensor(name)

    def shape(self, name: str) -> list[int]:
        """Read from the file's head alone."""
        return list(self._file.get_slice(name).get_shape())


@dataclass(frozen=True)
class Opened:
    """A model's files, none of which are trusted: all is checked that can be before the weights are read."""

    path: Path
    spec: Spec
    tokenizer: Any  # None: the file has none
    weights: _Weights | SavedTensors
    model: Model  # on the meta device

    @property
    def card(self) -> dict[str, Any]:
        return _info(self.model, self.spec, self.path)


def open_model(what: str | Path, registry) -> Opened:
    """A run folder, a checkpoint in one, or an exported file. Raises UserError for one that is damaged, cut short, or
    does not fit together: its spec, its tokenizer, and the names and shapes of its weights."""
    path = Path(what)
    if path.is_file():
        weights = _Weights(path)
        if weights.metadata.get("format") != FORMAT:
            raise UserError(f"{path}: not a model that `tryplicity export` wrote; give a run folder or such a file")
        if not weights.metadata.get("spec", "").strip():
            raise UserError(f"{path}: there is no spec inside; export the run again")
        spec = load_spec(parse_yaml(weights.metadata["spec"], f"{path} (spec)"), registry)
        tokenizer = _tokenizer_inside(weights, spec)
    else:
        run, weights = _run_and_weights(path)
        spec = load_spec(str(run.spec), registry)
        tokenizer = load_tokenizer(run.tokenizer, spec.vocab_size)
        _check_tokenizer(tokenizer, spec, str(run.tokenizer))
    model = _for_inference(spec)
    _ask_for(model, weights.metadata.get("linear") if isinstance(weights, _Weights) else None)
    _check_shapes(model, weights)
    return Opened(path, spec, tokenizer, weights, model)


def load_model(what: str | Path | Opened, registry, device: str = "cpu", *, ternary: bool = True,
               dtype: torch.dtype | None = None, weights: str | None = None) -> tuple[Model, Spec, Any, Info]:
    """(model, spec, tokenizer, info) of a run folder or an exported file; the tokenizer is None for a file without one.

    ternary: pack the linears of a run that can be packed. dtype: of the floats in between; fp32 by default. weights:
    "int8" or "bf16", the form in which a CPU keeps the tables of floats, and the linears that have it among their
    `forms`; "fp32", or another device: as they are.
    """
    opened = what if isinstance(what, Opened) else open_model(what, registry)
    model, spec = opened.model, opened.spec
    weights = None if weights == "fp32" or torch.device(device).type != "cpu" else weights
    if weights:
        _ask_for(model, weights)
    with ThreadPoolExecutor(1) as beside:
        hashed = beside.submit(_hash, opened.weights.path)
        known = opened.card
        known["chat"] = known["chat"] or _has_template(opened.tokenizer)
        _fill(model, opened.weights, torch.device(device), ternary, dtype or torch.float32, weights)
    packed = _formats(module for module in _linears(model) if module.weight is None)
    tables = {torch.bfloat16: "bf16", torch.int8: "int8", torch.float32: "fp32"}.get(model.embedding.weight.dtype)
    form = f"{packed}, tables in {tables}" if packed else tables or "other"
    return model, spec, opened.tokenizer, Info(**known, format=form, packed_bytes=_bytes(model),
                                               weights_hash=hashed.result())


def _hash(path: Path) -> str:
    path = path / "complete.json" if path.is_dir() else path  # a checkpoint's hashes of its files
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_shapes(model: Model, weights: _Weights | SavedTensors) -> None:
    """Whether every parameter is there in its shape. Raises UserError."""
    packed = {f"{path}.weight" for path, module in model.named_modules() if _packs(module)
              and any(f"{path}.{name}" in weights.names for name in module.packed_like())}
    for name, parameter in model.named_parameters():
        if name in packed:
            continue  # what it packs to is looked at when it is taken
        if name not in weights.names:
            raise UserError(f"{weights.path}: these weights belong to another spec: {name} is missing")
        if (shape := weights.shape(name)) != list(parameter.shape):
            raise UserError(f"{weights.path}: these weights belong to another spec: {name} is {shape}, the spec's is "
                            f"{list(parameter.shape)}")
    known = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        known |= {f"{prefix}{name}" for name in module.packed_like()} if _packs(module) else set()
        known |= {f"{prefix}scale_V"} if isinstance(module, Table) else set()
    for name in sorted(weights.names - known):
        if "objectives." not in name:
            raise UserError(f"{weights.path}: these weights belong to another spec: it has no {name}")


def _run_and_weights(path: Path) -> tuple[Run, _Weights | SavedTensors]:
    """Of a run folder: model.safetensors, or while it trains the newest checkpoint's. Of a checkpoint's folder in one:
    its own."""
    if not (path / "spec.yaml").is_file() and (path / "complete.json").is_file():
        run = Run.open(path.resolve().parent.parent)
        if fault := checkpoint.damage(path):
            raise UserError(f"{path}: {fault}; take another checkpoint")
        return run, saved_weights(path)
    run = Run.open(path)
    if run.weights.is_file():
        return run, _Weights(run.weights)
    newest = checkpoint.newest(run.checkpoints)
    if newest is None:
        raise UserError(f"{run.folder}: no weights yet; train it first, or wait for its first checkpoint")
    return run, saved_weights(newest)


def _tokenizer_inside(weights: _Weights, spec: Spec) -> Any:
    text = weights.metadata.get("tokenizer")
    if not text:
        return None
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises plain Exception for whatever it cannot read
        raise UserError(f"{weights.path}: the tokenizer inside is none, or cut short ({error}); export the run "
                        "again") from None
    where = f"{weights.path} (tokenizer)"
    if config := weights.metadata.get("tokenizer_config"):
        try:
            attach(tokenizer, json.loads(config), where)
        except ValueError as error:
            raise UserError(f"{where}: what its special tokens are is cut short ({error}); export the run "
                            "again") from None
    _check_tokenizer(tokenizer, spec, where)
    return tokenizer


def _has_template(tokenizer: Any) -> bool:
    return tokenizer is not None and vocabulary_of(tokenizer).template is not None


def _check_tokenizer(tokenizer: Any, spec: Spec, where: str) -> None:
    """Whether it is one of ours or came with a published model, for this vocabulary, and knows every token's bytes.
    Raises UserError."""
    ours, size = vocabulary_of(tokenizer) is OURS, size_of(tokenizer)
    if size != spec.vocab_size and (ours or size > spec.vocab_size):
        raise UserError(f"{where}: it has {size} tokens, the spec {spec.vocab_size}; export the run again")
    for number, token in enumerate(SPECIAL_TOKENS if ours else ()):
        if tokenizer.token_to_id(token) != number:
            raise UserError(f"{where}: token {number} must be {token} and is {tokenizer.id_to_token(number)}; use a "
                            "tokenizer that tryplicity trained")
    try:
        token_bytes(tokenizer)
    except (KeyError, TypeError):  # a character that stands for no byte; a number that no token has
        raise UserError(f"{where}: it is no byte-level BPE with a token for each number; use a tokenizer that "
                        "tryplicity trained") from None
    if ours and tokenizer.get_vocab_size() != size:
        raise UserError(f"{where}: it has no token for some numbers; use a tokenizer that tryplicity trained")


def _fill(model: Model, weights: _Weights | SavedTensors, device: torch.device, ternary: bool,
          dtype: torch.dtype, form: str | None) -> None:
    """Give a model on the meta device its weights; form: of its tables of floats, if they are not to stay so."""
    used: set[str] = set()

    def take(name: str) -> Tensor:
        if name not in weights.names:
            raise UserError(f"{weights.path}: these weights belong to another spec: {name} is missing")
        used.add(name)
        return weights[name].to(device)

    def fits(name: str, tensor: Tensor, shape: torch.Size) -> Tensor:
        if tensor.shape != shape:
            raise UserError(f"{weights.path}: these weights belong to another spec: {name} is {list(tensor.shape)}, "
                            f"the spec's is {list(shape)}")
        return tensor

    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        packs = _packs(module)
        stored = {name: f"{prefix}{name}" for name in module.packed_like()} if packs else {}
        stored = stored if any(name in weights.names for name in stored.values()) else {}
        packs = bool(stored) or (packs and ternary)
        if isinstance(module, Table):
            scale = f"{prefix}scale_V"
            weight = fits(f"{prefix}weight", take(f"{prefix}weight"), module.weight.shape)
            scale_V = take(scale).float() if scale in weights.names else None
            if weight.is_floating_point() and form:
                weight, scale_V = _table(weight, form)
            elif weight.is_floating_point() and dtype != torch.float32:
                weight = weight.to(dtype)
            module.hold(weight, scale_V, dtype)
            continue
        computed = {name for name, tensor in module.named_buffers(recurse=False) if tensor is not None}
        computed -= {name for name in computed if f"{prefix}{name}" in weights.names}
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty_like(buffer, device=device)
        if computed:
            module.reset_parameters()
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, old in own:
            if name in computed or (packs and name == "weight"):
                continue
            full = f"{prefix}{name}"
            tensor = fits(full, take(full), old.shape)
            # decay parameters of a state space and the like stay as wide as their layer made them
            wide = old.dtype if not old.is_floating_point() or old.dtype != torch.get_default_dtype() else dtype
            tensor = tensor.to(wide)
            if name in module._buffers:
                module._buffers[name] = tensor.clone()
            else:
                module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
        if stored:
            packed = {name: take(full) for name, full in stored.items()}
            for name, like in module.packed_like().items():
                if fits(stored[name], packed[name], like.shape).dtype != like.dtype:
                    raise UserError(f"{weights.path}: {stored[name]} is {packed[name].dtype}, and {like.dtype} to the "
                                    f"linear {module.name} of today; export the run again")
            module.adopt(packed)
        elif packs:
            weight = fits(f"{prefix}weight", take(f"{prefix}weight"), module.weight.shape)
            module.weight = nn.Parameter(weight.float(), requires_grad=False)
            if module.ready_to_pack():
                module.adopt(_pack(path, module))
    extra = sorted(name for name in weights.names - used if "objectives." not in name)
    if extra:
        raise UserError(f"{weights.path}: these weights belong to another spec: it has no {extra[0]}")


def _linears(model: Model) -> list[Linear]:
    return [module for module in model.modules() if isinstance(module, Linear)]


def _bytes(model: Model) -> int:
    return (sum(linear.packed_nbytes() for linear in _linears(model))
            + sum(p.numel() * p.element_size() for p in model.parameters()))


# --- exporting ---

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
        run, weights = _run_and_weights(Path(what))
        spec = load_spec(str(run.spec), registry)
        words = load_tokenizer(run.tokenizer, spec.vocab_size)
        sources = [weights.path, *(path for path in run.folder.rglob("*")
                                           if path.is_file() and not is_exported(path))]
    if out is not None and out.is_dir():
        raise UserError(f"{out}: this is a folder; give the file to write")
    model = _for_inference(spec)
    if linear and not _ask_for(model, linear):
        forms = sorted({form for module in _linears(model) for form in module.forms})
        raise Refused(f"{spec.name}: no linear of this spec packs as {linear}; " +
                      (f"they can as {' or '.join(forms)}" if forms else "leave --linear out"))
    packing = {path: module for path, module in model.named_modules() if _packs(module)}
    if not packing:
        able = [name for name in registry.names("linear")
                if registry.get("linear", name).packed_like is not Linear.packed_like
                and not registry.get("linear", name).forms]
        forms = sorted({form for module in _linears(model) for form in module.forms})
        asked = f" give --linear {' or '.join(forms)};" if forms else ""
        raise Refused(f"{spec.name}: no linear of this spec can be packed unasked;{asked} or use "
                      f"`linear: {{type: {' or '.join(able)}}}`, or serve the run folder itself")
    packed_as = _formats(packing.values())
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
            for name, tensor in _pack(path, module).items():
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


def _of_run(weights: _Weights | SavedTensors) -> Callable[[str, nn.Module, list[str]], dict[str, Tensor]]:
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
        import copy
        import hashlib

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


def _table(weight_VD: Tensor, form: str) -> tuple[Tensor, Tensor | None]:
    """Its rows in int8 with their scales, or in bf16."""
    return kernels.int8_rows(weight_VD) if form == "int8" else (weight_VD.to(torch.bfloat16), None)


def _rest(name: str, tensor: Tensor, module: nn.Module, rest: str) -> Iterator[tuple[str, Tensor]]:
    """How a tensor that is not packed is stored."""
    if not tensor.is_floating_point() or tensor.ndim < 2 or rest == "fp32":
        yield name, tensor.float() if tensor.is_floating_point() else tensor
    elif rest == "int8" and isinstance(module, Table):
        rows_VD, scale_V = _table(tensor, rest)
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


def info_dict(info: Info) -> dict[str, Any]:
    """As JSON."""
    return {**dataclasses.asdict(info), "path": str(info.path)}
