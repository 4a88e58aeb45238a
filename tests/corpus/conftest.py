"""Small corpora of files."""

import pytest

from tests.corpus.stories import story
from tryplicity import load_plugins


@pytest.fixture(scope="session")
def registry():
    return load_plugins().registry


@pytest.fixture
def texts(tmp_path):
    """A folder of 60 files of prose."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(60):
        (folder / f"{number:03d}.txt").write_text(story(number), encoding="utf-8")
    return folder


@pytest.fixture
def recipe_file(tmp_path, texts):
    """`recipe_file(judges=..., bytes=...)`: a recipe of those files, as YAML."""

    def write(name="recipe.yaml", judges="[{judge: statistical}]", more="", size="1e9", shard="0.01"):
        path = tmp_path / name
        path.write_text(f"name: small\nbytes: {size}\nshard_mb: {shard}\nsources:\n  - {{name: stories, source: "
                        f"{{type: files, path: texts}}}}\njudges: {judges}\n{more}", encoding="utf-8")
        return path

    return write
