"""Family + name -> component, and from what YAML says to a typed Config. Loads no torch.

A Config's JSON Schema comes from pydantic; `resolve` checks data against it, collects every problem with its
path, and builds the frozen dataclass with the components it holds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass
from typing import Any

from tryplicity.errors import PluginFault, UserError, did_you_mean, nearest
from tryplicity.guard import guarded
from tryplicity.names import FOREIGN, NOT_HERE, PROFILE
from tryplicity.parts import OWNERS, Component, Holds, Part

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
        if _holds(config_class, field):
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


def _holds(config_class: type, field: dataclasses.Field) -> Holds | None:
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


def _missing(data: Mapping, config_class: type, path: Path, unknown: Iterable[str]) -> list[Problem]:
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


# --- the registry ---

class Registry:
    """What the installed plugins provide."""

    def __init__(self) -> None:
        self._components: dict[tuple[str, str], type[Component]] = {}
        self._owners: dict[tuple[str, str], str] = {}
        #: one line for each plugin that could not be loaded: told to whoever misses a component
        self.failures: list[str] = []

    def add(self, component: type[Component], owner: str) -> None:
        """Raises UserError naming both owners if the name is taken."""
        self.add_all([component], owner)

    def add_all(self, components: Iterable[type[Component]], owner: str) -> None:
        """All of an owner's components, or none: raises UserError if one of the names is taken."""
        new: dict[tuple[str, str], type[Component]] = {}
        for component in components:
            key = (component.family, component.name)
            if key in self._components or key in new:
                first = self._owners.get(key, owner)
                raise UserError(f"{key[0]} {key[1]!r} is provided by both {first} and {owner}")
            new[key] = component
        self._components |= new
        self._owners |= dict.fromkeys(new, owner)
        OWNERS.update(dict.fromkeys(new.values(), owner))

    def names(self, family: str) -> list[str]:
        """The components of a family, or of several (`brain|objective`)."""
        return sorted(name for f, name in self._components if f in family.split("|"))

    def owner(self, family: str, name: str) -> str:
        return self._owners[family, name]

    def components(self) -> Iterable[type[Component]]:
        return self._components.values()

    def purposes(self, family: str) -> set[str]:
        """What there is a default for."""
        return {purpose for c in self.components() if c.family == family for purpose in c.default_for}

    def default(self, family: str, purpose: str) -> str:
        """The component that is taken for a purpose where the user names none. Raises UserError if there is none."""
        for (own, name), component in self._components.items():
            if own == family and purpose in component.default_for:
                return name
        raise UserError(f"no {family} is meant for {purpose}: name one (there are: {', '.join(self.names(family))})")

    def get(self, family: str, name: str) -> type[Component]:
        """Raises UserError naming the nearest, and the plugins that failed to load, if there is none."""
        for one in family.split("|"):
            if (one, name) in self._components:
                return self._components[one, name]
        hint = did_you_mean(name, self.names(family))
        failed = "; not loaded: " + "; ".join(self.failures) if self.failures else ""
        raise UserError(f"no {family.replace('|', ' or ')} is called {name!r}{hint}{failed}")

    def part(self, family: str, value: Any, site: Any = None) -> Part:
        """A component from what YAML says (`moe`, or `{type: moe, experts: 8}`), defaults filled in.

        Raises UserError with every problem, one a line.
        """
        problems: list[Problem] = []
        part = self.resolve_part(family, value, (), problems, site)
        if problems:
            kind = PluginFault if all(p.fault for p in problems) else UserError
            raise kind("\n".join(f"{path_text((family, *p.path))}: {p.message}" for p in problems))
        assert part is not None
        return part

    def resolve_part(self, family: str, value: Any, path: Path, problems: list[Problem],
                     site: Any = None) -> Part | None:
        """As `part`, adding to `problems` instead of raising; None if there were any.

        With a `site`, the component's own `check` is asked too.
        """
        known, kind = f" (there are: {', '.join(self.names(family))})", family.replace("|", " or ")
        fault = None
        if isinstance(value, str):
            name, options, name_path = value, {}, path
        elif not isinstance(value, Mapping):
            fault = Problem(path, f"expected the name of a {kind}, or a mapping with type and options, "
                                  f"got {said(value)}{known}")
        elif isinstance(value.get("type"), str):
            name, name_path = value["type"], (*path, "type")
            options = {k: v for k, v in value.items() if k != "type"}
        elif "type" in value:
            given = said(value["type"])
            fault = Problem((*path, "type"), f"expected the name of a {kind}, got {given}{known}")
        elif misspelt := next((key for key in value if nearest(key, ["type"])), None):
            fault = Problem((*path, misspelt), "unknown key (did you mean type?)", at_key=True)
        else:
            fault = Problem(path, f"type is missing; it says which {kind} this is{known}", at_key=True)
        if fault:
            problems.append(fault)
            return None
        try:
            component = self.get(family, name)
        except UserError as error:
            problems.append(Problem(name_path, str(error)))
            return None
        before = len(problems)
        try:
            with guarded(component):
                config = self.resolve(component.Config, options, path, problems, site)
                if len(problems) == before and site is not None:
                    problems += [Problem((*path, *(int(step) if step.isdecimal() else step
                                                   for step in option.split("."))) if option else path, message)
                                 for option, message in component.check(config, site)]
        except PluginFault as error:  # it must not end the check of the whole file
            problems.append(Problem(path, str(error), fault=True))
        return Part(component, config) if len(problems) == before else None

    def resolve(self, config_class: type, data: Any, path: Path, problems: list[Problem],
                site: Any = None) -> Any:
        """A Config (frozen dataclass) from plain data, what it holds resolved; None if it has problems."""
        before = len(problems)
        if not isinstance(data, Mapping):
            problems.append(Problem(path, f"expected a mapping, got {said(data)}"))
            return None
        own = {field.name for field in dataclasses.fields(config_class)}
        unknown = [key for key in data if key not in own and (path or not key.startswith(FREE))]
        problems += [Problem((*path, key), self._unknown(key, config_class), at_key=True) for key in unknown]
        problems += _missing(data, config_class, path, unknown)
        values = {}
        for field in dataclasses.fields(config_class):
            name, here = field.name, (*path, field.name)
            holds = _holds(config_class, field)
            if name not in data and (holds is None or holds.default is None):
                continue  # the dataclass has its default, or it is among the missing keys
            if holds is None:
                values[name] = data[name]
                problems += value_problems(data[name], config_schema(config_class)["properties"][name], here)
                continue
            value = data.get(name, holds.default)
            resolve = self.resolve_part if isinstance(holds.what, str) else self.resolve
            if value is None and holds.optional:
                values[name] = None
            elif not holds.many:
                values[name] = resolve(holds.what, value, here, problems, site)
            elif isinstance(value, list):
                values[name] = [resolve(holds.what, entry, (*here, i), problems, site)
                                for i, entry in enumerate(value)]
            else:
                problems.append(Problem(here, f"expected a list, got {said(value)}"))
        return _constructed(config_class, values, path, problems) if len(problems) == before else None

    def _unknown(self, key: str, config_class: type) -> str:
        """What to say of a key that is no option here: what it is called here, or where it belongs."""
        known = [field.name for field in dataclasses.fields(config_class)]
        ours = FOREIGN.get(key, key)
        owners = [f"{c.family} {c.name}" for c in self.components() if ours in c.Config.__dataclass_fields__]
        lists = {field.name for field in dataclasses.fields(config_class)
                 if (holds := _holds(config_class, field)) and holds.many}
        if ours in known and not (ours in lists and owners):  # `heads` are two things
            return f"unknown key (did you mean {ours}?)"
        if key in NOT_HERE and not any(key in c.Config.__dataclass_fields__ for c in self.components()):
            return f"unknown key: {NOT_HERE[key]}"
        if ours != key or not nearest(key, known):
            if inside := next(self._inside(ours, config_class), None):
                return f"unknown key (did you mean {inside}?)"
            if owners:
                more = " and others" if len(owners) > 3 else ""
                return f"unknown key: {ours} is an option of {', '.join(owners[:3])}{more}"
            if ours in PROFILE:
                return f"unknown key: {ours} stands in the hardware profile; --set hardware.{ours}=... changes it"
        return f"unknown key{did_you_mean(key, known)}"

    def _inside(self, option: str, config_class: type, depth: int = 2) -> Iterator[str]:
        """Dotted paths of an option in what a Config holds: `training.optimizer.learning_rate`."""
        for field in dataclasses.fields(config_class):
            holds = _holds(config_class, field)
            if holds is None or holds.many or not depth:
                continue
            inner = [holds.what] if isinstance(holds.what, type) else [
                c.Config for c in self.components() if c.family in holds.what.split("|")]
            for one in inner:
                names = {own.name for own in dataclasses.fields(one)}
                if option in names:
                    yield f"{field.name}.{option}"
                yield from (f"{field.name}.{path}" for path in self._inside(option, one, depth - 1))

    def _change(self, family: str, names: list[str]) -> dict[str, Any]:
        """What `overrides` may say of a part of this family: another part, or some options of the one that is there,
        whichever that is."""
        options: dict[str, list[dict[str, Any]]] = {}
        for component in self.components():
            if component.family == family:
                with contextlib.suppress(Exception):  # a Config that pydantic cannot read
                    for name, schema in referencing_schema(component.Config, ".change")["properties"].items():
                        known = options.setdefault(name, [])
                        known += [] if schema in known else [schema]
        properties = {name: known[0] if len(known) == 1 else {"anyOf": known} for name, known in options.items()}
        return {"anyOf": [{"type": "string", "enum": names},
                          {"type": "object", "properties": {"type": {"enum": names}, **properties},
                           "additionalProperties": False}]}

    def definitions(self) -> dict[str, Any]:
        """JSON Schema `$defs`: one per family (a name, or a mapping by `type`) and one per component."""
        from tryplicity.components import FAMILIES

        defs: dict[str, Any] = {}
        for family in FAMILIES:
            names = self.names(family)
            rules = [{"if": {"type": "object", "properties": {"type": {"const": n}}, "required": ["type"]},
                      "then": {"$ref": f"#/$defs/{family}.{n}"}} for n in names]
            # `properties` once more, outside of the conditions: editors complete what stands there
            defs[family] = {"type": ["string", "object"], "properties": {"type": {"enum": names}}, "allOf": [
                {"if": {"type": "string"}, "then": {"enum": names}},
                {"if": {"type": "object"},
                 "then": {"required": ["type"], "properties": {"type": {"enum": names}}}},
                *rules]}
            defs[f"{family}.change"] = self._change(family, names)
        for component in self.components():
            try:
                schema = referencing_schema(component.Config)
            except Exception:  # a Config that pydantic cannot read: a spec that uses it is told
                schema = {"type": "object"}
            schema["properties"] = {"type": {"const": component.name}, **schema.get("properties", {})}
            schema["description"] = (component.__doc__ or "").strip()
            defs[f"{component.family}.{component.name}"] = schema
        return defs


def _constructed(config_class: type, values: dict[str, Any], path: Path, problems: list[Problem]) -> Any:
    """The Config itself; what only pydantic or a `__post_init__` can see becomes problems."""
    from pydantic import ValidationError

    try:
        return adapter(config_class).validate_python(values)
    except ValidationError as error:
        for fault in error.errors():
            got = f", got {said(fault['input'])}" if fault["loc"] else ""
            problems.append(Problem((*path, *fault["loc"]), fault["msg"].removeprefix("Value error, ") + got))
        return None


def referencing_schema(config_class: type, kind: str = "") -> dict[str, Any]:
    """A Config's schema in which the components it holds refer to their family's definition. kind: ".change" for what
    need not be whole."""
    schema = config_schema(config_class)
    properties = dict(schema["properties"])
    for field in dataclasses.fields(config_class):
        if (holds := _holds(config_class, field)) is None:
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
