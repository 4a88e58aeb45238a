"""`tryplicity plugins new`: an installable package that works at once. The text files beside this are its parts."""

from __future__ import annotations

import importlib.util
import keyword
import re
from pathlib import Path
from string import Template

from tryplicity import __version__
from tryplicity.errors import UserError
from tryplicity.files import whole_folder
from tryplicity.hookspecs import COMPONENT_HOOKS

HERE = Path(__file__).parent
#: kind -> how a user asks for it, in the README of the package
KINDS = {
    "mixer": "In a spec: `layers: [{mixer: $package, feed_forward: gated_mlp}]`",
    "feed_forward": "In a spec: `layers: [{mixer: ..., feed_forward: $package}]`",
    "router": "In a spec, where a mixture of experts names its `router: $package`",
    "brain": "In a spec: `brain: [$package]`",
    "objective": "In a spec: `brain: [$package]`",
    "parallelism": "In a hardware profile: `strategy: $package`",
    "source": "As training data: `tryplicity train SPEC --hw cpu --data $package --run DIR --steps 50`",
    "judge": "In a recipe of `tryplicity data`, among its judges",
    "retriever": "For a server: `tryplicity serve RUN --search $package`",
}


def new_package(name: str, kind: str, out: Path) -> list[Path]:
    """The files of a package that brings a component of this kind, in a new folder `out`. Raises UserError for a name
    that Python cannot import or has already, and for a folder that is there."""
    package = name.lower().replace("-", "_")
    if not re.fullmatch(r"[a-z](_?[a-z0-9])*", package) or keyword.iskeyword(package):
        raise UserError(f"{name!r} is no name for a package: a letter from a to z, then letters, digits and -")
    if importlib.util.find_spec(package) is not None:
        raise UserError(f"{name!r} is the name of a package that is installed; choose another")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is there already; --out names another folder")
    if out.absolute() == Path.cwd():
        raise UserError(f"{out}: you are in it; --out names another folder")
    words = {
        "dist": package.replace("_", "-"), "package": package, "kind": kind.replace("_", "-"), "release": __version__,
        "name": "".join(word.capitalize() for word in package.split("_")),
        "hook": next(hook for hook, families in reversed(COMPONENT_HOOKS.items()) if kind in families),
    }
    words["use"] = Template(KINDS[kind]).substitute(words) + "."
    parts = {"pyproject.toml": "pyproject", "README.md": "readme", f"{package}/__init__.py": "hooks",
             f"{package}/component.py": kind, f"tests/test_{package}.py": "test"}
    with whole_folder(out) as folder:
        for path, part in parts.items():
            text = Template((HERE / f"{part}.txt").read_text(encoding="utf-8")).substitute(words)
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text, encoding="utf-8")
    return [out / path for path in parts]
