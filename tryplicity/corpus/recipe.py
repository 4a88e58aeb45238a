"""A recipe: which sources, how much of each, and who judges what is kept. Loads no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
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
class Goal:
    """What is trained on a corpus once it is there; exactly one of steps, tokens and minutes says for how long."""

    spec: str
    """A spec: a file, which counts from the recipe's, or an installed one."""
    hw: str = "cpu"
    """A hardware profile, likewise."""
    steps: Steps | None = None
    """Optimizer steps."""
    tokens: Annotated[float, Field(ge=1, le=1e18)] | None = None
    """Tokens."""
    minutes: Positive | None = None
    """Of training."""
    settings: list[str] = field(default_factory=list)
    """Values of the spec to change, as `--set` takes them: phases=[]."""

    def budget(self) -> dict[str, float | None]:
        return {"steps": self.steps, "tokens": self.tokens and int(self.tokens), "minutes": self.minutes}


@dataclass(frozen=True)
class Recipe:
    """A corpus: its sources, its size, its judges, and what becomes of it."""

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
    vocab_size: Steps | None = None
    """Tokens of the tokenizer that `data prepare` trains on the corpus; by default those of the spec under `train`, and
    without one the corpus is not tokenised."""
    train: Goal | None = None
    """What `data prepare` trains then."""

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
    from tryplicity.configs import Problem
    from tryplicity.spec import source_value
    from tryplicity.spec.installed import check_kind, find_file
    from tryplicity.spec.loader import read_yaml
    from tryplicity.spec.settings import apply_settings

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
    judges = source.data.get("judges")
    for i, seat in enumerate(judges if isinstance(judges, list) else []):
        if isinstance(seat, dict) and isinstance(seat.get("judge"), dict):
            try:
                seat["judge"] = _placed_judge(registry, seat["judge"], source.folder)
            except UserError as error:
                problems.append(Problem(("judges", i, "judge"), str(error).strip()))
    goal = source.data.get("train")
    for option in ("spec", "hw") if isinstance(goal, dict) else ():
        if isinstance(goal.get(option), str) and (source.folder / goal[option]).is_file():
            goal[option] = str(source.folder / goal[option])
    if problems:
        raise source.error(problems)
    recipe = registry.resolve(Recipe, source.data, (), problems)
    if recipe is not None:
        problems += [Problem(path, message) for path, message in _impossible(recipe)]
    if problems:
        raise source.error(problems)
    assert recipe is not None
    return recipe


def _placed_judge(registry: Registry, judge: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A judge's options with the sources and the paths among them counted from the recipe's folder."""
    from tryplicity.spec import source_value

    if judge.get("type") not in registry.names("judge"):
        return judge
    component, placed = registry.get("judge", judge["type"]), dict(judge)
    for option in fields(component.Config):
        value, holds = judge.get(option.name), option.metadata.get("holds")
        if value is None:
            continue
        if holds is not None and holds.what == "source" and not holds.many:
            placed[option.name] = source_value(registry, value, option.name, folder)
        elif option.name in component.paths and isinstance(value, str):
            path = folder / Path(value).expanduser()
            placed[option.name] = str(path) if path.exists() else value
    return placed


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
    if recipe.train is not None and sum(value is not None for value in recipe.train.budget().values()) != 1:
        found.append((("train",), "say when to end: exactly one of steps, tokens and minutes"))
    for i, seat in enumerate(recipe.judges):
        if seat.keep_at is not None and seat.keep_top is not None:
            found.append((("judges", i), "keep_at and keep_top say the same thing twice; give one of them"))
        if seat.keep_top == 0 or (seat.keep_at is not None and math.isnan(seat.keep_at)):
            found.append((("judges", i), "nothing would ever be kept"))
        found += [(("judges", i, "judge", option), message)
                  for option, message in seat.judge.component.check(seat.judge.config, None)]
    return found
