"""Which components a spec names, and the spec without some of them: pure functions on its YAML data.

A module is a component's `type` wherever the data holds one, as `{type: spike, ...}` or as the bare name. Taking
it out deletes the key that holds it, so that the option's default stands in, or its item of a list. A component that it
held stays, if the default can hold it too: a router goes, the inhibition it shares with the default router does not.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tryplicity.errors import UserError, did_you_mean
from tryplicity.registry import Registry
from tryplicity.spec import Spec, YamlFile, load_spec
from tryplicity.spec import model as spec_model

#: top-level keys that a measured spec does without: only pretraining is compared, and parameters may go
LEFT_OUT = ("phases", "expect")

class Names:
    """`names(key, value)`: the component that `key: value` names, or None."""

    def __init__(self, registry: Registry) -> None:
        families: dict[str, set[str]] = {}  # option -> the families it holds
        defaults: dict[str, set[str]] = {}
        classes = [c for c in vars(spec_model).values() if isinstance(c, type) and dataclasses.is_dataclass(c)]
        for config in (*classes, *(component.Config for component in registry.components())):
            for field in dataclasses.fields(config):
                holds = field.metadata.get("holds")
                if holds and isinstance(holds.what, str):
                    families.setdefault(field.name, set()).update(holds.what.split("|"))
                    if isinstance(holds.default, str):
                        defaults.setdefault(field.name, set()).add(holds.default)
        self._known = {key: {name for family in held for name in registry.names(family)}
                       for key, held in families.items()}
        self._default: dict[str, tuple[str, set[str]]] = {}  # option -> its default and what that holds
        for key, (default, *others) in defaults.items():
            if not others:
                fields = dataclasses.fields(registry.get("|".join(families[key]), default).Config)
                self._default[key] = default, {field.name for field in fields if "holds" in field.metadata}

    def __call__(self, key: Any, value: Any) -> str | None:
        if isinstance(value, Mapping):
            return value["type"] if isinstance(value.get("type"), str) else None
        return value if isinstance(value, str) and value in self._known.get(key, ()) else None

    def in_place_of(self, key: Any, value: Any) -> dict[str, Any]:
        """The default of an option with those components of its value that the default holds too; empty if none."""
        default, holds = self._default.get(key, ("", set()))
        kept = {inner: part for inner, part in value.items() if inner in holds} if isinstance(value, Mapping) else {}
        return {"type": default, **kept} if kept else {}


def component_names(registry: Registry) -> Names:
    return Names(registry)


def types_in(data: Any, named: Names, key: Any = None) -> Iterator[str]:
    """The components that the data names, outer ones first, repeated as they stand."""
    name = named(key, data)
    if name is not None:
        yield name
    if isinstance(data, Mapping):
        for inner, value in data.items():
            yield from types_in(value, named, inner)
    elif isinstance(data, list):
        for value in data:
            yield from types_in(value, named, key)


def without(data: Any, types: Collection[str], named: Names, key: Any = None) -> Any:
    """A copy of the data in which none of these components stands."""
    if isinstance(data, Mapping):
        left = {}
        for inner, value in data.items():
            kept = without(value, types, named, inner)
            if named(inner, value) in types:
                kept = named.in_place_of(inner, kept)
                if not kept:
                    continue
            left[inner] = kept
        return left
    if isinstance(data, list):
        return [without(value, types, named, key) for value in data if named(key, value) not in types]
    return copy.copy(data)


@dataclass(frozen=True)
class Variant:
    """A spec to train: its label, and its YAML data. Two variants of equal data are one."""

    label: str
    spec: Spec

    @property
    def data(self) -> dict[str, Any]:
        return self.spec.source.data


@dataclass(frozen=True)
class Comparison:
    """One row of the table: a module, and the two variants that differ by it."""

    module: str
    with_it: Variant
    without_it: Variant


def comparisons(source: YamlFile, modules: Iterable[str], registry: Registry, alone: bool = False) -> list[Comparison]:
    """The rows for these modules. alone: each module is added to the spec without any of them, instead of taken
    from the spec as it is.

    Raises UserError for a module that the spec does not name, one that cannot be taken out, and one whose absence
    changes nothing.
    """
    modules, named = list(dict.fromkeys(modules)), component_names(registry)
    data = {key: value for key, value in source.data.items() if key not in LEFT_OUT}
    present = set(types_in(data, named))
    for module in modules:
        if module not in present:
            hint = did_you_mean(module, present)
            there = "" if "there are" in hint else f"; it names: {', '.join(sorted(present))}"
            raise UserError(f"--without {module}: {source.file} names no such component{hint}{there}")

    def variant(label: str, removed: Collection[str]) -> Variant:
        cut = dataclasses.replace(source, data=without(data, removed, named), settings={})
        try:
            return Variant(label, load_spec(cut, registry))
        except UserError as error:
            left = f"without {', '.join(sorted(removed))}: " if removed else ""
            raise UserError("\n".join(left + line for line in str(error).splitlines())) from None

    def compared(module: str, with_it: Variant, without_it: Variant) -> Comparison:
        if _meaning(with_it.spec) == _meaning(without_it.spec):
            raise UserError(f"--without {module}: the model is the same with and without it (it is the default there, "
                            "or its place goes with another module)")
        return Comparison(module, with_it, without_it)

    if alone:
        base = variant("bare", modules)
        return [compared(m, variant(f"only-{m}", [other for other in modules if other != m]), base) for m in modules]
    base = variant("baseline", ())
    return [compared(m, base, variant(f"without-{m}", [m])) for m in modules]


def _meaning(spec: Spec) -> Any:
    """All that a spec says once its defaults are filled in."""
    from tryplicity.parts import config_as_dict

    return spec.architecture(), config_as_dict(spec.training)
