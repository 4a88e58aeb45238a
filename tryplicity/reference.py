"""What there is to write in a spec, a profile or a recipe, in words: one row an option, out of the JSON Schemas."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from tryplicity.configs import config_schema, referencing_schema
from tryplicity.registry import Registry


class Option(NamedTuple):
    name: str
    values: str  # what it may be: "1 to 65536", "sigmoid or softmax", "a mixer"
    default: str  # as YAML; "" where it must be given
    meaning: str


def options(config_class: type) -> list[Option]:
    """The options that a Config declares, in its order."""
    schema, needed = referencing_schema(config_class), config_schema(config_class)["required"]
    return [Option(name, _values(own), "" if name in needed else _default(own),
                   " ".join(own.get("description", "").split()))
            for name, own in schema["properties"].items()]


def described(component: type) -> str:
    """The component's docstring, one line a paragraph."""
    text = inspect.cleandoc(component.__doc__ or "")
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))


def by_family(registry: Registry) -> dict[str, list[type]]:
    """All components, by family in the order of the contract, each sorted by name."""
    from tryplicity.components import FAMILIES

    return {family: [registry.get(family, name) for name in sorted(names)]
            for family in FAMILIES if (names := registry.names(family))}


def _default(schema: dict[str, Any]) -> str:
    if "default" in schema:
        return _yaml(schema["default"])
    return {"array": "[]", "object": "{}"}.get(schema.get("type", ""), "null")


def _yaml(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _values(schema: dict[str, Any]) -> str:
    """What a JSON Schema admits, in words."""
    if "enum" in schema or "const" in schema:
        return _either([_yaml(value) for value in schema.get("enum", [schema.get("const")])])
    if "$ref" in schema:
        return _a(schema["$ref"].rpartition("/")[2].removesuffix(".change"))
    if alternatives := schema.get("anyOf") or schema.get("oneOf"):
        return _either(list(dict.fromkeys(_values(inner) for inner in alternatives)))
    kind = schema.get("type", "anything")
    if kind == "array":
        return f"a list: {_values(schema['items'])}" if schema.get("items") else "a list"
    if kind == "object":
        own = schema.get("properties")
        return "{" + ", ".join(own) + "}" if own else "a mapping"
    if kind in ("integer", "number"):
        return " ".join(filter(None, ["a whole number" if kind == "integer" else "a number", _bounds(schema)]))
    return {"boolean": "true or false", "string": "text", "null": "null"}.get(kind, str(kind))


def _bounds(schema: dict[str, Any]) -> str:
    low, over = schema.get("minimum"), schema.get("exclusiveMinimum")
    high, under = schema.get("maximum"), schema.get("exclusiveMaximum")
    least = f"from {_number(low)}" if low is not None else f"above {_number(over)}" if over is not None else ""
    most = f"to {_number(high)}" if high is not None else f"below {_number(under)}" if under is not None else ""
    return f"{least} {most}".strip()


def _number(value: float) -> str:
    power = int(value).bit_length() - 1
    return f"2^{power}" if power > 10 and value == 2**power else f"{value:g}"


def _a(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def _either(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def lines(component: type) -> Iterator[str]:
    """A component in plain text, for a terminal."""
    yield f"{component.family} {component.name}"
    yield described(component)
    for option in options(component.Config):
        default = "must be given" if option.default == "" else f"by default {option.default}"
        yield f"  {option.name}: {option.values}; {default}"
        if option.meaning:
            yield f"      {option.meaning}"
