"""Family + name -> component, and from what YAML says to a typed Config: `resolve` checks data against its schema,
collects every problem with its path, and builds the frozen dataclass with the components it holds. Loads no torch."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tryplicity.configs import (
    FREE,
    Path,
    Problem,
    config_schema,
    constructed,
    holds_of,
    missing,
    path_text,
    referencing_schema,
    said,
    value_problems,
)
from tryplicity.errors import PluginFault, UserError, did_you_mean, nearest
from tryplicity.guard import guarded
from tryplicity.names import FOREIGN, NOT_HERE, PROFILE
from tryplicity.parts import OWNERS, Component, Part


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
        problems += missing(data, config_class, path, unknown)
        values = {}
        for field in dataclasses.fields(config_class):
            name, here = field.name, (*path, field.name)
            holds = holds_of(config_class, field)
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
        return constructed(config_class, values, path, problems) if len(problems) == before else None

    def _unknown(self, key: str, config_class: type) -> str:
        """What to say of a key that is no option here: what it is called here, or where it belongs."""
        known = [field.name for field in dataclasses.fields(config_class)]
        ours = FOREIGN.get(key, key)
        owners = [f"{c.family} {c.name}" for c in self.components() if ours in c.Config.__dataclass_fields__]
        lists = {field.name for field in dataclasses.fields(config_class)
                 if (holds := holds_of(config_class, field)) and holds.many}
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
            holds = holds_of(config_class, field)
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
            schema["description"] = inspect.cleandoc(component.__doc__ or "")
            defs[f"{component.family}.{component.name}"] = schema
        return defs
