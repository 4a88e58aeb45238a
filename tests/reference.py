"""docs/reference.md out of the code. `python -m tests.reference` writes it anew; a test compares."""

from __future__ import annotations

from pathlib import Path

from tryplicity import load_plugins
from tryplicity.hardware import Hardware
from tryplicity.reference import Option, by_family, described, options
from tryplicity.spec import model as spec_model

PAGE = Path(__file__).parents[1] / "docs" / "reference.md"

HEAD = """# Every option

Made from the code by `python -m tests.reference`. In the terminal, plugins of your own included:
`tryplicity plugins show gqa`.
"""


def page() -> str:
    registry = load_plugins().registry
    parts = [HEAD, "## A spec\n", table(options(spec_model._SpecFile)),
             "## `training`\n", table(options(spec_model.Training)),
             "## An entry of `phases`\n", table(options(spec_model.Phase)),
             "## A block\n", table(options(spec_model.BlockSpec)),
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


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
