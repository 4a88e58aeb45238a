"""The layers of a spec, spelled out: named blocks, repetition, patterns and overrides as one BlockSpec a layer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field

from tryplicity.bounds import Size
from tryplicity.configs import Path, Problem, said
from tryplicity.errors import did_you_mean, nearest
from tryplicity.parts import Part, later, uses
from tryplicity.registry import Registry
from tryplicity.spec.base import laid_over

#: where the norms of a sub-layer stand; y is what the residual connection adds to x
Norms = Literal["before", "after", "around", "none"]


@dataclass(frozen=True)
class BlockSpec:
    """One layer of the stack: a mixer, a feed-forward, or one after the other."""

    mixer: Part | None = uses("mixer", optional=True)
    feed_forward: Part | None = uses("feed_forward", optional=True)
    linear: Part | None = uses("linear", optional=True)
    """the linear of this block, where it differs from the spec's"""
    norm: Part | None = uses("norm", optional=True)
    """the norm of this block, where it differs from the spec's"""
    norms: Norms | None = later(None)
    """where they stand in this block, where that differs from the spec's"""
    shared: Annotated[str, Field(min_length=1)] | None = later(None)
    """any name: the layers that have the same one are one block, its parameters there once and used at each of them"""

    def __post_init__(self) -> None:
        if self.mixer is None and self.feed_forward is None:
            raise ValueError("a block needs a mixer, a feed_forward, or both; add one")


@dataclass(frozen=True)
class Repeat:
    repeat: Size
    """how many times"""
    of: Any
    """an entry of `layers`, or a list of them"""


@dataclass(frozen=True)
class Pattern:
    pattern: Annotated[list[Any], Field(min_length=1)]
    """entries of `layers`, taken in turn"""
    layers: Size
    """how many layers in all"""


class _Entry(NamedTuple):
    """One layer: what the file says of it, that resolved, and its faults (path inside it, message)."""

    raw: Any
    block: BlockSpec | None
    faults: frozenset[tuple[Path, str]]


UNKNOWN = _Entry(None, None, frozenset())  # keeps the count of layers right, for overrides


class Layers:
    """`layers` with its named blocks, repetition, patterns and overrides as one BlockSpec a layer."""

    LIMIT = 1_000

    def __init__(self, data: Mapping, registry: Registry, problems: list[Problem], site: Any) -> None:
        self.data, self.registry, self.problems, self.site = data, registry, problems, site
        blocks = data.get("blocks", {})
        misspelt = "blocks" not in data and any(nearest(key, ["blocks"]) for key in data)
        self.known = isinstance(blocks, Mapping) and not misspelt  # else an unknown name is no news
        self.counted = True  # False once a count of layers is not to be known
        self.blocks = {name: self._block(raw, ("blocks", name))
                       for name, raw in (blocks.items() if isinstance(blocks, Mapping) else ())}

    def _block(self, raw: Any, path: Path) -> _Entry:
        found: list[Problem] = []
        block = self.registry.resolve(BlockSpec, raw, path, found, self.site)
        self.problems += found
        return _Entry(raw, block, frozenset((p.path[len(path):], p.message) for p in found))

    def expand(self) -> list[BlockSpec]:
        raw = self.data.get("layers")
        if not isinstance(raw, list):
            return []
        entries = self._each(raw, ("layers",))
        if len(entries) > self.LIMIT:
            self.problems.append(Problem(("layers",), f"more than {self.LIMIT} layers; fewer must do"))
            return []
        if not raw:
            self.problems.append(Problem(("layers",), "there are no layers; name at least one block"))
        if self.counted:
            self._override(entries)
        self._check_shared(entries)
        return [entry.block for entry in entries if entry.block is not None]

    def _check_shared(self, entries: list[_Entry]) -> None:
        """What is one block must be said alike wherever it stands."""
        first: dict[str, tuple[int, BlockSpec]] = {}
        for i, (_, block, _) in enumerate(entries):
            if block is None or block.shared is None:
                continue
            before, same = first.setdefault(block.shared, (i, block))
            if block != same:
                self.problems.append(Problem(("layers",), f"layers {before} and {i} are one block (shared: "
                                             f"{block.shared}) and differ; say both alike, or give one another name"))

    def _each(self, items: list, path: Path) -> list[_Entry]:
        entries: list[_Entry] = []
        for i, item in enumerate(items):
            entries += self._entries(item, (*path, i))
            del entries[self.LIMIT + 1:]  # repeats of repeats could fill the memory before they are counted
        return entries

    def _counting(self, config_class: type, item: Mapping, path: Path) -> Any:
        config = self.registry.resolve(config_class, item, path, self.problems)
        self.counted &= config is not None
        return config

    def _entries(self, item: Any, path: Path) -> list[_Entry]:
        """The layers that an entry of `layers` stands for."""
        if isinstance(item, str):
            if item in self.blocks:
                return [self.blocks[item]]
            if self.known:
                hint = did_you_mean(item, self.blocks) or "; define it under blocks:"
                self.problems.append(Problem(path, f"no block is called {item!r}{hint}"))
            return [UNKNOWN]
        if isinstance(item, Mapping) and ("repeat" in item or "of" in item):
            repeat, of = self._counting(Repeat, item, path), item.get("of", [])
            inside = (*path, "of")
            once = self._each(of, inside) if isinstance(of, list) else self._entries(of, inside)
            return once * min(repeat.repeat, self.LIMIT // max(len(once), 1) + 1) if repeat else once
        if isinstance(item, Mapping) and "pattern" in item:
            pattern, turns = self._counting(Pattern, item, path), item["pattern"]
            once = self._each(turns if isinstance(turns, list) else [], (*path, "pattern"))
            count = min(pattern.layers, self.LIMIT + 1) if pattern and once else 0
            return [once[i % len(once)] for i in range(count)]
        if isinstance(item, Mapping):
            return [self._block(item, path)]
        self.problems.append(Problem(path, "expected the name of a block, a block, {repeat: n, of: ...} or "
                                           f"{{pattern: [...], layers: n}}, got {said(item)}"))
        return [UNKNOWN]

    def _override(self, entries: list[_Entry]) -> None:
        """Replace the entries that `overrides` change."""
        overrides = self.data.get("overrides", {})
        for key, change in overrides.items() if isinstance(overrides, Mapping) else ():
            path = ("overrides", key)
            match = re.fullmatch(r"([0-9]{1,6})(?:-([0-9]{1,6}))?", key)
            first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
            if not first <= last < len(entries):
                message = f"expected a layer, or a range such as 0-1, of the layers 0 to {len(entries) - 1}"
                self.problems.append(Problem(path, message, at_key=True))
                continue
            if not isinstance(change, Mapping):
                self.problems.append(Problem(path, f"expected a mapping, got {said(change)}"))
                continue
            changed: dict[int, _Entry] = {id(UNKNOWN): UNKNOWN}
            for index in range(first, last + 1):
                entry = entries[index]
                if id(entry) not in changed:
                    raw, found = laid_over(entry.raw, change), []
                    block = self.registry.resolve(BlockSpec, raw, path, found, self.site)
                    # what is wrong with the layer itself was reported where it stands
                    self.problems += [p for p in found if (p.path[len(path):], p.message) not in entry.faults]
                    changed[id(entry)] = _Entry(raw, block, entry.faults)
                entries[index] = changed[id(entry)]
