"""What is made from the code: docs/reference.md, docs/published.md, and the types of what plugins import.
`python -m tests.generated` writes them anew; tests compare."""

from __future__ import annotations

from pathlib import Path

import tryplicity
from tests.exchange import gallery
from tryplicity import load_plugins
from tryplicity.hardware import Hardware
from tryplicity.reference import Option, by_family, described, options
from tryplicity.spec import BlockSpec
from tryplicity.spec import model as spec_model

ROOT = Path(__file__).parents[1]

HEAD = """# Every option

Made from the code by `python -m tests.generated`. In the terminal, plugins of your own included:
`tryplicity plugins show gqa`.
"""


def page() -> str:
    registry = load_plugins().registry
    parts = [HEAD, "## A spec\n", table(options(spec_model._SpecFile)),
             "## `training`\n", table(options(spec_model.Training)),
             "## An entry of `phases`\n", table(options(spec_model.Phase)),
             "## A block\n", table(options(BlockSpec)),
             "## A hardware profile\n", table(options(Hardware))]
    for family, components in by_family(registry).items():
        parts.append(f"## {family}\n")
        for component in components:
            parts.append(f"### {component.name}\n\n{described(component)}\n")
            if rows := options(component.Config):
                parts.append(table(rows))
    return "\n".join(parts)


def table(rows: list[Option]) -> str:
    lines = ["| option | values | default | meaning |", "|---|---|---|---|"]
    for row in rows:
        default = "must be given" if row.default == "" else f"`{row.default}`"
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in (
            f"`{row.name}`", row.values, default, row.meaning)) + " |")
    return "\n".join(lines) + "\n"


def stub() -> str:
    """tryplicity/__init__.pyi: what is loaded when first used, as type checkers and editors can see it."""
    lines = ['"""Made by `python -m tests.generated`."""', ""]
    for module, names in tryplicity._EXPORTS.items():
        lines += [f"from {module} import {name} as {name}" for name in sorted(names)]
    return "\n".join([*lines, "from tryplicity import kernels as kernels", "", "__version__: str", ""])


#: file -> what makes it
FILES = {"docs/reference.md": page, "docs/published.md": gallery.page, "tryplicity/__init__.pyi": stub}

if __name__ == "__main__":
    for name, make in FILES.items():
        (ROOT / name).write_text(make(), encoding="utf-8")
