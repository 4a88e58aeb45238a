"""A small run, trained on text and code."""

import shutil
from pathlib import Path

import pytest

from tryplicity.cli import main

SMALL = str(Path(__file__).parents[1] / "small.yaml")


@pytest.fixture(scope="package")
def texts(tmp_path_factory, corpus):
    """Text and code, of which some of each is held out."""
    folder = tmp_path_factory.mktemp("mixed")
    for path in corpus.iterdir():
        shutil.copy(path, folder)
    for i in range(160):
        (folder / f"part{i}.py").write_text(f"def part_{i}(numbers):\n    return sum(numbers) + {i}\n" * 3)
    return folder


@pytest.fixture(scope="package")
def run(texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "small"
    main.main(["train", SMALL, "--hw", "cpu", "--data", str(texts), "--run", str(folder), "--steps", "8", "--set",
               "hardware.batch=4", "--set", "linear=bitlinear"], standalone_mode=False)
    return folder
