"""`--set path=value`: values of a YAML file replaced or added. Loads no torch."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from tryplicity.configs import path_text, said
from tryplicity.errors import UserError, did_you_mean
from tryplicity.spec.loader import YamlFile, beginnings, parse_value


def apply_settings(source: YamlFile, settings: Iterable[str]) -> None:
    """`--set blocks.attention.mixer.heads=8`: replace or add values; the value is YAML.

    A number in the path is an entry of a list (`layers.0`); the one after the last appends. Mappings on the
    way that do not exist are made, but for blocks, whose names are the user's own. What an alias or a merge key
    copied keeps its own value: said on stderr. Raises UserError with every setting that cannot be applied, one a line.
    """
    faults = []
    for text in settings:
        name, equals, raw = text.partition("=")
        keys = [key for key in re.split(r"[.\[\]]+", name.strip()) if key]
        if not equals or not keys:
            faults.append(f"--set {text}: expected path=value, such as --set hidden_size=512")
            continue
        try:
            _set(source, keys, _setting_value(raw), text)
        except UserError as error:
            faults.append(f"--set {text}: {error}")
    if faults:
        raise UserError("\n".join(faults))
    for note in _left_as_they_were(source):
        print(f"note: {note}", file=sys.stderr)


def _setting_value(raw: str) -> Any:
    try:
        return parse_value(raw, "")
    except UserError as error:
        reason = re.sub(r"^:1:\d+: (not valid YAML: )?", "", str(error).splitlines()[0])
        raise UserError(f"{raw!r} is not a valid YAML value: {reason}") from None


#: mappings whose keys are names that a user invents: a setting that goes through a name unknown there is a misspelling
NAMED = {("blocks",)}


def _set(source: YamlFile, keys: list[str], value: Any, text: str) -> None:
    target, path = source.data, ()
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        step: str | int = key
        if isinstance(target, list):
            step = int(key) if key.isdecimal() else -1
            if not 0 <= step < len(target) + last:
                raise UserError(f"{path_text(path)} is a list with entries 0 to {len(target) - 1}"
                                + (f"; {len(target)} appends" if last else ""))
            if step == len(target):
                target.append(None)
        elif not isinstance(target, dict):
            raise UserError(f"{path_text(path)} is {said(target)}, with nothing inside; set it as a whole, "
                            f"such as --set '{path_text(path)}={{{keys[depth]}: ...}}'")
        elif path in NAMED and not last and key not in target:
            raise UserError(f"there is no {path_text((*path, key))}{did_you_mean(key, target)}")
        path = (*path, step)
        if last:
            target[step] = value
            source.settings[path] = text
        elif isinstance(target, dict) and target.get(step) is None:
            target[step] = {}
            source.settings[path] = text
        target = target[step]


def _left_as_they_were(source: YamlFile) -> Iterator[str]:
    """What shares a setting's place in the file, through an alias or a merge key, and was not set with it."""
    for path, text in source.settings.items():
        node = next((part for part in beginnings(path) if part in source.values), ())
        original = source.aliases.get(node, node)
        same = [original, *(copy for copy, of in source.aliases.items() if of == original)]
        others = [one for one in same if one != node and not source.setting((*one, *path[len(node):]))]
        if node and others:
            names = ", ".join(map(path_text, others[:3])) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
            yield f"--set {text}: {names} {'keeps its' if len(others) == 1 else 'keep their'} value: an alias is a copy"
