"""Models that a plugin knows by name: found where they are installed, and imported into the cache when first asked for.

A command that takes a run takes such a name, where no file or folder is called so. Loads no torch before it imports.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tryplicity.data.cache import building, cache_root
from tryplicity.errors import UserError
from tryplicity.progress import CountProgress, no_count_progress


@dataclass(frozen=True)
class NamedModel:
    """A model that `tryplicity import` can read, under a name of its own.

    about: what it is, with its size and licence, in a few words. find: the file or folder, or None where it is not
    installed. install: the command that installs it. weights: how a CPU keeps it unless --weights says otherwise.
    """

    name: str
    about: str
    find: Callable[[], Path | None]
    install: str
    weights: str | None = "int8"


@dataclass(frozen=True)
class Found:
    """What a user named: a run folder or file of ours, and how to keep its weights if he does not say."""

    path: Path
    weights: str | None = None


def named_models(plugins: Any) -> dict[str, NamedModel]:
    """Of all plugins; the first of a name."""
    found: dict[str, NamedModel] = {}
    for models in plugins.call("tryplicity_models"):
        for model in models:
            found.setdefault(model.name, model)
    return found


def resolve(what: str | Path, plugins: Any, progress: CountProgress = no_count_progress) -> Found:
    """`what` itself where it is there or is no known name; else the run of the model so called, which is imported into
    the cache if it has not been. Raises UserError for one that is not installed or cannot be imported."""
    if Path(what).exists() or (model := named_models(plugins).get(str(what))) is None:
        return Found(Path(what))
    source = model.find()
    if source is None:
        raise UserError(f"{model.name}: {model.about} is not installed here; `{model.install}` does it")
    return Found(_imported(model.name, source, plugins, progress), model.weights)


def _imported(name: str, source: Path, plugins: Any, progress: CountProgress) -> Path:
    """The run folder in the cache, under a name that its content gives it."""
    folder = cache_root() / "models"
    target = folder / f"{name}-{_digest(source)[:16]}"
    if not target.exists():
        from tryplicity.exchange.importing import import_model

        with building(target) as temporary:
            inside = temporary / "run"
            import_model(source, inside, plugins.registry, name=name, progress=progress)
            for path in list(inside.iterdir()):
                shutil.move(path, temporary / path.name)
            inside.rmdir()
    return target


def _digest(source: Path) -> str:
    """SHA-256 of a file, or of a folder's files and their names."""
    if source.is_file():
        with open(source, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    total = hashlib.sha256()
    for path in sorted(path for path in source.iterdir() if path.is_file()):
        with open(path, "rb") as file:
            total.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\0".encode())
    return total.hexdigest()
