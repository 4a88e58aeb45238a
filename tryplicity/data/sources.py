"""From what a user gives as --data to a source. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tryplicity.spec import source_part

if TYPE_CHECKING:
    from tryplicity.components import Source
    from tryplicity.registry import Registry


def parse_source(registry: Registry, text: str | Mapping[str, Any], option: str = "--data") -> Source:
    """The source that `text` names, as `source_part` reads it. option: where the user said it, for messages."""
    return source_part(registry, text, option).build()
