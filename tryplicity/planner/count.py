"""Parameters, active parameters and packed bytes, counted exactly on a model assembled on the meta device."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn

from tryplicity.components import Linear, PerUse
from tryplicity.model import Model


@dataclass(frozen=True)
class LayerCount:
    index: int
    mixer: str | None
    feed_forward: str | None
    parameters: int  # of its own
    shared_with: int | None = None  # the layer whose parameters it works with, where that is another


@dataclass(frozen=True)
class Counts:
    total: int
    """Every parameter, a tied table once."""
    active: int
    """All parameters but those of the experts that a token does not choose, as model cards count: both tables of an
    untied model are in it, and so are the heads."""
    by_component: dict[str, int]
    """The total, by what the parameters belong to."""
    packed_bytes_per_token: int
    """Weight bytes read to produce one token from the exported model: a linear's weights at its packed bits, all
    other parameters in two bytes, the active ones alone, of an embedding that is not the output matrix too one row,
    a shared block at each of its uses, without the heads, which only training needs."""
    buffer_bytes: int
    layers: list[LayerCount]


def own_parameters(modules: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Each parameter once, with the module that holds it and its name there."""
    seen: set[int] = set()
    for module in modules:
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield module, name, parameter


def parameters_of(module: nn.Module) -> int:
    return sum(p.numel() for _, _, p in own_parameters(module.modules()))


def _component(path: str) -> str:
    """'layers.3.mixer.layer.in_proj' -> 'mixer'; the norm and residual of a sub-layer count as themselves."""
    steps = path.split(".")
    if steps[0] != "layers":
        return steps[0]
    return steps[2] if len(steps) > 3 and steps[3] == "layer" else steps[3]


def _reads(model: Model) -> dict[int, int]:
    """How often a module of a shared block works on one token, by its id."""
    reads: dict[int, int] = {}
    for name, block in model.layers.named_children():
        uses = model.layers.first.count(int(name))
        reads |= dict.fromkeys(map(id, block.modules()), uses)
        for own in (module for module in block.modules() if isinstance(module, PerUse)):
            reads |= dict.fromkeys(map(id, own.modules()), 1)
    return reads


def count(model: Model) -> Counts:
    """model: built on any device; only shapes are read."""
    by_component: dict[str, int] = {}
    total = 0
    active = packed = 0.0
    paths = {id(module): path for path, module in model.named_modules()}
    reads = _reads(model)
    for module, name, parameter in own_parameters(model.modules()):
        size, component = parameter.numel(), _component(paths[id(module)])
        total += size
        by_component[component] = by_component.get(component, 0) + size
        used = size * getattr(module, "active_fraction", 1.0)
        active += used
        if module is model.embedding and model.unembedding is not None:
            used = parameter.shape[1]  # a row is read
        if component != "heads" and ".objectives." not in f".{paths[id(module)]}.":
            bits = module.packed_bits if isinstance(module, Linear) and name == "weight" else 16
            packed += used * bits / 8 * reads.get(id(module), 1)
    layers = [LayerCount(i, *(part and part.name for part in (spec.mixer, spec.feed_forward)),
                         *((parameters_of(block), None) if first == i else (0, first)))
              for i, (spec, block, first) in enumerate(zip(model.spec.layers, model.layers, model.layers.first,
                                                           strict=True))]
    buffers = {id(b): b.numel() * b.element_size() for b in model.buffers()}
    return Counts(total, round(active), by_component, round(packed), sum(buffers.values()), layers)


def as_dict(counts: Counts) -> dict[str, int | dict[str, int]]:
    """The `parameters` object of `build --json`."""
    return {"total": counts.total, "active": counts.active, "by_component": counts.by_component}


def layers_as_dicts(counts: Counts) -> list[dict]:
    return [{name: value for name, value in dataclasses.asdict(layer).items() if (name, value) != ("shared_with", None)}
            for layer in counts.layers]
