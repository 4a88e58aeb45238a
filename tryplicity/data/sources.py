"""From what a user gives as --data to a source. Loads no torch."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tryplicity.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from tryplicity.components import Source
    from tryplicity.registry import Registry


def parse_source(registry: Registry, text: str | Mapping[str, Any], option: str = "--data") -> Source:
    """The source that `text` names. option: where the user said it, for messages.

    `python-docs`: a source by its name. `files:path`: a source and its first option.
    `{type: files, path: x}`: a mapping as YAML, or a mapping itself. Anything else: the path of a folder or
    file. Raises UserError when it is none of these.
    """
    if isinstance(text, Mapping):
        return registry.part("source", dict(text)).build()
    names = registry.names("source")
    if text.lstrip().startswith("{"):
        from tryplicity.spec import parse_value

        try:
            mapping = parse_value(text, "")
        except UserError as error:
            reason = "; ".join(line.lstrip(":") for line in str(error).splitlines())
            raise UserError(f"{option} {text}: not a YAML mapping ({reason}); write it as "
                            "'{type: files, path: folder}'") from None
        return registry.part("source", mapping).build()
    if text in names:
        return registry.part("source", text).build()
    name, colon, rest = text.partition(":")
    if colon and name in names:
        options = dataclasses.fields(registry.get("source", name).Config)
        if not options or not rest:
            raise UserError(f"{option} {text}: write {name} alone" if not options else
                            f"{option} {text}: {options[0].name} is missing; write "
                            f"{name}:{options[0].name.upper()}")
        return registry.part("source", {"type": name, options[0].name: rest}).build()
    if "files" in names and os.path.exists(os.path.expanduser(text)):
        return registry.part("source", {"type": "files", "path": text}).build()
    raise UserError(f"{option} {text}: no such file or folder, and no source of that "
                    f"name{did_you_mean(name, names)}")
