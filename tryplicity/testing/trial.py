"""A component on trial: the small spec that it stands in, and how it is made and called.

Shapes: B batch, T time, D hidden.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tryplicity.components import Layer, Objective, Rows, State, output_and_report
from tryplicity.errors import UserError
from tryplicity.parts import Component, Part
from tryplicity.registry import Registry
from tryplicity.spec import Spec, load_spec, parse_yaml
from tryplicity.spec.loader import dump_yaml
from tryplicity.testing import hosts
from tryplicity.testing.promises import Broken, NotAsked

ROWS, TIME, HIDDEN, VOCABULARY, CONTEXT = 2, 9, 32, 300, 64
#: where a text of so many tokens is cut into chunks
CUTS = ([1] * TIME, [4, 5], [3, 1, 5])
#: where the documents of the rows begin: at the cuts, beside them, after a single token, differently in each row
BORDERS = (((4,), (4,)), ((3, 4), (1, 8)))
CLOSE = 1e-4  # of the largest value: fp32 in another order of sums


@dataclass(frozen=True)
class Trial:
    """One component with one set of options."""

    component: type[Component]
    options: Mapping[str, Any]
    files: tuple[str, ...] = ()
    """Plugin files that are loaded beside the installed plugins."""

    @property
    def family(self) -> str:
        return self.component.family

    hidden_size = HIDDEN

    @functools.cached_property
    def registry(self) -> Registry:
        """What is installed, the hosts, and the component itself."""
        from tryplicity.plugins import load_plugins

        installed, own = load_plugins(self.files).registry, Registry()
        for component in installed.components():
            if not self._is_copy(component):
                own.add(component, installed.owner(component.family, component.name))
        own.add_all(hosts.HOSTS, hosts.OWNER)
        if self.component not in own.components():
            own.add(self.component, "the component on trial")
        return own

    def _is_copy(self, component: type) -> bool:
        """Whether this is what the component on trial was made of, loaded from its file once more."""
        twin = self.component
        return (component is not twin and (component.family, component.name) == (twin.family, twin.name)
                and component.__qualname__ == twin.__qualname__ and inspect.getfile(component) == inspect.getfile(twin))

    @functools.cached_property
    def part(self) -> Part:
        return self.registry.part(self.family, {"type": self.component.name, **self.options})

    @functools.cached_property
    def spec(self) -> Spec:
        """Two layers of it, or with it. Raises UserError for options that do not go with these sizes."""
        return self.spec_with()

    def spec_with(self, **more: Any) -> Spec:
        value = {"type": self.component.name, **self.options}
        block: dict[str, Any] = {"mixer": hosts.PlainMixer.name, "feed_forward": hosts.PlainFeedForward.name}
        said: dict[str, Any] = {"name": "conformance", "vocab_size": VOCABULARY, "hidden_size": HIDDEN,
                                "context_length": CONTEXT}
        hosted = {"activation": hosts.Activated, "router": hosts.Routed, "residual": hosts.Joined}
        if self.family == "mixer":
            block = {"mixer": value}
        elif self.family == "feed_forward":
            block["feed_forward"] = value
        elif self.family in hosted:
            block["feed_forward"] = {"type": hosted[self.family].name, self.family: value}
        if self.family in ("linear", "norm", "residual"):
            said[self.family] = value
        elif self.family == "head":
            said["heads"] = [value]
        elif self.family in ("brain", "objective"):
            said["brain"] = [value]
        elif self.family in ("optimizer", "schedule"):
            said["training"] = {self.family: value}
        try:
            return load_spec(parse_yaml(dump_yaml(said | {"layers": [block, block]} | more), "conformance.yaml"),
                             self.registry)
        except UserError as error:
            raise UserError(f"{error}; the conformance kit has hidden_size {HIDDEN} and context_length {CONTEXT}: "
                            f"options that go with them stand in `trials` of {self.component.__name__}") from None

    def build(self, spec: Spec | None = None) -> nn.Module:
        """The layer that is it or holds it; a head or an objective itself. On whatever device is set."""
        spec = spec or self.spec
        if self.family in ("head", "objective"):
            return (spec.heads or spec.brain)[0].build(spec.site(0))
        block = spec.layers[0]
        return (block.mixer if self.family == "mixer" else block.feed_forward).build(spec.site(0))

    def called(self, module: nn.Module, x_BTD: Tensor, ids_BT: Tensor) -> list[Tensor]:
        """What a forward pass in training gives to learn from: its output and its losses."""
        if self.family == "head":
            tokens_BT = _token_ids(x_BTD.shape[:2])
            # made of the hidden states, so that it is there in their form: with data or without
            table_VD = x_BTD[0, :1].detach() * torch.linspace(-1, 1, VOCABULARY)[:, None].to(x_BTD.dtype)
            return [module(x_BTD, module.targets(tokens_BT, tokens_BT.roll(-1, 1), ids_BT), table_VD).total]
        if self.family == "objective":
            return objective_losses(module, x_BTD, ids_BT)
        y_BTD, report = output_and_report(module(x_BTD, state=None, doc_ids=ids_BT))
        return [y_BTD, *report.losses.values()]


@dataclass(frozen=True)
class LayerTrial(Trial):
    """A layer that a function makes, wherever it stands."""

    make: Callable[[], Layer] = None
    size: int = HIDDEN

    @property
    def hidden_size(self) -> int:
        return self.size

    def build(self, spec: Spec | None = None) -> nn.Module:
        return self.make()


def objective_losses(module: Objective, x_BTD: Tensor, ids_BT: Tensor | None) -> list[Tensor]:
    """Of a block that gives half of its input, or of tokens whose losses are the sizes of their states."""
    if module.reads_blocks():
        return list(module.block_loss(x_BTD, 0.5 * x_BTD + 0.1, ids_BT).losses.values())
    nll_BT = x_BTD.detach().float().square().mean(-1)
    weights_BT, report = output_and_report(module.token_weights(nll_BT, torch.ones_like(nll_BT, dtype=torch.bool)))
    return [weights_BT, *report.losses.values()]


# --- what they are tried with ---

def made(build: Callable[[], nn.Module], dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """As a model's layer is made, then away from its initial values: no term is hidden by a zero."""
    module = filled(build, seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return module.to(dtype).eval()


@torch.no_grad()
def filled(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """Assembled without memory, then given its initial values. Raises Broken naming what was left as it was."""
    with torch.device("meta"):
        module = build()
    module.to_empty(device="cpu")
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.fill_(torch.nan if tensor.is_floating_point() else _MARK.get(tensor.dtype, 0))
    torch.manual_seed(seed)
    for child in module.modules():
        if hasattr(child, "reset_parameters"):
            child.reset_parameters()
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        left = tensor.isnan() if tensor.is_floating_point() else tensor == _MARK.get(tensor.dtype, tensor + 1)
        if left.any():
            raise Broken(f"{name} is left as it was: reset_parameters must fill it")
    return module


#: stands in memory that nobody has written to; nobody writes these numbers
_MARK = {torch.int64: -987654321, torch.int32: -987654321, torch.int16: -31234, torch.int8: -123, torch.uint8: 231}


def tokens(hidden_size: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(ROWS, TIME, hidden_size, generator=generator).to(dtype)


def _token_ids(shape: Sequence[int]) -> Tensor:
    return (7 * torch.arange(shape[0] * shape[1]).view(*shape) + 1) % VOCABULARY


def ids(borders: Sequence[Sequence[int]]) -> Tensor:
    """[B, T]: 0, 1, ... along each row, a new number at each border."""
    return torch.stack([torch.isin(torch.arange(TIME), torch.tensor(row, dtype=torch.long)).cumsum(0)
                        for row in borders])


def run(layer: nn.Module, x_BTD: Tensor, state: State | Rows | None = None, doc_ids: Tensor | None = None) -> Tensor:
    return output_and_report(layer(x_BTD, state=state, doc_ids=doc_ids))[0]


@torch.no_grad()
def in_chunks(layer: nn.Module, x_BTD: Tensor, cuts: Sequence[int], ids_BT: Tensor | None = None,
              given: int | None = None) -> Tensor:
    """With a state; ids for the first `given` chunks, by default for all."""
    state, parts, start = layer.new_state(len(x_BTD), device=x_BTD.device, dtype=x_BTD.dtype), [], 0
    for i, size in enumerate(cuts):
        own = None if ids_BT is None or (given is not None and i >= given) else ids_BT[:, start:start + size]
        parts.append(run(layer, x_BTD[:, start:start + size].contiguous(), state, own))
        start += size
    return torch.cat(parts, 1)


def same(actual: Tensor, expected: Tensor, where: str, close: float = CLOSE) -> None:
    if actual.shape != expected.shape:
        raise Broken(f"{where}: {list(actual.shape)} instead of {list(expected.shape)}")
    if not actual.numel():
        return
    far = (actual - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
    if not far <= close:
        raise Broken(f"{where}: off by {far:.0e} of the largest value")


def cases() -> Iterator[tuple[str, Tensor | None]]:
    yield "without documents", None
    for borders in BORDERS:
        yield f"with documents that begin at {borders[0]} and {borders[1]}", ids(borders)


def packing_linears(registry: Registry) -> list[str]:
    """The linears that an exported model holds in fewer bits, by name."""
    from tryplicity.components import Linear

    return [name for name in registry.names("linear")
            if registry.get("linear", name).packed_like is not Linear.packed_like]


def needs(condition: Any, why: str) -> None:
    """The rest is tried only where this holds."""
    if not condition:
        raise NotAsked(why)
