"""From what a user names as data (`--data`, `phases[].data`) to a source, checked. Loads no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tryplicity.errors import UserError, did_you_mean
from tryplicity.spec.installed import is_there
from tryplicity.spec.loader import parse_value

if TYPE_CHECKING:
    from tryplicity.parts import Part
    from tryplicity.registry import Registry


def source_value(registry: Registry, value: Any, option: str, folder: Path | None = None) -> Any:
    """The source that `value` names, as a spec would: a name, or a mapping with `type` and options.

    `python-docs`: a source by its name. `files:path`: a source and its first option. `{type: files, path: x}`: a
    mapping, or YAML of one. Anything else: what is at a path of the disk, for the source that reads paths. option:
    where the user said it, for messages. folder: what relative paths count from, so that they come out absolute;
    None: they stay as they are. Raises UserError when it is none of these.
    """
    if not isinstance(value, str):
        return _placed(registry, value, folder)
    names = registry.names("source")
    if value.lstrip().startswith("{"):
        try:
            return _placed(registry, parse_value(value, ""), folder)
        except UserError as error:
            reason = "; ".join(line.lstrip(":") for line in str(error).splitlines())
            raise UserError(f"{option} {value}: not a YAML mapping ({reason}); write it as "
                            "'{type: files, path: folder}'") from None
    if value in names:
        return value
    name, colon, rest = value.partition(":")
    if colon and name in names:
        options = _options(registry, name)
        if not options or not rest:
            raise UserError(f"{option} {value}: write {name} alone" if not options else
                            f"{option} {value}: {options[0]} is missing; write {name}:{options[0].upper()}")
        return _placed(registry, {"type": name, options[0]: rest}, folder)
    path = (folder or Path()) / Path(value).expanduser()
    if "path" in registry.purposes("source") and value and is_there(path):
        reader = registry.default("source", "path")
        return _placed(registry, {"type": reader, _options(registry, reader)[0]: value}, folder)
    raise UserError(f"{option} {value}: no such file or folder, and no source of that name{did_you_mean(name, names)}")


def source_part(registry: Registry, value: Any, option: str) -> Part:
    """`source_value`, resolved. Raises UserError for options that it does not have, too."""
    return registry.part("source", source_value(registry, value, option))


def _options(registry: Registry, name: str) -> list[str]:
    return [field.name for field in dataclasses.fields(registry.get("source", name).Config)]


def _placed(registry: Registry, mapping: Any, folder: Path | None) -> Any:
    """A mapping whose source reads a path, its first option, with that path counted from the folder."""
    name = mapping.get("type") if isinstance(mapping, Mapping) else None
    if folder is None or name not in registry.names("source"):
        return mapping
    key = next(iter(_options(registry, name)), None)
    if "path" not in registry.get("source", name).default_for or not isinstance(mapping.get(key), str):
        return mapping
    return {**mapping, key: str(folder / Path(mapping[key]).expanduser())}
