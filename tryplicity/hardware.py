"""Hardware profiles: what a machine has, costs, and is asked to carry. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from tryplicity.bounds import Count
from tryplicity.errors import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tryplicity.registry import Registry

Amount = Annotated[float, Field(ge=1e-6, le=1e9)]
"""Of what a machine has or costs."""
Some = Annotated[float, Field(ge=0, le=1e9)]
"""The same, or none."""


@dataclass(frozen=True)
class Hardware:
    """One machine, or several alike, and how a model is to be trained on it. Every figure is per device unless it says
    otherwise."""

    name: str
    """What the profile is called on pages and in run folders."""
    device: Literal["cuda", "rocm", "cpu"]
    """Whose kernels run. rocm is AMD's, which torch reaches under the name cuda."""
    accelerator: str
    """The device's market name, for people."""
    memory_gb: Amount
    """Memory in GB of 10^9 bytes that the device offers, which is seldom its name: MiB of nvidia-smi or rocm-smi
    times 1.048576e-3."""
    tflops: Amount
    """Peak dense matrix TFLOP/s at `precision`, without sparsity."""
    memory_bandwidth_gbs: Amount
    """Memory bandwidth in GB/s."""
    count: Count = 1
    """Number of devices of one machine."""
    link_bandwidth_gbs: Some = 0.0
    """GB/s between the devices of a machine, one direction, as one device sees it; 0 where there is only one."""
    nodes: Count = 1
    """Machines that train together, each with `count` devices."""
    interconnect_bandwidth_gbs: Amount = 12.5
    """GB/s between machines, one direction, as one machine sees it: 100 Gbit/s are 12.5. Of no account where there is
    only one."""
    price_per_hour: Some = 0.0
    """US dollars for one device for one hour; all machines together cost this times `count` times `nodes`."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16: products in bfloat16 under autocast, weights kept in fp32. fp32: everything in fp32."""
    batch: Count = 1
    """Sequences of the spec's context length in one micro-batch of one device."""
    accumulation: Count = 1
    """Micro-batches in one optimizer step."""
    activation_checkpointing: bool = True
    """Keep only what enters each block and compute the rest again in the backward pass."""
    expandable_segments: bool = True
    """Let torch's CUDA allocator grow its segments, which wastes less; ignored on a CPU."""
    utilisation: Annotated[float, Field(ge=1e-6, le=1)] = 0.25
    """Share of the peak that training is expected to reach: a guess to edit once you have measured your own."""
    strategy: str | dict[str, Any] = "auto"
    """A parallelism strategy by name, or with options (type: fsdp, shards: 8), or auto: the first that fits."""

    @property
    def torch_device(self) -> str:
        return "cpu" if self.device == "cpu" else "cuda"

    @property
    def strategy_name(self) -> str:
        """Of the strategy asked for, or auto."""
        return self.strategy if isinstance(self.strategy, str) else self.strategy["type"]

    def options_of(self, strategy: str) -> str | dict[str, Any]:
        """What the profile says of a strategy, for the registry: with options where it asks for this one."""
        return self.strategy if strategy == self.strategy_name else strategy

    @property
    def memory_bytes(self) -> int:
        return int(self.memory_gb * 1e9)

    @property
    def devices(self) -> int:
        """Of all machines: the ranks of a training that uses every one."""
        return self.nodes * self.count

    @property
    def described(self) -> str:
        """What there is, for people: 2 x 8 x NVIDIA H200 SXM."""
        return f"{f'{self.nodes} x ' if self.nodes > 1 else ''}{self.count} x {self.accelerator}"

    @property
    def machine_price_per_hour(self) -> float:
        """US dollars for all devices of all machines."""
        return self.price_per_hour * self.devices

    def sequences_per_step(self) -> int:
        return self.batch * self.accumulation * self.devices


def hardware_schema(registry: Registry) -> dict[str, Any]:
    """The JSON Schema of a profile, with the strategies of the installed plugins."""
    from tryplicity.configs import FREE, config_schema

    schema = config_schema(Hardware)
    names = registry.names("parallelism")
    said = {name: value for name, value in schema["properties"]["strategy"].items() if name != "anyOf"}
    strategy = {"anyOf": [{"type": "string", "enum": ["auto", *names]}, {"$ref": "#/$defs/parallelism"}], **said}
    defs = {name: found for name, found in registry.definitions().items() if name.split(".")[0] == "parallelism"}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Tryplicity hardware profile", **schema,
            "$defs": defs,
            "properties": {**schema["properties"], "strategy": strategy}, "patternProperties": {f"^{FREE}": {}}}


def load_hardware(path_or_name: str | Path, registry: Registry, settings: Sequence[str] = ()) -> Hardware:
    """Read a profile: a file, or the name of an installed one. settings: `path=value` texts that replace values.

    Raises UserError with every problem of the file, each `file:line:column: path: message`.
    """
    from tryplicity.configs import Problem
    from tryplicity.guard import guarded
    from tryplicity.spec.installed import check_kind, find_file
    from tryplicity.spec.loader import read_yaml
    from tryplicity.spec.settings import apply_settings

    source = read_yaml(find_file(path_or_name, "hardware"))
    check_kind(source, "hardware")
    apply_settings(source, list(settings))
    problems: list[Problem] = []
    hardware = registry.resolve(Hardware, source.data, (), problems)
    strategy, strategies, asked = source.data.get("strategy", "auto"), registry.names("parallelism"), None
    if isinstance(strategy, str) and strategy not in ("auto", *strategies):
        hint = did_you_mean(strategy, ["auto", *strategies])
        problems.append(Problem(("strategy",), f"no parallelism is called {strategy!r}{hint}"))
    elif strategy != "auto" and isinstance(strategy, str | dict):
        asked = registry.resolve_part("parallelism", strategy, ("strategy",), problems)
    if hardware is not None:
        if hardware.device == "cpu" and hardware.precision == "bf16":
            problems.append(Problem(("precision",), "bf16 is not trained with on a CPU; use fp32"))
        if hardware.count > 1 and not hardware.link_bandwidth_gbs:
            at = "link_bandwidth_gbs" if "link_bandwidth_gbs" in source.data else "count"
            problems.append(Problem((at,), f"{hardware.count} devices need a link_bandwidth_gbs greater than 0"))
        if asked is not None:
            with guarded(asked.component):
                refusal = asked.build().refuses(hardware)
            if refusal is not None:
                problems.append(Problem(("strategy",), f"{asked.name} cannot be used here: {refusal}"))
    if problems:
        raise source.error(problems)
    assert hardware is not None
    return hardware
