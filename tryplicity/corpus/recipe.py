"""A recipe: which sources, how much of each, and who judges what is kept. Loads no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from tryplicity.bounds import Positive, Share, Steps
from tryplicity.errors import UserError
from tryplicity.parts import Part, config_as_dict, uses

if TYPE_CHECKING:
    from tryplicity.registry import Registry


@dataclass(frozen=True)
class Portion:
    """One source's part of a corpus."""

    source: Part = uses("source")
    """Where the documents come from: a source as --data takes it."""
    share: Positive = 1.0
    """Its share of the bytes, relative to the others'."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)] | None = None
    """What its folder is called; by default the source's name."""


@dataclass(frozen=True)
class Seat:
    """A judge on the panel, and from where on its score is a vote for a document; by default as it says itself."""

    judge: Part = uses("judge")
    """Who judges."""
    keep_at: Annotated[float, Field(ge=-1e9, le=1e9)] | None = None
    """The least score that is a vote to keep."""
    keep_top: Share | None = None
    """In place of it: the share of the documents with the highest scores; found on a sample of them."""


@dataclass(frozen=True)
class Recipe:
    """A corpus: its sources, its size, its judges."""

    name: str
    """What the corpus is called."""
    bytes: Annotated[float, Field(ge=1, le=1e15)]
    """Of text, over all sources."""
    sources: list[Portion] = field(default_factory=list)
    """What it is made of."""
    shard_mb: Annotated[float, Field(ge=0.01, le=4096)] = 256.0
    """Megabytes of text in one file, before it is compressed."""
    near_duplicates: bool = True
    """Leave out documents that are nearly the same as one before them, beside those that are the same."""
    languages: list[Annotated[str, Field(pattern=r"^[a-z]{2,3}$")]] = field(default_factory=list)
    """Leave out documents that are surely in none of these (ISO 639 codes as fastText knows them: en, de, zh, ...);
    source code stays. Empty: all stay."""
    judges: list[Seat] = field(default_factory=list)
    """The panel. Without one only duplicates are left out."""
    votes: Steps | None = None
    """How many votes keep a document; by default more than half of the panel's."""
    quorum: Steps | None = None
    """How many judges must be able to work; by default all of them."""

    def names(self) -> list[str]:
        """Of the portions, each one's own."""
        return [portion.name or portion.source.name for portion in self.sources]

    def budgets(self) -> list[int]:
        """Bytes of text of each portion; together `bytes`."""
        whole = sum(portion.share for portion in self.sources)
        ends, spent = [0], 0.0
        for portion in self.sources:
            spent += portion.share
            ends.append(round(self.bytes * spent / whole))
        return [end - start for start, end in pairwise(ends)]

    def needed(self) -> int:
        """Votes that keep a document."""
        return self.votes or len(self.judges) // 2 + 1

    def as_dict(self) -> dict[str, Any]:
        return config_as_dict(self)


def load_recipe(path_or_name: str | Path, registry: Registry, settings: Sequence[str] = ()) -> Recipe:
    """Read a recipe: a file, or the name of an installed one. settings: `path=value` texts that replace values. Paths
    of sources count from the file.

    Raises UserError with every problem of the file, each `file:line:column: path: message`.
    """
    from tryplicity.registry import Problem
    from tryplicity.spec import source_value
    from tryplicity.spec.loader import apply_settings, check_kind, find_file, read_yaml

    source = read_yaml(find_file(path_or_name, "recipe"))
    check_kind(source, "recipe")
    apply_settings(source, list(settings))
    problems: list[Problem] = []
    portions = source.data.get("sources")
    for i, portion in enumerate(portions if isinstance(portions, list) else []):
        if isinstance(portion, dict) and "source" in portion:
            try:
                portion["source"] = source_value(registry, portion["source"], "", source.folder)
            except UserError as error:
                problems.append(Problem(("sources", i, "source"), str(error).strip()))
    if problems:
        raise source.error(problems)
    recipe = registry.resolve(Recipe, source.data, (), problems)
    if recipe is not None:
        problems += [Problem(path, message) for path, message in _impossible(recipe)]
    if problems:
        raise source.error(problems)
    assert recipe is not None
    return recipe


def _impossible(recipe: Recipe) -> list[tuple[tuple[str | int, ...], str]]:
    """What is wrong although each option by itself is right."""
    found: list[tuple[tuple[str | int, ...], str]] = []
    if not recipe.sources:
        found.append((("sources",), "a corpus needs a source, such as [{source: python-docs}]"))
    names = recipe.names()
    for i, name in enumerate(names):
        if name in names[:i]:
            found.append((("sources", i), f"{name!r} is there already; give each source a `name` of its own"))
    panel = len(recipe.judges)
    for option in ("votes", "quorum"):
        value = getattr(recipe, option)
        if value is not None and value > panel:
            found.append(((option,), f"{value} of a panel of {panel}; at most {panel}"))
    for i, seat in enumerate(recipe.judges):
        if seat.keep_at is not None and seat.keep_top is not None:
            found.append((("judges", i), "keep_at and keep_top say the same thing twice; give one of them"))
        if seat.keep_top == 0 or (seat.keep_at is not None and math.isnan(seat.keep_at)):
            found.append((("judges", i), "nothing would ever be kept"))
    return found
