"""Which packages a model's components came with: written into every spec that the program writes, under `x-plugins`,
and into each checkpoint; said where one of them is missing or another. Loads no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tryplicity.configs import Problem
from tryplicity.parts import OWNERS, Component, Part
from tryplicity.registry import Registry

MADE_WITH = "x-plugins"
FILE = "a file"  # in place of the version of what no package brought


def packages_of(parts: Any) -> dict[str, str]:
    """Name and version of the package that each component came with, in whatever holds parts; of a plugin file, its
    name."""
    found = [_package(component) for component in _components(parts)]
    return dict(sorted(one for one in found if one is not None))


def _components(held: Any) -> Iterator[type[Component]]:
    if isinstance(held, Part):
        yield held.component
        yield from _components(held.config)
    elif dataclasses.is_dataclass(held) and not isinstance(held, type):
        for field in dataclasses.fields(held):
            yield from _components(getattr(held, field.name))
    elif isinstance(held, list | tuple):
        for one in held:
            yield from _components(one)


def _package(component: type[Component]) -> tuple[str, str] | None:
    return _origin(OWNERS.get(component, ""))


def _origin(owner: str) -> tuple[str, str] | None:
    """Of "plugin NAME (package 1.2)" or "plugin NAME (path/to/file.py)"."""
    origin = owner.partition(" (")[2].removesuffix(")")
    if origin.endswith(".py"):
        return Path(origin).name, FILE
    package, _, version = origin.rpartition(" ")
    return (package, version) if package else None


def differing(recorded: Mapping[str, str], parts: Any) -> list[str]:
    """Of the packages recorded, those that the parts do not come with here in that version; this project's own, which
    says by itself what it cannot read, is not among them."""
    here = packages_of(parts)
    return [f"{_to_install(name, version)}, and here is {here.get(name, 'none')}" for name, version in recorded.items()
            if here.get(name) != version and name != __package__.partition(".")[0]]


def _to_install(name: str, version: str) -> str:
    return (f"the plugin file {name} (--plugin says where it is)" if version == FILE else
            f"{name} {version} (pip install {name}=={version})")


def explained(problems: list[Problem], data: Mapping[str, Any], registry: Registry) -> list[Problem]:
    """The same, with what to install behind a component that nobody here provides."""
    recorded = data.get(MADE_WITH)
    if not isinstance(recorded, Mapping):
        return problems
    here = {origin[0] for component in registry.components()
            if (origin := _origin(registry.owner(component.family, component.name)))}
    missing = [_to_install(name, version) for name, version in recorded.items() if name not in here]
    if not missing:
        return problems
    more = f"; this model was made with {' and '.join(missing)}, which is not here"
    return [dataclasses.replace(one, message=one.message + more) if " is called " in one.message else one
            for one in problems]
