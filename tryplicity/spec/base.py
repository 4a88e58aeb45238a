"""`base:` of a spec: another one to start from. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tryplicity.configs import Problem, said
from tryplicity.errors import UserError
from tryplicity.spec.installed import check_kind, find_file
from tryplicity.spec.loader import YamlFile, read_yaml

KEY = "base"
#: of the base, what says nothing of a model that differs from it
NOT_INHERITED = ("expect",)


def with_base(source: YamlFile, seen: tuple[Path, ...] = ()) -> None:
    """Put what the spec's base says under what it says itself: mappings key by key, unless their `type` differs; lists
    and values are replaced. Raises UserError where there is no such spec, or one that is its own base."""
    if KEY not in source.data:
        return
    name = source.data[KEY]

    def refuse(message: str) -> Exception:
        return source.error([Problem((KEY,), message)])

    if not isinstance(name, str):
        raise refuse(f"expected the name of a spec, or a file, got {said(name)}")
    beside = source.folder / name
    try:
        path = beside if beside.is_file() else find_file(name, "spec")
    except UserError as error:
        raise refuse(str(error)) from None
    if path.resolve() in (*seen, Path(source.file).resolve()):
        raise refuse(f"{name} begins with this spec itself, so that there is no first one; leave one base out")
    below = read_yaml(path)
    check_kind(below, "spec")
    with_base(below, (*seen, path.resolve()))
    own = {key: value for key, value in source.data.items() if key != KEY}
    kept = {key: value for key, value in below.data.items() if key not in NOT_INHERITED}
    source.data, source.below = laid_over(kept, own), below


def laid_over(base: Any, change: Any) -> Any:
    """`change` over `base`, key by key; a part of another type replaces the whole part."""
    if isinstance(base, str) and isinstance(change, Mapping):
        base = {"type": base}
    if not (isinstance(base, Mapping) and isinstance(change, Mapping)):
        return change
    if "type" in change and change["type"] != base.get("type"):
        return change
    return {**base, **{key: laid_over(base.get(key), value) for key, value in change.items()}}
