"""Going on with a run under changed options: what differs, and the folder's files that say what holds from now on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from tryplicity.builder import Build
from tryplicity.errors import UserError
from tryplicity.files import write_text
from tryplicity.registry import Registry
from tryplicity.run import Run
from tryplicity.spec import Spec, load_spec

Change = tuple[Any, Any]  # before, now


def changes(run: Run, build: Build) -> dict[str, Change]:
    """What this build says otherwise than the run folder, by its path as `--set` would have it."""
    before = spec_before(run, build.registry)
    found = {} if before is None else differences(_said(before), _said(build.spec))
    profile = _hardware_before(run)
    if profile is not None:
        now = asdict(build.hardware)
        found |= {f"hardware.{path}": change for path, change in
                  differences({key: value for key, value in profile.items() if key in now}, now).items()}
    return found


def spec_before(run: Run, registry: Registry) -> Spec | None:
    """The spec that the folder says; None where it cannot be read any more."""
    try:
        return load_spec(str(run.spec), registry)
    except (UserError, OSError):
        return None


def _hardware_before(run: Run) -> Mapping[str, Any] | None:
    from tryplicity.spec import read_yaml

    try:
        return read_yaml(run.hardware).data
    except (UserError, OSError):
        return None


def _said(spec: Spec) -> dict[str, Any]:
    from tryplicity.parts import config_as_dict

    return {**spec.architecture(), "training": config_as_dict(spec.training),
            "phases": [config_as_dict(phase) for phase in spec.phases]}


def differences(before: Any, now: Any, path: str = "") -> dict[str, Change]:
    """The leaves at which two trees of plain data differ: {"training.optimizer.beta1": (0.9, 0.8)}."""
    if isinstance(before, Mapping) and isinstance(now, Mapping) and before.get("type") == now.get("type"):
        return {at: change for key in dict.fromkeys([*before, *now])
                for at, change in differences(before.get(key), now.get(key), f"{path}.{key}" if path else key).items()}
    before, now = (list(x) if isinstance(x, tuple) else x for x in (before, now))
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        return {at: change for i, (old, new) in enumerate(zip(before, now, strict=True))
                for at, change in differences(old, new, f"{path}[{i}]").items()}
    return {} if before == now else {path: (before, now)}


def in_words(found: Mapping[str, Change], most: int = 6) -> str:
    """"training.gradient_clip 0.5 (was 1.0), ..."."""
    said = [f"{path} {_short(now)} (was {_short(before)})" for path, (before, now) in list(found.items())[:most]]
    return ", ".join(said) + (f" and {len(found) - most} more" if len(found) > most else "")


def _short(value: Any) -> str:
    text = "nothing" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def write_in_force(run: Run, build: Build) -> None:
    """spec.yaml, hardware.yaml and build.json as they hold from now on, each written whole, and only if it differs."""
    from tryplicity.spec import dump_yaml

    for path, text in ((run.hardware, dump_yaml(asdict(build.hardware))),
                       (run.build, json.dumps(build.plan.as_dict(), indent=1)), (run.spec, build.spec.as_yaml())):
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            write_text(path, text)
