"""The spec: what a YAML file says of a model and its training, resolved. Loads torch only through plugins."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Annotated, Any, Literal

from pydantic import Field

from tryplicity.bounds import Length, Positive, Seed, Size, Steps
from tryplicity.configs import FREE, Path, Problem, config_schema, referencing_schema, value_problems
from tryplicity.parts import Part, config_as_dict, later, uses
from tryplicity.registry import Registry
from tryplicity.spec.base import KEY, with_base
from tryplicity.spec.installed import check_kind, find_file
from tryplicity.spec.layers import BlockSpec, Layers, Norms, Pattern, Repeat
from tryplicity.spec.loader import YamlFile, dump_yaml, read_yaml
from tryplicity.spec.made_with import MADE_WITH, explained, packages_of
from tryplicity.spec.settings import apply_settings


@dataclass(frozen=True)
class Training:
    """How the model is trained, whatever the hardware."""

    optimizer: Part = uses("optimizer", default="adamw")
    schedule: Part = uses("schedule", default="wsd")
    gradient_clip: Positive = 1.0
    """largest global norm of the gradient"""
    seed: Seed = 0
    """of initialisation and data order"""
    validate_every: Steps = 200
    """optimizer steps between two validations"""
    validation_rows: Steps = 64
    """held-out sequences scored at each validation while training"""
    final_validation_rows: Steps = 4096
    """held-out sequences scored at the end, spread evenly over what is held out; where there are fewer, all"""
    checkpoint_every: Steps = 500
    """optimizer steps between two checkpoints"""
    keep_checkpoints: Steps = 2
    """how many of the newest checkpoints stay on disk"""
    compile: Literal["auto", "on", "off"] = "auto"
    """whether blocks go through torch's compiler, checked against eager PyTorch at the start; auto: on a GPU"""
    bad_steps: Steps = 5
    """steps in a row with a loss that is not a number after which training stops"""


@dataclass(frozen=True)
class Phase:
    """A part of a training."""

    kind: Literal["pretrain", "sleep", "chat"]
    """pretrain: on documents; sleep: what the sleeping modules of `brain` do; chat: on conversations"""
    share: Positive | None = None
    """of the whole budget, relative to the other phases' (1 by default); a sleep has none"""
    data: str | dict[str, Any] | None = None
    """the source, as --data would say it; by default --data (pretrain) or --chat-data (chat)"""
    schedule: Part | None = uses("schedule", optional=True)
    """by default that of `training`"""
    learning_rate_factor: Positive = 1.0
    """multiplies the optimizer's learning rate in this phase"""

    def __post_init__(self) -> None:
        own = (self.share, self.data, self.schedule, self.learning_rate_factor)
        if self.kind == "sleep" and own != (None, None, None, 1.0):
            raise ValueError("a sleep takes no share, data, schedule or learning_rate_factor; its module in `brain` "
                             "says what it does")


PRETRAIN_ONLY = (Phase("pretrain"),)


@dataclass(frozen=True)
class Expect:
    """What the model must come out as; `build` refuses it otherwise."""

    total_parameters: Annotated[float, Field(ge=1, le=1e18)] | None = None
    active_parameters: Annotated[float, Field(ge=1, le=1e18)] | None = None
    within: Annotated[float, Field(gt=0, lt=1)] = 0.02
    """allowed relative difference"""


@dataclass(frozen=True)
class _SpecFile:
    name: Annotated[str, Field(min_length=1)]
    """what the model is called"""
    vocab_size: Annotated[int, Field(ge=262, le=2**20)]
    """tokens, the 256 bytes and 6 special ones included"""
    hidden_size: Size
    """width of the residual stream"""
    context_length: Length
    """tokens of one training sequence"""
    layers: list[Any]
    """names of blocks, blocks, {repeat: n, of: ...}, or {pattern: [...], layers: n}"""
    tied_embeddings: bool = True
    """the output matrix is the embedding table"""
    linear: Part = uses("linear", default="linear")
    norm: Part = uses("norm", default="rmsnorm")
    norms: Norms = later("before")
    """of a sub-layer: before, y = layer(norm(x)); after, y = norm(layer(x)); around, y = norm(layer(norm(x))); none,
    y = layer(x)"""
    residual: Part = uses("residual", default="add")
    embedding_multiplier: Positive = later(1.0)
    """multiplies what the embedding gives"""
    logits_multiplier: Positive = later(1.0)
    """multiplies the logits"""
    logits_softcap: Positive | None = later(None)
    """cap * tanh(logits / cap) takes the place of the logits"""
    blocks: dict[str, Any] = dataclasses.field(default_factory=dict)
    """blocks by name, for `layers`"""
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
    """changes to single layers: {"3": {...}, "8-15": {...}}, counted from 0"""
    heads: tuple[Part, ...] = uses("head", many=True)
    brain: tuple[Part, ...] = uses("brain|objective", many=True)
    phases: list[Phase] = dataclasses.field(default_factory=list)
    """what training consists of, in order; by default one phase of pretraining"""
    training: Training = dataclasses.field(default_factory=Training)
    expect: Expect | None = None


@dataclass(frozen=True)
class Spec:
    """A resolved spec. `source` is the file it came from, with `--set` applied."""

    name: str
    vocab_size: int
    hidden_size: int
    context_length: int
    tied_embeddings: bool
    linear: Part
    norm: Part
    norms: Norms
    residual: Part
    embedding_multiplier: float
    logits_multiplier: float
    logits_softcap: float | None
    layers: tuple[BlockSpec, ...]
    heads: tuple[Part, ...]
    brain: tuple[Part, ...]
    phases: tuple[Phase, ...]
    training: Training
    expect: Expect | None
    source: YamlFile = dataclasses.field(compare=False, repr=False)

    def site(self, layer: int | None = None, sublayer: int = 0) -> Any:
        """The Site of a layer's sub-layer, or of a component outside the stack."""
        block = self.layers[layer] if layer is not None else None
        uses = 1 if layer is None else self.first_uses.count(self.first_uses[layer])
        return _site(self.hidden_size, self.vocab_size, self.context_length, len(self.layers), layer, sublayer,
                     (block and block.linear) or self.linear, (block and block.norm) or self.norm, uses)

    @functools.cached_property
    def first_uses(self) -> list[int]:
        """Of each layer, the first one that is the same block: itself, unless the block is shared."""
        first: dict[str, int] = {}
        return [i if block.shared is None else first.setdefault(block.shared, i)
                for i, block in enumerate(self.layers)]

    def architecture(self) -> dict[str, Any]:
        """All that decides the weights' names and shapes and what they compute, as plain data."""
        optional = [f for f in dataclasses.fields(_SpecFile) if f.metadata.get("later")]
        return {
            "vocab_size": self.vocab_size, "hidden_size": self.hidden_size,
            "context_length": self.context_length, "tied_embeddings": self.tied_embeddings,
            "linear": self.linear.as_dict(), "norm": self.norm.as_dict(), "residual": self.residual.as_dict(),
            "layers": [config_as_dict(block) for block in self.layers],
            "heads": [part.as_dict() for part in self.heads],
            "brain": [part.as_dict() for part in self.brain],
            **{f.name: getattr(self, f.name) for f in optional if getattr(self, f.name) != f.default},
        }

    def identity(self) -> str:
        """A hash of the architecture: what a checkpoint belongs to."""
        return hashlib.sha256(json.dumps(self.architecture(), sort_keys=True).encode()).hexdigest()[:16]

    def as_yaml(self) -> str:
        """The file's content, `--set` applied, and the packages that its components came with: reading it gives this
        spec again."""
        return dump_yaml({**self.source.data, MADE_WITH: packages_of(self)})

    def error(self, path: Path, message: str) -> Exception:
        """A UserError at a path of the file."""
        return self.source.error([Problem(path, message)])


def _site(*values: Any) -> Any:
    from tryplicity.components import Site

    hidden, vocab, context, layers, layer, sublayer, linear, norm, uses = values
    return Site(hidden_size=hidden, vocab_size=vocab, context_length=context, layers=layers, layer=layer,
                sublayer=sublayer, linear_part=linear, norm_part=norm, uses=uses)


SIZES = ("hidden_size", "vocab_size", "context_length")


def load_spec(source: YamlFile | str | FilePath, registry: Registry, settings: Iterable[str] = ()) -> Spec:
    """Read, check and resolve a spec: a file, or the name of an installed one.

    Raises UserError with every problem of the file at once.
    """
    if not isinstance(source, YamlFile):
        source = read_yaml(find_file(source, "spec"))
    with_base(source)
    check_kind(source, "spec")
    apply_settings(source, settings)
    problems: list[Problem] = []
    data = source.data
    sizes = [data.get(key) for key in SIZES]
    # without its sizes no component can be asked to check whether it fits in
    wanted = config_schema(_SpecFile)["properties"]
    usable = not any(value_problems(data.get(key), {**wanted[key], "minimum": 1}, ()) for key in SIZES)
    site = _site(*map(int, sizes), 1, None, 0, None, None, 1) if usable else None

    file = registry.resolve(_SpecFile, data, (), problems, site)
    layers = Layers(data, registry, problems, site).expand()
    for key in ("heads", "brain"):
        problems += _repeated(data.get(key), key)
    if problems or file is None:
        raise source.error(explained(problems, data, registry))
    names = {field.name for field in dataclasses.fields(Spec)} - {"layers", "phases", "source"}
    fields = {name: getattr(file, name) for name in names}
    phases = tuple(file.phases) or PRETRAIN_ONLY
    if all(phase.kind != "pretrain" for phase in phases):
        raise source.error([Problem(("phases",), "none of them pretrains; add {kind: pretrain}")])
    for i, phase in enumerate(phases):
        if phase.kind == "sleep" and not any(_sleeps(part) for part in file.brain):
            raise source.error([Problem(("phases", i, "kind"), "nothing in `brain` sleeps; add a module that "
                                                               "does to it, or leave this phase out")])
    return Spec(**fields, phases=phases, layers=tuple(layers), source=source)


def _sleeps(part: Part) -> bool:
    from tryplicity.components import Brain

    return issubclass(part.component, Brain) and part.component.sleep is not Brain.sleep


def _repeated(parts: Any, key: str) -> list[Problem]:
    """Heads and brain modules report under their names, so that each can stand only once."""
    parts = parts if isinstance(parts, list) else []
    names = [part.get("type") if isinstance(part, Mapping) else part for part in parts]
    return [Problem((key, i), f"{name} stands already at {key}[{names.index(name)}]; keep one of them")
            for i, name in enumerate(names) if isinstance(name, str) and name in names[:i]]


def spec_schema(registry: Registry) -> dict[str, Any]:
    """The JSON Schema of a spec file, composed from whatever plugins are installed."""
    schema = referencing_schema(_SpecFile)
    there = {"type": ["string", "object"]}
    block = {**referencing_schema(BlockSpec),  # as its __post_init__ has it
             "anyOf": [{"required": [role], "properties": {role: there}} for role in ("mixer", "feed_forward")]}
    layer, layers = {"$ref": "#/$defs/layer"}, {"type": "array", "items": {"$ref": "#/$defs/layer"}}
    repeat, pattern = referencing_schema(Repeat), referencing_schema(Pattern)
    override = {**referencing_schema(BlockSpec, ".change"), "required": []}
    phase = schema["properties"]["phases"]["items"]
    phase["properties"]["data"] = {**phase["properties"]["data"],
                                   "anyOf": [{"type": "string"}, {"$ref": "#/$defs/source"}, {"type": "null"}]}

    def add(target: dict[str, Any], name: str, **more: Any) -> None:
        target["properties"][name] = {**target["properties"][name], **more}

    add(repeat, "of", anyOf=[layer, layers])
    add(pattern, "pattern", **layers)
    add(schema, "layers", **layers)
    schema["patternProperties"] = {f"^{FREE}": {}}
    add(schema, "blocks", additionalProperties={"$ref": "#/$defs/block"})
    add(schema, "overrides", additionalProperties=False, patternProperties={"^[0-9]+(-[0-9]+)?$": override})
    kinds = {"block": block, "repeat": repeat, "pattern": pattern}
    entry = {"anyOf": [{"type": "string"}, *({"$ref": f"#/$defs/{kind}"} for kind in kinds)]}
    whole = {"required": schema["required"], "properties": {name: schema["properties"][name] for name in CHANGED}}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Tryplicity spec", **_derived(schema),
            "if": {"not": {"required": [KEY]}}, "then": whole,
            "$defs": {**kinds, "block.change": override, "layer": entry, **registry.definitions()}}


#: what need not be whole in a spec that starts from another
CHANGED = ("blocks", "linear", "norm", "residual")


def _derived(schema: dict[str, Any]) -> dict[str, Any]:
    """Of a spec with a base."""
    own = schema["properties"]
    changes = {name: {**own[name], "$ref": f"#/$defs/{name}.change"} for name in CHANGED[1:]}
    blocks = {**own["blocks"], "additionalProperties": {"$ref": "#/$defs/block.change"}}
    base = {"type": "string", "description": "the spec to start from, an installed one or a file; what stands beside "
                                             "it is laid over it: mappings key by key, lists as a whole"}
    return {**schema, "required": [], "properties": {**own, **changes, "blocks": blocks, KEY: base}}
