"""A component's class, and a component as a spec names it. Loads no torch."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

#: a registered component's class -> the plugin it came with, as messages name it
OWNERS: weakref.WeakKeyDictionary[type, str] = weakref.WeakKeyDictionary()


class Component:
    """What every plugin component is: a family, a name, a typed Config and a constructor taking it first."""

    family: ClassVar[str]
    name: ClassVar[str]
    #: what it is taken for where the user names nothing: a source for "pretrain", "chat" or "path" (what is at a path
    #: of the disk), a retriever for "search"; the first one loaded is
    default_for: ClassVar[tuple[str, ...]] = ()
    #: options with which the conformance kit tries it, one trial each, at a hidden_size of 32
    trials: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)
    #: each component class -> its attributes when it was made, to find what changed them since
    _as_made: ClassVar[weakref.WeakKeyDictionary[type, dict[str, Any]]] = weakref.WeakKeyDictionary()

    def __init_subclass__(cls, **given: Any) -> None:
        super().__init_subclass__(**given)
        Component._as_made[cls] = dict(vars(cls))

    @dataclass(frozen=True)
    class Config:
        pass

    @classmethod
    def check(cls, config: Any, site: Any) -> Iterator[tuple[str, str]]:
        """Yield (option, what is wrong and what would be right) for options that are impossible together or
        at this `Site`; types and ranges are checked before, from Config."""
        return iter(())


@dataclass(frozen=True)
class Part:
    """A component chosen by a spec: its class and its resolved options."""

    component: Any  # a subclass of Component, whose constructor each family has its own of
    config: Any

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        # resolved by the registry before Config is built; to the schema library it is opaque
        from pydantic_core import core_schema

        return core_schema.any_schema()

    @property
    def name(self) -> str:
        return self.component.name

    def build(self, *args: Any, **kwargs: Any) -> Any:
        """Raises PluginFault naming the component whose constructor fails."""
        from tryplicity.guard import guarded

        with guarded(self.component):
            return self.component(self.config, *args, **kwargs)

    def as_dict(self) -> dict[str, Any]:
        """The part as YAML would say it, defaults included (but see `config_as_dict`)."""
        return {"type": self.name, **config_as_dict(self.config)}


def config_as_dict(config: Any) -> dict[str, Any]:
    """A resolved Config as plain YAML values: what a model is known by, so an option that came `later` is left out
    while it changes nothing."""

    def plain(value: Any) -> Any:
        if isinstance(value, Part):
            return value.as_dict()
        if dataclasses.is_dataclass(value):
            return config_as_dict(value)
        return [plain(v) for v in value] if isinstance(value, list | tuple) else value

    return {field.name: plain(getattr(config, field.name)) for field in dataclasses.fields(config)
            if "later" not in field.metadata or getattr(config, field.name) != field.default}


def later(default: Any) -> Any:
    """A Config field added to a component that models have been trained with: `heads: int | None = later(None)`. With
    its default it changes nothing, and so it is no part of a model's identity either."""
    return dataclasses.field(default=default, metadata={"later": True})


class Holds(NamedTuple):
    """What a Config field holds that is resolved on its own: components of a family, or another Config."""

    what: str | type
    many: bool = False
    optional: bool = False
    default: Any = None  # as YAML would say it


def uses(family: str, default: str | dict | None = None, *, optional: bool = False,
         many: bool = False) -> Any:
    """A Config field that holds a component: `router: Part = uses("router", default="top_k")`.

    default: a name, or a mapping with `type` and options, as YAML would say it. Without a default the option
    is required, unless `optional` (then None). many: a list of components, by default empty.
    """
    return dataclasses.field(default=() if many else None,
                             metadata={"holds": Holds(family, many, optional, default)})
