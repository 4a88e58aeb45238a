"""Models for inference: from a run, or from one exported file (`exported`) with its spec and tokenizer inside.

The file is a safetensors file. A linear that can pack itself (`Linear.packed_like`) is stored as what it packs to,
some only in a form that was asked for (`Linear.forms`), tables of the vocabulary in the form asked for, everything else
in bf16 or fp32; loading maps the file, and a linear takes what it packed from there as it is (`Linear.adopt`), never
through floats.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tryplicity import kernels
from tryplicity.components import Linear
from tryplicity.data.tokenizer import SPECIAL_TOKENS, load_tokenizer
from tryplicity.data.vocabulary import OURS, attach, size_of, vocabulary_of
from tryplicity.errors import PluginFault, UserError
from tryplicity.inference.text import token_bytes
from tryplicity.model import Model, Table, assemble
from tryplicity.planner.count import count
from tryplicity.run import Run
from tryplicity.spec import Spec, load_spec
from tryplicity.spec.loader import parse_yaml
from tryplicity.training import checkpoint
from tryplicity.training.saved import SavedTensors, saved_weights

FORMAT = "tryplicity-1"  # of the exported file; another number for another meaning of its tensors


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


# --- what loading and `exported` share ---

def for_inference(spec: Spec) -> Model:
    """On the meta device, without what only training needs."""
    model = assemble(spec)
    model.objectives = nn.ModuleDict()
    for block in model.layers:
        block.objectives = nn.ModuleDict()
    return model.eval().requires_grad_(False)


def can_pack(module: nn.Module) -> bool:
    """As it was asked for by now."""
    return isinstance(module, Linear) and bool(module.packed_like())


def packed_by(path: str, linear: Linear) -> dict[str, Tensor]:
    """What it packs to. Raises PluginFault where that is not what it said before."""
    packed, told = linear.pack(), linear.packed_like()
    said, found = ({name: (list(t.shape), t.dtype) for name, t in (own or {}).items()} for own in (told, packed))
    if found != said:
        raise PluginFault(f"{path} (linear {linear.name}, {inspect.getsourcefile(type(linear))}): pack gave {found}, "
                          f"and packed_like says {said}; they must be alike")
    return packed


def ask_for(model: Model, form: str | None) -> bool:
    """Have the linears that can pack so. Whether there are any."""
    able = [module for module in linears_of(model) if form in module.forms]
    for module in able:
        module.form = form
    return bool(able)


def formats(linears: Iterable[Linear]) -> str:
    """What they pack to, in a word or two for people and file names."""
    return " and ".join(sorted({linear.packed_format for linear in linears}))


def _info(model: Model, spec: Spec, path: Path) -> dict[str, Any]:
    """What is known before the weights are; counted on the meta model."""
    counts = count(model)
    layers = tuple(" + ".join(part for part in (layer.mixer, layer.feed_forward) if part) for layer in counts.layers)
    return {"name": spec.name, "path": path, "parameters": counts.total, "active_parameters": counts.active,
            "packed_bytes_per_token": counts.packed_bytes_per_token, "context_length": spec.context_length,
            "chat": any(phase.kind == "chat" for phase in spec.phases), "layers": layers}


# --- loading ---

class MappedWeights:
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
    weights: MappedWeights | SavedTensors
    model: Model  # on the meta device

    @property
    def card(self) -> dict[str, Any]:
        return _info(self.model, self.spec, self.path)


def open_model(what: str | Path, registry) -> Opened:
    """A run folder, a checkpoint in one, or an exported file. Raises UserError for one that is damaged, cut short, or
    does not fit together: its spec, its tokenizer, and the names and shapes of its weights."""
    path = Path(what)
    if path.is_file():
        weights = MappedWeights(path)
        if weights.metadata.get("format") != FORMAT:
            raise UserError(f"{path}: not a model that `tryplicity export` wrote; give a run folder or such a file")
        if not weights.metadata.get("spec", "").strip():
            raise UserError(f"{path}: there is no spec inside; export the run again")
        spec = load_spec(parse_yaml(weights.metadata["spec"], f"{path} (spec)"), registry)
        tokenizer = _tokenizer_inside(weights, spec)
    else:
        run, weights = run_and_weights(path)
        spec = load_spec(str(run.spec), registry)
        tokenizer = load_tokenizer(run.tokenizer, spec.vocab_size)
        _check_tokenizer(tokenizer, spec, str(run.tokenizer))
    model = for_inference(spec)
    ask_for(model, weights.metadata.get("linear") if isinstance(weights, MappedWeights) else None)
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
        ask_for(model, weights)
    with ThreadPoolExecutor(1) as beside:
        hashed = beside.submit(_hash, opened.weights.path)
        known = opened.card
        known["chat"] = known["chat"] or _has_template(opened.tokenizer)
        _fill(model, opened.weights, torch.device(device), ternary, dtype or torch.float32, weights)
    packed = formats(module for module in linears_of(model) if module.weight is None)
    tables = {torch.bfloat16: "bf16", torch.int8: "int8", torch.float32: "fp32"}.get(model.embedding.weight.dtype)
    form = f"{packed}, tables in {tables}" if packed else tables or "other"
    return model, spec, opened.tokenizer, Info(**known, format=form, packed_bytes=_bytes(model),
                                               weights_hash=hashed.result())


def _hash(path: Path) -> str:
    path = path / "complete.json" if path.is_dir() else path  # a checkpoint's hashes of its files
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_shapes(model: Model, weights: MappedWeights | SavedTensors) -> None:
    """Whether every parameter is there in its shape. Raises UserError."""
    packed = {f"{path}.weight" for path, module in model.named_modules() if can_pack(module)
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
        known |= {f"{prefix}{name}" for name in module.packed_like()} if can_pack(module) else set()
        known |= {f"{prefix}scale_V"} if isinstance(module, Table) else set()
    for name in sorted(weights.names - known):
        if "objectives." not in name:
            raise UserError(f"{weights.path}: these weights belong to another spec: it has no {name}")


def run_and_weights(path: Path) -> tuple[Run, MappedWeights | SavedTensors]:
    """Of a run folder: model.safetensors, or while it trains the newest checkpoint's. Of a checkpoint's folder in one:
    its own."""
    if not (path / "spec.yaml").is_file() and (path / "complete.json").is_file():
        run = Run.open(path.resolve().parent.parent)
        if fault := checkpoint.damage(path):
            raise UserError(f"{path}: {fault}; take another checkpoint")
        return run, saved_weights(path)
    run = Run.open(path)
    if run.weights.is_file():
        return run, MappedWeights(run.weights)
    newest = checkpoint.newest(run.checkpoints)
    if newest is None:
        raise UserError(f"{run.folder}: no weights yet; train it first, or wait for its first checkpoint")
    return run, saved_weights(newest)


def _tokenizer_inside(weights: MappedWeights, spec: Spec) -> Any:
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


def _fill(model: Model, weights: MappedWeights | SavedTensors, device: torch.device, ternary: bool,
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
        packs = can_pack(module)
        stored = {name: f"{prefix}{name}" for name in module.packed_like()} if packs else {}
        stored = stored if any(name in weights.names for name in stored.values()) else {}
        packs = bool(stored) or (packs and ternary)
        if isinstance(module, Table):
            scale = f"{prefix}scale_V"
            weight = fits(f"{prefix}weight", take(f"{prefix}weight"), module.weight.shape)
            scale_V = take(scale).float() if scale in weights.names else None
            if weight.is_floating_point() and form:
                weight, scale_V = rows_of_table(weight, form)
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
                module.adopt(packed_by(path, module))
    extra = sorted(name for name in weights.names - used if "objectives." not in name)
    if extra:
        raise UserError(f"{weights.path}: these weights belong to another spec: it has no {extra[0]}")


def linears_of(model: Model) -> list[Linear]:
    return [module for module in model.modules() if isinstance(module, Linear)]


def _bytes(model: Model) -> int:
    return (sum(linear.packed_nbytes() for linear in linears_of(model))
            + sum(p.numel() * p.element_size() for p in model.parameters()))


def rows_of_table(weight_VD: Tensor, form: str) -> tuple[Tensor, Tensor | None]:
    """Its rows in int8 with their scales, or in bf16."""
    return kernels.int8_rows(weight_VD) if form == "int8" else (weight_VD.to(torch.bfloat16), None)
