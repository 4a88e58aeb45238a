"""YAML with the line and column of every key and value: the one reader and the one writer. Loads no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tryplicity.configs import Path as Keys
from tryplicity.configs import Problem, path_text, said
from tryplicity.errors import PluginFault, UserError


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's scalars: 9.4e9 is a number; on, yes, 010, 1:30 and dates are text."""


_TAG = "tag:yaml.org,2002:"
_REPLACED = [_TAG + name for name in ("bool", "float", "int", "null", "timestamp")]
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_TAG + "bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(_TAG + "null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver(_TAG + "int", re.compile(r"^[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+)$"),
                              list("-+0123456789"))
_Loader.add_implicit_resolver(
    _TAG + "float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.[0-9]+"
               r"(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"), list("-+0123456789."))


class _Dumper(yaml.SafeDumper):
    """Writes what _Loader reads back as the same."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _written(dumper: _Dumper, text: str) -> yaml.Node:
    # PyYAML would write these as they are, and read them as line breaks
    breaks = '"' if re.search("[\x85\u2028\u2029]", text) else None
    return dumper.represent_scalar(_TAG + "str", text, style=breaks)


_Dumper.add_representer(str, _written)


def dump_yaml(data: Any) -> str:
    """Plain data as YAML, in its own order; `parse_yaml` gives it back."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, width=110, allow_unicode=True)


@dataclass
class YamlFile:
    """A YAML file as plain data, with where each part of it stands."""

    file: str
    data: Any
    keys: dict[Keys, tuple[int, int]] = field(default_factory=dict)  # path -> line and column of its key
    values: dict[Keys, tuple[int, int]] = field(default_factory=dict)  # path -> line and column of its value
    aliases: dict[Keys, Keys] = field(default_factory=dict)  # path of an alias -> path of what it stands for
    settings: dict[Keys, str] = field(default_factory=dict)  # paths given on the command line -> how
    below: YamlFile | None = None  # the file that this one starts from, whose parts stand in `data` too

    @property
    def folder(self) -> Path:
        """What the file's relative paths count from: where it stands; the working directory for what is no file."""
        path = Path(self.file)
        return path.parent.absolute() if path.is_file() else Path.cwd()

    def setting(self, path: Keys) -> str | None:
        """The setting that gave a path its value, if one did."""
        return next((self.settings[part] for part in beginnings(path) if part in self.settings), None)

    def _known(self, path: Keys) -> int:
        """How much of a path stands in this file."""
        return next((len(part) for part in beginnings(path) if part in self.keys or part in self.values), 0)

    def _known_at_all(self, path: Keys) -> int:
        """How much of it stands in this file, or in those that it starts from."""
        return max(self._known(path), self.below._known_at_all(path) if self.below is not None else 0)

    def _alias(self, path: Keys) -> Keys | None:
        """The longest part of a path that is an alias."""
        return next((part for part in beginnings(path) if part in self.aliases), None)

    def _position(self, problem: Problem) -> tuple[int, int]:
        """Line and column of a problem, or of the nearest thing around it that stands in the file."""
        path = problem.path
        while alias := self._alias(path):
            path = (*self.aliases[alias], *path[len(alias):])
        for part in beginnings(path):
            by_key = problem.at_key or part != path
            for table in (self.keys, self.values) if by_key else (self.values, self.keys):
                if part in table:
                    return table[part]
        return 1, 1

    def place(self, problem: Problem) -> str:
        """'file:line:column' of a problem, or '--set path=value' for what came from the command line."""
        setting = self.setting(problem.path)
        below = self.below
        if not setting and below is not None and self._known(problem.path) < below._known_at_all(problem.path):
            return below.place(problem)
        line, column = self._position(problem)
        return f"--set {setting}" if setting else f"{self.file}:{line}:{column}"

    def error(self, problems: list[Problem]) -> UserError | PluginFault:
        """All problems in the order of the file, one a line; a mistake reached in several ways only once. A PluginFault
        where nothing is wrong with the file."""
        chosen: dict[tuple[str, str], Problem] = {}
        for problem in problems:
            which = (self.place(problem), problem.message)
            if which not in chosen or (self._alias(chosen[which].path) and not self._alias(problem.path)):
                chosen[which] = problem
        lines = []
        for (place, message), problem in chosen.items():
            set_here, alias = self.setting(problem.path), self._alias(problem.path)
            where = f"{place}: {path_text(problem.path)}" if problem.path else place
            if alias and not set_here:  # all is well where the anchor stands, not where the alias does
                message += f" (through the alias on line {self._line_of_use(alias)})"
            line = " ".join(f"{where}: {message}".split())
            lines.append((bool(set_here), self._position(problem), len(lines), line))
        kind = PluginFault if all(problem.fault for problem in problems) else UserError
        return kind("\n".join(line for *_, line in sorted(lines)))

    def _line_of_use(self, alias: Keys) -> int:
        outermost = [part for part in beginnings(alias) if part in self.aliases][-1]
        return next(self.keys[part][0] for part in beginnings(outermost) if part in self.keys)


def beginnings(path: Keys) -> Iterator[Keys]:
    """A path, then what it lies in, from the inside out."""
    return (path[:end] for end in range(len(path), 0, -1))


LARGEST = 16_000_000  # bytes of a YAML file: what is larger, or has no end, is something else


def read_yaml(path: str | Path) -> YamlFile:
    """The mapping in a file, or in what a pipe gives (read once). Raises UserError for a missing or unreadable file,
    broken YAML, and duplicate keys (all of them)."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: there is no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: this is a folder; a YAML file is wanted") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(data) > LARGEST:
        raise UserError(f"{path}: more than {LARGEST // 10**6} MB; a YAML file of a few pages is wanted")
    return parse_yaml(_text(data, str(path)), str(path))


def _text(data: bytes, file: str) -> str:
    beginning = data[:64]
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or beginning.count(0) * 4 > len(beginning) > 3:
        raise UserError(f"{file}:1:1: this is UTF-16 or UTF-32 text; save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[:error.start].count(b"\n") + 1
        column = error.start - error.object.rfind(b"\n", 0, error.start)
        raise UserError(f"{file}:{line}:{column}: not UTF-8 text (byte {error.object[error.start]:#04x}); "
                        "save it as UTF-8") from None


def parse_yaml(text: str, file: str) -> YamlFile:
    """As `read_yaml`, of a text; `file` is what messages call it."""
    source = _parsed(text, file)
    if not isinstance(source.data, Mapping):
        got = "the file is empty" if source.data is None else f"got {said(source.data)}"
        raise UserError(f"{file}:1:1: expected a mapping of keys to values; {got}")
    return source


def parse_value(text: str, name: str) -> Any:
    """A value of any kind, as a person writes it in an option: `8`, `[a, b]`, `{type: files, path: texts}`.

    name: what messages call it. Raises UserError as `read_yaml` does.
    """
    return _parsed(text, name).data


def _parsed(text: str, file: str) -> YamlFile:
    source, problems = YamlFile(file, None), []
    try:
        source.data = _Reader(text, source, problems).read()
    except yaml.YAMLError as error:
        line, column, what = _yaml_fault(error, text)
        raise UserError(f"{file}:{line}:{column}: not valid YAML: {what}") from None
    except RecursionError:
        raise UserError(f"{file}:1:1: nested too deeply, or an anchor that holds itself") from None
    if problems:
        raise source.error(problems)
    return source


#: what PyYAML says -> what to do
_REMEDIES = {
    r"'\t'": "indent with spaces, not tabs",
    "mapping values are not allowed": "check the indentation, or put quotes around text that holds ': '",
    "could not find expected ':'": "write a key as 'key: value', and quote text of several lines",
    "expected <block end>": "check the indentation: entries of one mapping or list start in the same column",
    "expected ',' or": "close the bracket, or put a comma between the entries",
    "found undefined alias": "write the anchor (&name) above its aliases (*name)",
    "expected a single document": "keep one document in a file, without '---' between",
    "found unexpected end of stream": "close the quotes",
}


def _yaml_fault(error: yaml.YAMLError, text: str) -> tuple[int, int, str]:
    """Line, column and cause, with what to do about it."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:  # a character that YAML forbids
        before = text[:getattr(error, "position", 0)]
        return (before.count("\n") + 1, len(before) - before.rfind("\n"),
                f"forbidden character {text[len(before):len(before) + 1]!r}; remove it")
    what = f"{error.problem}" + (f" {error.context}" if error.context else "")
    if error.context_mark and error.context_mark.line != mark.line:
        what += f" begun on line {error.context_mark.line + 1}"
    remedy = next((f"; {remedy}" for sign, remedy in _REMEDIES.items() if sign in what), "")
    return mark.line + 1, mark.column + 1, what + remedy


class _Reader:
    """From YAML nodes to plain data, noting marks, aliases and duplicate keys on the way."""

    LIMIT = 100_000  # values, aliases written out: a few lines of aliases of aliases could fill the memory

    def __init__(self, text: str, source: YamlFile, problems: list[Problem]) -> None:
        self.loader, self.source, self.problems = _Loader(text), source, problems
        self.first: dict[int, Keys] = {}  # a node -> the path it was first met at
        self.count = 0  # of values and of merged pairs

    def read(self) -> Any:
        node = self.loader.get_single_node()
        return None if node is None else self.plain(node, ())

    def plain(self, node: yaml.Node, path: Keys) -> Any:
        if self.first.setdefault(id(node), path) != path:
            self.source.aliases[path] = self.first[id(node)]
        self.source.values[path] = _mark(node)
        self.counted(node)
        if isinstance(node, yaml.SequenceNode):
            return [self.plain(child, (*path, i)) for i, child in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, path)
        try:
            return self.loader.construct_object(node)
        except (ValueError, OverflowError):
            self.problems.append(Problem(path, f"{said(node.value)} is not a value of the kind {node.tag!r}"))
            return None

    def counted(self, node: yaml.Node) -> None:
        self.count += 1
        if self.count > self.LIMIT:
            raise yaml.MarkedYAMLError(problem=f"more than {self.LIMIT} values, counting what aliases and merge keys "
                                               "stand for", problem_mark=node.start_mark)

    def mapping(self, node: yaml.MappingNode, path: Keys) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for key_node, value_node, inherited in self.pairs(node, path):
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else "?"
            here = (*path, key)
            if key_node.tag not in (_TAG + "str", _TAG + "int"):
                self.source.keys[here] = _mark(key_node)
                self.problems.append(Problem(here, "a key must be text; put it in quotes", at_key=True))
            elif key not in data:
                self.source.keys[here] = _mark(key_node)
                data[key] = self.plain(value_node, here)
            elif not inherited:
                first, self.source.keys[here] = self.source.keys[here], _mark(key_node)
                self.problems.append(Problem(here, f"duplicate key: it stands already on line {first[0]}; "
                                                   "keep one of them", at_key=True))
        return data

    def pairs(self, node: yaml.MappingNode, path: Keys) -> Iterator[tuple[yaml.Node, yaml.Node, bool]]:
        """Keys and values, a mapping's own before those it inherits by `<<: *base`."""
        bases = []
        for key, value in node.value:
            if key.tag != _TAG + "merge":
                yield key, value, False
            else:
                bases += value.value if isinstance(value, yaml.SequenceNode) else [value]
        for base in bases:
            self.counted(base)  # merges of merges grow as fast as aliases of aliases, with or without pairs in them
            if isinstance(base, yaml.MappingNode):
                for key, value, _ in self.pairs(base, path):
                    self.counted(key)
                    yield key, value, True
            else:
                self.problems.append(Problem(path, "<<: must be given a mapping to inherit from"))


def _mark(node: yaml.Node) -> tuple[int, int]:
    return node.start_mark.line + 1, node.start_mark.column + 1
