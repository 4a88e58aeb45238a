"""The spec: what a YAML file says of a model and its training, resolved. Loads torch only through plugins."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from tryplicity.errors import did_you_mean
from tryplicity.parts import Part, config_as_dict, uses
from tryplicity.registry import Path, Problem, Registry, _said, referencing_schema, schema_problems
from tryplicity.spec.loader import Source, apply_settings, read_yaml

Size = Annotated[int, Field(gt=0)]


@dataclass(frozen=True)
class BlockSpec:
    """One layer of the stack: a mixer, then a feed-forward, each normalised before and added after."""

    mixer: Part = uses("mixer")
    feed_forward: Part | None = uses("feed_forward", optional=True)
    linear: Part | None = uses("linear", optional=True)
    """the linear of this block, where it differs from the spec's"""
    norm: Part | None = uses("norm", optional=True)
    """the norm of this block, where it differs from the spec's"""


@dataclass(frozen=True)
class Training:
    """How the model is trained, whatever the hardware."""

    optimizer: Part = uses("optimizer", default="adamw")
    schedule: Part = uses("schedule", default="wsd")
    gradient_clip: Annotated[float, Field(gt=0)] = 1.0
    """largest global norm of the gradient"""
    seed: Annotated[int, Field(ge=0)] = 0
    """of initialisation and data order"""
    validate_every: Size = 200
    """optimizer steps between two validations"""
    validation_rows: Size = 64
    """held-out sequences scored at each validation while training (the last one scores more)"""
    checkpoint_every: Size = 500
    """optimizer steps between two checkpoints"""
    keep_checkpoints: Size = 2
    """how many of the newest checkpoints stay on disk"""
    bad_steps: Size = 5
    """steps in a row with a loss that is not a number after which training stops"""


@dataclass(frozen=True)
class Expect:
    """What the model must come out as; `build` refuses it otherwise."""

    total_parameters: Annotated[float | None, Field(gt=0)] = None
    active_parameters: Annotated[float | None, Field(gt=0)] = None
    within: Annotated[float, Field(gt=0, lt=1)] = 0.02
    """allowed relative difference"""


@dataclass(frozen=True)
class _SpecFile:
    name: Annotated[str, Field(min_length=1)]
    """what the model is called"""
    vocab_size: Annotated[int, Field(ge=262)]
    """tokens, the 256 bytes and 6 special ones included"""
    hidden_size: Size
    """width of the residual stream"""
    context_length: Size
    """tokens of one training sequence"""
    layers: list[Any]
    """names of blocks, blocks, {repeat: n, of: ...}, or {pattern: [...], layers: n}"""
    tied_embeddings: bool = True
    """the output matrix is the embedding table"""
    linear: Part = uses("linear", default="linear")
    norm: Part = uses("norm", default="rmsnorm")
    residual: Part = uses("residual", default="add")
    blocks: dict[str, Any] = dataclasses.field(default_factory=dict)
    """blocks by name, for `layers`"""
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
    """changes to single layers: {"3": {...}, "8-15": {...}}, counted from 0"""
    heads: tuple[Part, ...] = uses("head", many=True)
    brain: tuple[Part, ...] = uses("brain", many=True)
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
    residual: Part
    layers: tuple[BlockSpec, ...]
    heads: tuple[Part, ...]
    brain: tuple[Part, ...]
    training: Training
    expect: Expect | None
    source: Source = dataclasses.field(compare=False, repr=False)

    def site(self, layer: int | None = None, sublayer: int = 0) -> Any:
        """The Site of a layer's sub-layer, or of a component outside the stack."""
        block = self.layers[layer] if layer is not None else None
        return _site(self.hidden_size, self.vocab_size, self.context_length, len(self.layers), layer, sublayer,
                     (block and block.linear) or self.linear, (block and block.norm) or self.norm)

    def architecture(self) -> dict[str, Any]:
        """All that decides the weights' names and shapes and what they compute, as plain data."""
        return {
            "vocab_size": self.vocab_size, "hidden_size": self.hidden_size, "context_length": self.context_length,
            "tied_embeddings": self.tied_embeddings, "linear": self.linear.as_dict(), "norm": self.norm.as_dict(),
            "residual": self.residual.as_dict(), "layers": [config_as_dict(block) for block in self.layers],
            "heads": [part.as_dict() for part in self.heads], "brain": [part.as_dict() for part in self.brain],
        }

    def identity(self) -> str:
        """A hash of the architecture: what a checkpoint belongs to."""
        return hashlib.sha256(json.dumps(self.architecture(), sort_keys=True).encode()).hexdigest()[:16]

    def as_yaml(self) -> str:
        """The file's content, `--set` applied: reading it gives this spec again."""
        import yaml

        class Dumper(yaml.SafeDumper):
            def ignore_aliases(self, data: Any) -> bool:
                return True

        return yaml.dump(self.source.data, Dumper=Dumper, sort_keys=False, width=110)

    def error(self, path: Path, message: str) -> Exception:
        """A UserError at a path of the file."""
        return self.source.error([Problem(path, message)])


def _site(*values: Any) -> Any:
    from tryplicity.components import Site

    hidden, vocab, context, layers, layer, sublayer, linear, norm = values
    return Site(hidden_size=hidden, vocab_size=vocab, context_length=context, layers=layers, layer=layer,
                sublayer=sublayer, linear_part=linear, norm_part=norm)


def load_spec(source: Source | str, registry: Registry, settings: tuple[str, ...] | list[str] = ()) -> Spec:
    """Read, check and resolve a spec. Raises UserError with every problem of the file at once."""
    if not isinstance(source, Source):
        source = read_yaml(source)
    apply_settings(source, settings)
    problems: list[Problem] = []
    data = source.data
    numbers = [data.get(key) for key in ("hidden_size", "vocab_size", "context_length")]
    usable = all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in numbers)
    site = _site(*numbers, 1, None, 0, None, None) if usable else None

    file = registry.resolve(_SpecFile, data, (), problems, site)
    layers = _Layers(data, registry, problems, site).expand()
    if problems or file is None:
        raise source.error(problems)
    fields = {f.name: getattr(file, f.name) for f in dataclasses.fields(file) if f.name not in ("blocks", "overrides")}
    return Spec(**{**fields, "layers": tuple(layers), "source": source})


class _Layers:
    """Expands `layers` with the named blocks, repetition, patterns and overrides into one BlockSpec a layer."""

    LIMIT = 10_000

    def __init__(self, data: Mapping, registry: Registry, problems: list[Problem], site: Any) -> None:
        self.data, self.registry, self.problems, self.site = data, registry, problems, site
        blocks = data.get("blocks", {})
        self.blocks = blocks if isinstance(blocks, Mapping) else {}
        self.resolved: dict[str, BlockSpec | None] = {
            name: registry.resolve(BlockSpec, raw, ("blocks", name), problems, site)
            for name, raw in self.blocks.items()}

    def expand(self) -> list[BlockSpec]:
        raw = self.data.get("layers")
        if not isinstance(raw, list):
            return []
        if not raw:
            self.problems.append(Problem(("layers",), "there are no layers; name at least one block"))
        expanded = [entry for i, item in enumerate(raw) for entry in self._entries(item, ("layers", i))]
        if len(expanded) > self.LIMIT:
            self.problems.append(Problem(("layers",), f"{len(expanded)} layers; at most {self.LIMIT} are built"))
            return []
        return self._overridden(expanded)

    def _entries(self, item: Any, path: Path) -> list[tuple[Any, BlockSpec | None]]:
        """(raw block, resolved block) of each layer an entry of `layers` stands for."""
        if isinstance(item, str):
            if item not in self.blocks:
                hint = did_you_mean(item, self.blocks) or "; define it under blocks:"
                self.problems.append(Problem(path, f"no block is called {item!r}{hint}"))
                return []
            return [(self.blocks[item], self.resolved[item])]
        if isinstance(item, Mapping) and ("repeat" in item or "of" in item):
            self._check(item, {"repeat": {"type": "integer", "minimum": 1}, "of": {}}, path)
            of, count = item.get("of"), item.get("repeat")
            inner = of if isinstance(of, list) else [of] if of is not None else []
            once = [entry for i, child in enumerate(inner)
                    for entry in self._entries(child, (*path, "of", i) if isinstance(of, list) else (*path, "of"))]
            return once * min(count, self.LIMIT + 1) if isinstance(count, int) and count > 0 else once
        if isinstance(item, Mapping) and "pattern" in item:
            self._check(item, {"pattern": {"type": "array", "minItems": 1},
                               "layers": {"type": "integer", "minimum": 1}}, path)
            pattern, count = item.get("pattern"), item.get("layers")
            if not isinstance(pattern, list):
                return []
            once = [entry for i, child in enumerate(pattern) for entry in self._entries(child, (*path, "pattern", i))]
            if not once or not isinstance(count, int):
                return once
            return [once[i % len(once)] for i in range(min(count, self.LIMIT + 1))]
        if isinstance(item, Mapping):
            return [(item, self.registry.resolve(BlockSpec, item, path, self.problems, self.site))]
        self.problems.append(Problem(path, "expected the name of a block, a block, {repeat: n, of: ...} or "
                                           f"{{pattern: [...], layers: n}}, got {_said(item)}"))
        return []

    def _check(self, item: Mapping, properties: dict[str, Any], path: Path) -> None:
        schema = {"type": "object", "properties": properties, "required": list(properties),
                  "additionalProperties": False}
        self.problems += schema_problems(dict(item), schema, path)

    def _overridden(self, entries: list[tuple[Any, BlockSpec | None]]) -> list[BlockSpec]:
        overrides = self.data.get("overrides", {})
        for key, change in overrides.items() if isinstance(overrides, Mapping) else ():
            path = ("overrides", key)
            first, _, last = str(key).partition("-")
            indices = range(int(first), int(last or first) + 1) if first.isdigit() and (last or first).isdigit() else []
            if not indices or indices[-1] >= len(entries):
                self.problems.append(Problem(path, f"expected a layer or a range of layers from 0 to "
                                                   f"{len(entries) - 1}, such as \"3\" or \"4-7\"", at_key=True))
                continue
            if not isinstance(change, Mapping):
                self.problems.append(Problem(path, f"expected a mapping, got {_said(change)}"))
                continue
            for index in indices:
                raw = _merged(entries[index][0], change)
                found: list[Problem] = []
                block = self.registry.resolve(BlockSpec, raw, path, found, self.site)
                if entries[index][1] is not None:  # else the block itself was reported already
                    self.problems += found
                entries[index] = (raw, block)
        return [block for _, block in entries if block is not None]


def _merged(base: Any, change: Any) -> Any:
    """`change` over `base`, key by key; a part of another type replaces the whole part."""
    if not (isinstance(base, Mapping) and isinstance(change, Mapping)):
        return change
    if "type" in change and change["type"] != base.get("type"):
        return change
    return {**base, **{k: _merged(base.get(k), v) for k, v in change.items()}}


def spec_schema(registry: Registry) -> dict[str, Any]:
    """The JSON Schema of a spec file, composed from whatever plugins are installed."""
    schema = referencing_schema(_SpecFile)
    block = referencing_schema(BlockSpec)
    entry = {"anyOf": [
        {"type": "string"}, {"$ref": "#/$defs/block"},
        {"type": "object", "required": ["repeat", "of"], "additionalProperties": False, "properties": {
            "repeat": {"type": "integer", "minimum": 1},
            "of": {"anyOf": [{"$ref": "#/$defs/layer"}, {"type": "array", "items": {"$ref": "#/$defs/layer"}}]}}},
        {"type": "object", "required": ["pattern", "layers"], "additionalProperties": False, "properties": {
            "pattern": {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/layer"}},
            "layers": {"type": "integer", "minimum": 1}}}]}
    properties = schema["properties"]
    properties["layers"] = {"type": "array", "items": {"$ref": "#/$defs/layer"},
                            "description": properties["layers"].get("description", "")}
    properties["blocks"] = {"type": "object", "additionalProperties": {"$ref": "#/$defs/block"}}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Tryplicity spec", **schema,
            "$defs": {"block": block, "layer": entry, **registry.definitions()}}

