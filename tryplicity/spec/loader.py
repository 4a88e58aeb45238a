"""YAML with the line and column of every key and value. Loads no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tryplicity.errors import UserError
from tryplicity.registry import Problem, path_text
from tryplicity.registry import Path as Keys


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 9.4e9 as a number (YAML 1.1 wants 9.4e+9) and on/off/yes/no as text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in
            ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|false|False)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.[0-9]+"
               r"(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf)|\.(?:nan|NaN))$"), list("-+0123456789."))


@dataclass
class Source:
    """A YAML file as plain data, with where each part of it stands."""

    file: str
    data: Any
    keys: dict[Keys, tuple[int, int]] = field(default_factory=dict)  # path -> line and column of its key
    values: dict[Keys, tuple[int, int]] = field(default_factory=dict)  # path -> line and column of its value
    settings: dict[Keys, str] = field(default_factory=dict)  # paths given on the command line -> how

    def place(self, problem: Problem) -> str:
        """'file:line:column' of a problem, or of the nearest thing around it that stands in the file."""
        for end in range(len(problem.path), -1, -1):
            path = problem.path[:end]
            if path in self.settings:
                return f"--set {self.settings[path]}"
            exact = end == len(problem.path)
            marks = (self.keys, self.values) if problem.at_key or not exact else (self.values, self.keys)
            for table in marks:
                if path in table:
                    line, column = table[path]
                    return f"{self.file}:{line}:{column}"
        return f"{self.file}:1:1"

    def error(self, problems: list[Problem]) -> UserError:
        """All problems, in the order of the file, one a line."""

        def order(problem: Problem) -> tuple:
            parts = self.place(problem).rsplit(":", 2)
            return tuple(int(p) for p in parts[1:]) if len(parts) == 3 and parts[1].isdigit() else (1 << 30, 0)

        lines = [f"{self.place(p)}: {path_text(p.path)}: {p.message}" if p.path else f"{self.place(p)}: {p.message}"
                 for p in sorted(dict.fromkeys(problems), key=order)]
        return UserError("\n".join(lines))


def read_yaml(path: str | Path) -> Source:
    """Raises UserError for a missing or unreadable file, broken YAML, and duplicate keys (all of these at once)."""
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: this is a folder; a YAML file is wanted") from None
    except UnicodeDecodeError as error:
        line = error.object[:error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}:1: not UTF-8 text (byte {error.object[error.start]:#04x}); save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, file: str) -> Source:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        source = Source(file, None)
        problems: list[Problem] = []
        source.data = None if node is None else _plain(loader, node, (), source, problems, ())
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{file}:{mark.line + 1}:{mark.column + 1}" if mark else file
        what = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
        context = f" ({error.context})" if getattr(error, "context", None) else ""
        raise UserError(f"{place}: not valid YAML: {what}{context}") from None
    finally:
        loader.dispose()
    if problems:
        raise source.error(problems)
    if not isinstance(source.data, Mapping):
        got = "the file is empty" if source.data is None else f"got {type(source.data).__name__}"
        raise UserError(f"{file}:1:1: expected a mapping of keys to values; {got}")
    return source


def _plain(loader: _Loader, node: yaml.Node, path: Keys, source: Source, problems: list[Problem],
           above: tuple[yaml.Node, ...]) -> Any:
    """A node as plain data; marks and duplicate keys are noted on the way."""
    if node in above:
        problems.append(Problem(path, "an anchor that contains itself"))
        return None
    above = (*above, node)
    source.values.setdefault(path, (node.start_mark.line + 1, node.start_mark.column + 1))
    if isinstance(node, yaml.SequenceNode):
        return [_plain(loader, child, (*path, i), source, problems, above) for i, child in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        return loader.construct_object(node)
    own = [pair for pair in node.value if pair[0].tag != "tag:yaml.org,2002:merge"]
    data: dict[Any, Any] = {}
    for key_node, value_node in own:
        key = loader.construct_object(key_node) if isinstance(key_node, yaml.ScalarNode) else None
        key = str(key) if isinstance(key, int) and not isinstance(key, bool) else key
        here = (*path, key)
        mark = (key_node.start_mark.line + 1, key_node.start_mark.column + 1)
        if not isinstance(key, str):
            source.values[here] = source.keys[here] = mark
            problems.append(Problem(here, "a key must be text", at_key=True))
            continue
        if key in data:
            first = source.keys[here][0]
            source.keys[here] = mark
            problems.append(Problem(here, f"duplicate key: it stands already on line {first}", at_key=True))
            continue
        source.keys[here] = mark
        data[key] = _plain(loader, value_node, here, source, problems, above)
    for key_node, value_node in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            merged = value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
            for child in merged:
                inherited = _plain(loader, child, path, source, problems, above)
                if isinstance(inherited, dict):
                    data = {**inherited, **data}
    return data


def apply_settings(source: Source, settings: tuple[str, ...] | list[str]) -> None:
    """`--set blocks.attention.mixer.heads=8`: replace or add values; the value is YAML."""
    for text in settings:
        name, equals, raw = text.partition("=")
        keys = tuple(int(k) if k.isdigit() else k for k in re.split(r"[.\[\]]+", name.strip()) if k)
        if not equals or not keys:
            raise UserError(f"--set {text}: expected path=value, such as --set hidden_size=512")
        try:
            value = yaml.load(raw, Loader=_Loader)  # noqa: S506 - a SafeLoader
        except yaml.YAMLError:
            raise UserError(f"--set {text}: {raw!r} is not valid YAML") from None
        target = source.data
        for depth, key in enumerate(keys[:-1]):
            target = _step(target, key, keys, depth, text)
            if isinstance(target, str):
                raise UserError(f"--set {text}: {path_text(keys[:depth + 1])} is {target!r}, not a mapping")
        last = keys[-1]
        if isinstance(target, list):
            if not isinstance(last, int) or last >= len(target):
                raise UserError(f"--set {text}: {path_text(keys[:-1])} has entries 0 to {len(target) - 1}")
            target[last] = value
        elif isinstance(target, dict):
            target[str(last)] = value
        else:
            raise UserError(f"--set {text}: {path_text(keys[:-1])} holds {target!r}; nothing can be set inside it")
        plain = keys if isinstance(target, list) else (*keys[:-1], str(last))
        source.settings[plain] = text


def _step(target: Any, key: str | int, keys: Keys, depth: int, text: str) -> Any:
    if isinstance(target, list):
        if not isinstance(key, int) or key >= len(target):
            raise UserError(f"--set {text}: {path_text(keys[:depth])} has entries 0 to {len(target) - 1}")
        return target[key]
    if isinstance(target, dict):
        return target.setdefault(str(key), {})
    raise UserError(f"--set {text}: {path_text(keys[:depth])} holds {target!r}; nothing can be set inside it")
