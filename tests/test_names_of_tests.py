"""pytest finds tests by name: one in a file of another name would never run, and two files of one name in folders that
are no packages cannot be collected together."""

import ast
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent
FILES = sorted(HERE.rglob("*.py"))


def test_every_test_stands_where_pytest_looks():
    lost = [f"{path.relative_to(HERE)}: {node.name}" for path in FILES if not path.name.startswith("test_")
            for node in ast.parse(path.read_text(encoding="utf-8")).body
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    assert not lost


def test_no_two_files_of_one_name():
    loose = Counter(path.name for path in FILES
                    if path.name.startswith("test_") and not (path.parent / "__init__.py").exists())
    assert not [name for name, times in loose.items() if times > 1]
