"""They are what a stranger could have written: short, and of the public API alone."""

import ast
from pathlib import Path

import pytest

import tryplicity

PACKAGES = [path.parent for path in sorted(Path(__file__).parent.glob("*/pyproject.toml"))]


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_it_imports_what_is_exported_and_has_few_lines(package):
    files = sorted(package.glob("tryplicity_*/*.py"))
    assert sum(len(file.read_text().splitlines()) for file in files) < 150
    for node in (node for file in files for node in ast.walk(ast.parse(file.read_text()))):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("tryplicity") and "_" not in node.module:
            assert node.module == "tryplicity" and {alias.name for alias in node.names} <= set(tryplicity.__all__)
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("tryplicity") for alias in node.names)
