"""A Config: its JSON Schema, which comes from pydantic, and what is wrong with what YAML says of it, in words. Loads no
torch."""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass
from typing import Any

from tryplicity.errors import UserError, did_you_mean, nearest
from tryplicity.names import FOREIGN
from tryplicity.parts import Holds, Part

Path = tuple[str | int, ...]

FREE = "x-"  # what a key at the top of a file begins with that is nobody's: a place for anchors and notes


@dataclass(frozen=True)
class Problem:
    """Something wrong at a path of a YAML file; `at_key`: with the key itself rather than its value; `fault`: with the
    component that was asked about it, not with the file."""

    path: Path
    message: str
    at_key: bool = False
    fault: bool = False


def path_text(path: Path) -> str:
    """('layers', 0, 'mixer') -> 'layers[0].mixer'."""
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else str(step)
    return text


# --- what a Config declares ---

@functools.cache
def adapter(config_class: type) -> Any:
    """pydantic's validator of a Config. A Config pydantic cannot read raises whatever pydantic raises."""
    from pydantic import TypeAdapter

    if "__pydantic_config__" not in vars(config_class):
        config_class.__pydantic_config__ = {"use_attribute_docstrings": True, "allow_inf_nan": False}
    return TypeAdapter(config_class)


@functools.cache
def config_schema(config_class: type) -> dict[str, Any]:
    """The JSON Schema of a Config; the components and Configs it holds keep only their description."""
    import warnings

    from pydantic.json_schema import PydanticJsonSchemaWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PydanticJsonSchemaWarning)  # a Part has no JSON form as a default
        schema = adapter(config_class).json_schema()
    definitions, properties = schema.get("$defs", {}), {}
    for field in dataclasses.fields(config_class):
        own = schema["properties"][field.name]
        if holds_of(config_class, field):
            own = {"description": own["description"]} if "description" in own else {}
        properties[field.name] = _inlined(own, definitions)
    return {"type": "object", "properties": properties, "required": _required(config_class),
            "additionalProperties": False}


def _inlined(schema: Any, definitions: Mapping[str, Any]) -> Any:
    """A schema without references and without the titles pydantic makes of names."""
    if isinstance(schema, list):
        return [_inlined(s, definitions) for s in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        schema = definitions[schema["$ref"].rpartition("/")[2]] | schema
    return {k: _inlined(v, definitions) for k, v in schema.items()
            if k != "$ref" and not (k == "title" and isinstance(v, str))}


def _required(config_class: type) -> list[str]:
    """Options without a default."""

    def needed(field: dataclasses.Field) -> bool:
        if holds := field.metadata.get("holds"):
            return holds.default is None and not holds.optional and not holds.many
        return field.default is MISSING and field.default_factory is MISSING

    return [field.name for field in dataclasses.fields(config_class) if needed(field)]


@functools.cache
def _hints(config_class: type) -> dict[str, Any]:
    return typing.get_type_hints(config_class)


def holds_of(config_class: type, field: dataclasses.Field) -> Holds | None:
    """What a field holds that is resolved on its own; None if its values are plain."""
    if "holds" in field.metadata:
        return field.metadata["holds"]
    hint = _hints(config_class)[field.name]  # `Training`, `Expect | None` or `list[Stage]`
    for option in (hint, *typing.get_args(hint)):
        if dataclasses.is_dataclass(option) and option is not Part:
            return Holds(option, many=typing.get_origin(hint) in (list, tuple),
                         optional=type(None) in typing.get_args(hint),
                         default={} if field.default_factory is option else None)
    return None


def check_config(config_class: type, families: Iterable[str]) -> None:
    """Raise UserError for faults of a Config that would otherwise show only when a spec uses it."""
    if not getattr(vars(config_class).get("__dataclass_params__"), "frozen", False):
        raise UserError(f"{config_class.__qualname__} must be a dataclass marked @dataclass(frozen=True)")
    for field in dataclasses.fields(config_class):
        hint, label = _hints(config_class)[field.name], f"{config_class.__qualname__}.{field.name}"
        if holds := field.metadata.get("holds"):
            for family in holds.what.split("|"):
                if family not in families:
                    hint = did_you_mean(family, families)
                    raise UserError(f"{label} uses an unknown family {family!r}{hint}")
        elif Part in (hint, *typing.get_args(hint)):
            raise UserError(f"{label} holds a component: declare it as `{field.name}: Part = uses(...)`")


def referencing_schema(config_class: type, kind: str = "") -> dict[str, Any]:
    """A Config's schema in which the components it holds refer to their family's definition. kind: ".change" for what
    need not be whole."""
    schema = config_schema(config_class)
    properties = dict(schema["properties"])
    for field in dataclasses.fields(config_class):
        if (holds := holds_of(config_class, field)) is None:
            continue
        what = holds.what
        if isinstance(what, str):
            families = [{"$ref": f"#/$defs/{family}{kind}"} for family in what.split("|")]
            entry = families[0] if len(families) == 1 else {"anyOf": families}
        else:
            entry = referencing_schema(what, kind)
        entry = {"type": "array", "items": entry} if holds.many else entry
        entry = {"anyOf": [entry, {"type": "null"}]} if holds.optional else entry
        default = {} if holds.default is None else {"default": holds.default}
        properties[field.name] = {**entry, **properties[field.name], **default}
    return {**schema, "properties": properties}


# --- problems in words ---

def said(value: Any) -> str:
    """A value of a YAML file as a message names it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "nothing"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    text = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
    return f"the text {text}" if isinstance(value, str) else text


_NOUNS = {"integer": "a whole number", "number": "a number", "string": "text", "boolean": "true or false",
          "null": "null", "array": "a list", "object": "a mapping"}


def wanted(schema: Mapping[str, Any]) -> str:
    """What a schema accepts: 'a whole number of at least 1'."""
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(wanted(option) for option in schema["anyOf"]))
    if "enum" in schema or "const" in schema:
        choices = schema.get("enum", [schema.get("const")])
        return ("one of " if len(choices) > 1 else "") + ", ".join(map(str, choices))
    noun = _NOUNS.get(schema.get("type"), "a value")
    low, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    if above is not None and schema.get("type") == "integer":
        low, above = int(above) + 1, None
    low = schema.get("minLength", schema.get("minItems")) if low is None else low
    high = schema.get("maxLength", schema.get("maxItems", schema.get("maximum")))
    unit = {"text": " character(s)", "a list": " element(s)"}.get(noun, "")
    both = low is not None and high is not None
    below = schema.get("exclusiveMaximum")
    limits = [f"from {_figure(low)} to {_figure(high)}{unit}" if both else "",
              f"of at least {_figure(low)}{unit}" if low is not None and not both else "",
              f"greater than {_figure(above)}" if above is not None else "",
              f"of at most {_figure(high)}{unit}" if high is not None and not both else "",
              f"less than {_figure(below)}" if below is not None else ""]
    return " ".join([noun, " and ".join(limit for limit in limits if limit)]).strip()


def _figure(number: float) -> str:
    return f"{number:,}" if isinstance(number, int) else f"{number:g}"


_WORDED = {"type", "anyOf", "enum", "const", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum",
           "minLength", "maxLength", "minItems", "maxItems"}


def value_problems(value: Any, schema: Mapping[str, Any], path: Path) -> list[Problem]:
    """Everything that a value breaks of a JSON Schema, in words a person can act on."""
    from jsonschema import Draft202012Validator

    def leaves(errors: Iterable[Any]) -> Iterator[Any]:
        for error in errors:
            branches: dict[Any, list[Any]] = {}
            for inner in error.context or ():
                branches.setdefault(inner.schema_path[0], []).append(inner)
            # of several alternatives, the one that fits but for something inside it is the one that was meant
            inside = next((b for b in branches.values() if all(e.path for e in b)), None)
            yield from leaves(inside) if inside else (error,)

    found = []
    for error in leaves(Draft202012Validator(schema).iter_errors(value)):
        message = error.message
        if error.validator in _WORDED:
            message = f"expected {wanted(error.schema)}, got {said(error.instance)}"
        if error.validator == "enum" and (near := nearest(error.instance, map(str, error.validator_value))):
            message += f" (did you mean {near}?)"
        found.append(Problem((*path, *error.absolute_path), message))
    return list(dict.fromkeys(found))  # infinity is no whole number and too large, which is one thing to say


def missing(data: Mapping, config_class: type, path: Path, unknown: Iterable[str]) -> list[Problem]:
    """Missing keys, unless an unknown one is a missing one misspelt, or called as others call it."""
    known = [field.name for field in dataclasses.fields(config_class)]
    meant = {FOREIGN.get(key) or nearest(key, known) for key in unknown}
    found = []
    for name in known:
        if name in _required(config_class) and name not in data and name not in meant:
            schema = config_schema(config_class)["properties"][name]
            wish = f" ({wanted(schema)})" if "type" in schema or "anyOf" in schema or "enum" in schema else ""
            found.append(Problem(path, f"{name} is missing; add it{wish}", at_key=True))
    return found


def constructed(config_class: type, values: dict[str, Any], path: Path, problems: list[Problem]) -> Any:
    """The Config itself; what only pydantic or a `__post_init__` can see becomes problems."""
    from pydantic import ValidationError

    try:
        return adapter(config_class).validate_python(values)
    except ValidationError as error:
        for fault in error.errors():
            got = f", got {said(fault['input'])}" if fault["loc"] else ""
            problems.append(Problem((*path, *fault["loc"]), fault["msg"].removeprefix("Value error, ") + got))
        return None
