"""Files by their path or the name under which they came with the package, and of which kind one is. Loads no torch."""

from __future__ import annotations

from pathlib import Path

from tryplicity.errors import UserError, did_you_mean, nearest
from tryplicity.spec.loader import YamlFile

#: what is looked for -> the package that installs such files
INSTALLED = {"spec": "tryplicity_specs", "hardware": "tryplicity_hardware", "recipe": "tryplicity_recipes"}
_CALLED = {"spec": "spec", "hardware": "hardware profile", "recipe": "recipe of a corpus"}


def installed_files(kind: str) -> dict[str, Path]:
    """The YAML files that come with the package, by name: `full`, `published/mamba2-2.7b`. kind: "spec", "hardware" or
    "recipe"."""
    from importlib import resources

    folder = Path(str(resources.files(INSTALLED[kind]).joinpath("__init__.py"))).parent
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}


def find_file(name: str | Path, kind: str) -> Path:
    """A file's path, or the path of an installed one from its name: `full`, `h200`.

    Raises UserError naming the nearest installed file, and all of them, if there is neither.
    """
    path, installed = Path(name), installed_files(kind)
    if is_there(path) and not path.is_dir():  # a pipe too
        return path
    if str(name) in installed:
        return installed[str(name)]
    if is_there(path):
        raise UserError(f"{name}: this is a folder; a YAML file is wanted, or an installed {kind}: "
                        f"{', '.join(sorted(installed))}")
    other = next((k for k in INSTALLED if k != kind and path.stem in installed_files(k)), None)
    if other is not None:
        raise UserError(f"{name}: this is a {_CALLED[other]}, and a {_CALLED[kind]} is wanted here; "
                        f"installed: {', '.join(sorted(installed))}")
    hint = did_you_mean(path.stem, installed) if nearest(path.stem, installed) else ""
    raise UserError(f"{name}: there is no such file, and no installed {kind} of that name{hint}; "
                    f"installed: {', '.join(sorted(installed))}")


def is_there(path: Path) -> bool:
    """Whether something is at a path. Raises UserError where that cannot be told (a name too long, no right)."""
    try:
        return path.exists()
    except ValueError:  # a NUL in it
        return False
    except OSError as error:
        name = str(path) if len(str(path)) < 60 else f"{str(path)[:57]}..."
        raise UserError(f"{name}: cannot be looked at: {error.strerror}") from None


#: keys that tell one kind of file from the other
_SIGNS = {"spec": {"vocab_size", "hidden_size", "context_length", "layers", "blocks"},
          "hardware": {"device", "accelerator", "memory_gb", "tflops", "memory_bandwidth_gbs"},
          "recipe": {"sources", "judges", "shard_mb", "near_duplicates", "votes"}}


def check_kind(source: YamlFile, kind: str) -> None:
    """Raises UserError where another kind of file is wanted."""
    if _SIGNS[kind] & set(source.data):
        return
    for other in INSTALLED:
        if other != kind and len(_SIGNS[other] & set(source.data)) > 1:
            where = {"spec": "give it as SPEC", "hardware": "give it to --hw",
                     "recipe": "give it to `tryplicity data`"}[other]
            raise UserError(f"{source.file}: this is a {_CALLED[other]}, and a {_CALLED[kind]} is wanted here; {where}")
