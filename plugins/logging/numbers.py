"""A step's metrics as flat names and numbers, with the names that TensorBoard's scalars have (see `tensorboard`)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tryplicity_plugins.logging.tensorboard import EVERY, SCALARS


def numbers(step: int, metrics: Mapping[str, Any]) -> dict[str, float]:
    """`run/NAME` at every step, a layer's `NAME/PLACE` at every 10th; lists of up to 16 numbers as `NAME/PLACE/INDEX`,
    inner objects as `NAME/INNER`. Longer lists and text are left out: metrics.jsonl has them."""
    found: dict[str, float] = {}
    for key, value in metrics.items():
        place, _, name = key.rpartition(".")
        if key not in ("step", "tokens") and (not place or step % EVERY == 1):
            found.update(_flat(f"{name}/{place}" if place else f"run/{name}", value))
    return found


def _flat(tag: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, int | float):
        yield tag, value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _flat(f"{tag.removeprefix('run/')}/{name}", inner)
    elif isinstance(value, list) and len(value) <= SCALARS:
        for index, inner in enumerate(value):
            yield from _flat(f"{tag}/{index}", inner)


def project(variable: str) -> str | None:
    """The project that an environment variable names: "1" for tryplicity; None where it is unset, empty or 0."""
    said = os.environ.get(variable, "")
    return {"": None, "0": None, "1": "tryplicity"}.get(said, said)


def config(spec: Any) -> dict[str, Any]:
    """What a tracker shows of a run beside its numbers."""
    return {} if spec is None else {"name": spec.name, **spec.architecture()}


class Tracker:
    """Writes the metrics of one run to other people's tracker, which is imported and begun at the first step."""

    name: str

    def __init__(self, folder: Path, spec: Any) -> None:
        self.folder, self.spec, self._run = folder, spec, None

    def write(self, step: int, metrics: Mapping[str, Any], keep: bool = False) -> None:
        if self._run is None:
            self._run = self._begun()
        if said := numbers(step, metrics):
            self._run.log(said, step=step)

    def _begun(self) -> Any:
        """The tracker's run. Raises UserError where it is not installed or cannot begin."""
        raise NotImplementedError

    def flush(self) -> None:
        """Both write as it comes, in a thread or process of their own."""
