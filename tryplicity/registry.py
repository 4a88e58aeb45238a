"""Family + name -> component, and from what YAML says to a typed Config. Loads no torch.

A Config's JSON Schema comes from pydantic; `resolve` checks data against it, collects every problem with its
path, and builds the frozen dataclass with the components it holds.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tryplicity.errors import UserError, did_you_mean
from tryplicity.parts import Component, Part

Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Problem:
    """Something wrong at a path of a YAML file; `at_key`: with the key itself rather than its value."""

    path: Path
    message: str
    at_key: bool = False


def path_text(path: Path) -> str:
    """('layers', 0, 'mixer') -> 'layers[0].mixer'."""
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else str(step)
    return text


@functools.cache
def config_schema(config_class: type) -> dict[str, Any]:
    """The JSON Schema of a Config; components it holds appear as {}."""
    import warnings

    from pydantic import TypeAdapter
    from pydantic.json_schema import PydanticJsonSchemaWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PydanticJsonSchemaWarning)
        schema = adapter(config_class).json_schema()
    schema["additionalProperties"] = False
    for field in dataclasses.fields(config_class):
        if "family" in field.metadata or _nested_config(config_class, field.name):
            schema["properties"][field.name] = {}
    schema.pop("$defs", None)
    return schema


@functools.cache
def adapter(config_class: type) -> Any:
    from pydantic import TypeAdapter

    if "__pydantic_config__" not in vars(config_class):
        config_class.__pydantic_config__ = {"use_attribute_docstrings": True}
    return TypeAdapter(config_class)


@functools.cache
def _hints(config_class: type) -> dict[str, Any]:
    import sys

    scope = {**vars(sys.modules[config_class.__module__])}
    return typing.get_type_hints(config_class, globalns=scope)


def _nested_config(config_class: type, name: str) -> type | None:
    """The plain dataclass a field holds (`training: Training`, `expect: Expect | None`), if it does."""
    hint = _hints(config_class)[name]
    for option in (hint, *typing.get_args(hint)):
        if dataclasses.is_dataclass(option) and option is not Part:
            return option
    return None


_JSON_NAMES = {"integer": "a whole number", "number": "a number", "string": "text", "boolean": "true or false",
               "null": "null", "array": "a list", "object": "a mapping"}


def _said(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "nothing"
    if isinstance(value, str):
        return f"the text {value!r}"
    if isinstance(value, Mapping):
        return "a mapping"
    return "a list" if isinstance(value, list) else str(value)


def _expected(schema: Mapping[str, Any]) -> str:
    options = schema.get("anyOf", [schema])
    names = [_JSON_NAMES.get(o.get("type"), f"one of {', '.join(map(str, o['enum']))}" if "enum" in o else "other")
             for o in options]
    return " or ".join(dict.fromkeys(names))


def schema_problems(data: Any, schema: Mapping[str, Any], path: Path) -> list[Problem]:
    """Everything that `data` breaks of a JSON Schema, in words a person can act on."""
    from jsonschema import Draft202012Validator

    found = []
    for error in Draft202012Validator(schema).iter_errors(data):
        where, value, rule = path + tuple(error.absolute_path), error.instance, error.validator
        if rule == "additionalProperties":
            known = error.schema.get("properties", {})
            for key in value:
                if key not in known:
                    found.append(Problem((*where, key), f"unknown key{did_you_mean(key, known)}", at_key=True))
        elif rule == "required":
            missing = next(k for k in error.validator_value if k not in value and f"'{k}'" in error.message)
            found.append(Problem(where, f"{missing} is missing; it must be given", at_key=True))
        elif rule in ("enum", "const"):
            known = error.validator_value if rule == "enum" else [error.validator_value]
            found.append(Problem(where, f"{value!r} is not one of the choices{did_you_mean(value, map(str, known))}"))
        elif rule in ("type", "anyOf"):
            found.append(Problem(where, f"expected {_expected(error.schema)}, got {_said(value)}"))
        elif rule in ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum"):
            words = {"minimum": "at least", "exclusiveMinimum": "greater than", "maximum": "at most",
                     "exclusiveMaximum": "less than"}
            found.append(Problem(where, f"must be {words[rule]} {error.validator_value:g}, got {value}"))
        else:
            found.append(Problem(where, error.message))
    return found


class Registry:
    """What the installed plugins provide."""

    def __init__(self) -> None:
        self._components: dict[tuple[str, str], type[Component]] = {}
        self._owners: dict[tuple[str, str], str] = {}
        #: one line for each plugin that could not be loaded: told to whoever misses a component
        self.failures: list[str] = []

    def add(self, component: type[Component], owner: str) -> None:
        key = (component.family, component.name)
        if key in self._components:
            raise UserError(f"{component.family} {component.name!r} is provided by both {self._owners[key]} and {owner}")
        self._components[key], self._owners[key] = component, owner

    def remove_owner(self, owner: str) -> None:
        for key in [k for k, o in self._owners.items() if o == owner]:
            del self._components[key], self._owners[key]

    def names(self, family: str) -> list[str]:
        return sorted(name for f, name in self._components if f == family)

    def owner(self, family: str, name: str) -> str:
        return self._owners[family, name]

    def components(self) -> Iterable[type[Component]]:
        return self._components.values()

    def get(self, family: str, name: str) -> type[Component]:
        """Raises UserError naming the nearest, and the plugins that failed to load, if there is none."""
        if (family, name) in self._components:
            return self._components[family, name]
        hint = did_you_mean(name, self.names(family))
        failed = "; not loaded: " + "; ".join(self.failures) if self.failures else ""
        raise UserError(f"no {family} is called {name!r}{hint}{failed}")

    def part(self, family: str, value: Any, site: Any = None) -> Part:
        """A component from what YAML says (`moe`, or `{type: moe, experts: 8}`), defaults filled in.

        Raises UserError with every problem, one a line.
        """
        problems: list[Problem] = []
        part = self.resolve_part(family, value, (), problems, site)
        if problems:
            raise UserError("\n".join(f"{path_text((family, *p.path))}: {p.message}" for p in problems))
        assert part is not None
        return part

    def resolve_part(self, family: str, value: Any, path: Path, problems: list[Problem], site: Any) -> Part | None:
        """As `part`, adding to `problems` instead of raising; None if there were any."""
        if isinstance(value, str):
            name, options, name_path = value, {}, path
        elif isinstance(value, Mapping) and isinstance(value.get("type"), str):
            name, name_path = value["type"], (*path, "type")
            options = {k: v for k, v in value.items() if k != "type"}
        elif isinstance(value, Mapping) and "type" not in value:
            known = self.names(family)
            problems.append(Problem(path, f"type is missing; it says which {family} this is (there are: "
                                          f"{', '.join(known)})", at_key=True))
            return None
        else:
            problems.append(Problem(path, f"expected the name of a {family}, or a mapping with type and options, "
                                          f"got {_said(value)}"))
            return None
        try:
            component = self.get(family, name)
        except UserError as error:
            problems.append(Problem(name_path, str(error)))
            return None
        before = len(problems)
        config = self.resolve(component.Config, options, path, problems, site)
        if len(problems) > before:
            return None
        if site is not None:
            problems += [Problem((*path, *option.split(".")) if option else path, message)
                         for option, message in component.check(config, site)]
        return Part(component, config) if len(problems) == before else None

    def resolve(self, config_class: type, data: Any, path: Path, problems: list[Problem], site: Any = None) -> Any:
        """A Config (frozen dataclass) from plain data, components inside resolved; None if there were problems."""
        before = len(problems)
        if not isinstance(data, Mapping):
            problems.append(Problem(path, f"expected a mapping, got {_said(data)}"))
            return None
        problems += schema_problems(dict(data), config_schema(config_class), path)
        values = {}
        for field in dataclasses.fields(config_class):
            here = (*path, field.name)
            if "family" in field.metadata:
                values[field.name] = self._resolve_field(field, data, here, problems, site)
            elif nested := _nested_config(config_class, field.name):
                raw = data.get(field.name, None if field.default is None else {})
                values[field.name] = None if raw is None else self.resolve(nested, raw, here, problems, site)
            elif field.name in data:
                values[field.name] = data[field.name]
        if len(problems) > before:
            return None
        return adapter(config_class).validate_python(values)

    def _resolve_field(self, field: Any, data: Mapping, here: Path, problems: list[Problem], site: Any) -> Any:
        family, default = field.metadata["family"], field.metadata["default"]
        value = data.get(field.name, default)
        if field.metadata["many"]:
            value = data.get(field.name) or []
            if not isinstance(value, list):
                problems.append(Problem(here, f"expected a list, got {_said(value)}"))
                return ()
            return tuple(self.resolve_part(family, v, (*here, i), problems, site) for i, v in enumerate(value))
        if value is None:
            if not field.metadata["optional"]:
                problems.append(Problem(here[:-1], f"{field.name} is missing; it must be given", at_key=True))
            return None
        return self.resolve_part(family, value, here, problems, site)

    def definitions(self) -> dict[str, Any]:
        """JSON Schema `$defs`: one per family (a name, or a mapping by `type`) and one per component."""
        from tryplicity.components import FAMILIES

        defs: dict[str, Any] = {}
        for family in FAMILIES:
            names = self.names(family)
            rules = [{"if": {"type": "object", "properties": {"type": {"const": n}}, "required": ["type"]},
                      "then": {"$ref": f"#/$defs/{family}.{n}"}} for n in names]
            defs[family] = {"type": ["string", "object"], "allOf": [
                {"if": {"type": "string"}, "then": {"enum": names}},
                {"if": {"type": "object"}, "then": {"required": ["type"], "properties": {"type": {"enum": names}}}},
                *rules]}
        for component in self.components():
            schema = referencing_schema(component.Config)
            schema["properties"] = {"type": {"const": component.name}, **schema.get("properties", {})}
            schema["description"] = (component.__doc__ or "").strip()
            defs[f"{component.family}.{component.name}"] = schema
        return defs


def referencing_schema(config_class: type) -> dict[str, Any]:
    """A Config's schema in which the components it holds refer to their family's definition."""
    schema = {**config_schema(config_class)}
    schema["properties"] = dict(schema.get("properties", {}))
    for field in dataclasses.fields(config_class):
        nested = _nested_config(config_class, field.name)
        if "family" in field.metadata:
            ref = {"$ref": f"#/$defs/{field.metadata['family']}"}
            if field.metadata["many"]:
                ref = {"type": "array", "items": ref}
            schema["properties"][field.name] = {"anyOf": [ref, {"type": "null"}]} if field.metadata["optional"] else ref
            if not (field.metadata["optional"] or field.metadata["many"]) and field.metadata["default"] is None:
                schema["required"] = [*schema.get("required", []), field.name]
        elif nested:
            schema["properties"][field.name] = referencing_schema(nested)
    schema.pop("title", None)
    return schema
