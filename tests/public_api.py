"""The public surface, as text: what `tryplicity` exports, the methods of the base classes, the hooks, and the kit.

`python -m tests.public_api` records it in tests/public_api.txt; a test compares. What goes or changes there breaks
somebody's plugin: it is announced first, with a DeprecationWarning for a release, and API_VERSION goes up.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tryplicity
from tryplicity import hookspecs, testing
from tryplicity.components.module import Module

RECORD = Path(__file__).with_name("public_api.txt")


def surface() -> str:
    lines = [f"API version {tryplicity.API_VERSION}"]
    for name in sorted(tryplicity.__all__):
        lines += list(_of(name, getattr(tryplicity, name)))
    lines += list(_of("Module", Module))  # what every component that is a torch module inherits
    for name, hook in sorted(vars(hookspecs).items()):
        if name.startswith("tryplicity_"):
            lines.append(f"hook {name}{_signature(hook)}")
    lines += [f"families of {hook}: {', '.join(families)}" for hook, families in hookspecs.COMPONENT_HOOKS.items()]
    for name in ("check", "findings", "check_layer", "together"):
        lines.append(f"tryplicity.testing.{name}{_signature(getattr(testing, name))}")
    return "\n".join(lines) + "\n"


def _of(name: str, value: Any) -> Iterator[str]:
    if not inspect.isclass(value):
        yield f"{name}{_signature(value)}" if callable(value) else f"{name}: {type(value).__name__}"
        return
    if name in ("Count", "Length") or value.__module__ == "typing":
        yield f"{name}: a type"
        return
    ours = [base.__name__ for base in value.__mro__[1:] if base.__module__.startswith("tryplicity.")]
    yield f"class {name}({', '.join(ours)})"
    if dataclasses.is_dataclass(value):
        yield from (f"  {name}.{field.name}: field" for field in dataclasses.fields(value))
    for key, inner in sorted(vars(value).items()):
        if key.startswith("_") and key != "__init__":
            continue
        plain = inspect.unwrap(getattr(value, key)) if callable(getattr(value, key, None)) else None
        if inspect.isfunction(plain) or inspect.ismethod(plain):
            yield f"  {name}.{key}{_signature(plain)}"
        elif not dataclasses.is_dataclass(value) and not callable(inner):
            yield f"  {name}.{key}"


def _signature(function: Any) -> str:
    """Names, kinds and defaults; annotations are for people."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return ""
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    return re.sub(r" at 0x[0-9a-f]+", "", str(inspect.Signature(bare)))


if __name__ == "__main__":
    RECORD.write_text(surface(), encoding="utf-8")
