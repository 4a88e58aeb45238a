"""A download on the disk: budgets, going on, broken connections, what another process does to it."""

import hashlib
import itertools
import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest

from tests.corpus.stories import story
from tryplicity import Document, Source, Unreachable
from tryplicity.corpus import load_recipe, shards
from tryplicity.corpus.download import WAITS, download
from tryplicity.corpus.recipe import Portion, Recipe
from tryplicity.errors import UserError
from tryplicity.parts import Part


def no_progress(what, done, total):
    pass


def files_of(folder):
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix in (".parquet", ".json")}


def test_documents_arrive_in_shards_of_the_size_asked_and_to_the_budget(registry, recipe_file, tmp_path):
    recipe = load_recipe(recipe_file(size="30000"), registry)
    done = download(recipe, tmp_path / "c", no_progress)
    state = done.states["stories"]
    assert state.done and 30_000 <= state.bytes < 30_000 + 3_000 and not done.interrupted
    paths = shards.shards(tmp_path / "c" / "raw" / "stories")
    sizes = [sum(len(d.text.encode()) for d, _ in shards.read_shard(path)) for path in paths]
    assert len(paths) == state.shards == 3 and sum(sizes) == state.bytes
    assert all(10_000 <= size < 13_000 for size in sizes[:-1])
    found = [(d.text, source) for path in paths for d, source in shards.read_shard(path)]
    assert found == [(story(number), "stories") for number in range(state.documents)]


def test_interrupted_at_any_document_and_gone_on_with_gives_the_same_bytes(registry, recipe_file, tmp_path):
    recipe = load_recipe(recipe_file(), registry)
    download(recipe, tmp_path / "whole", no_progress)
    for stop in (1, 7, 30, 59):
        asked = itertools.count()
        cut = tmp_path / f"cut-{stop}"
        first = download(recipe, cut, no_progress, lambda asked=asked, stop=stop: next(asked) >= stop)
        assert first.interrupted
        again = download(recipe, cut, no_progress)
        assert not again.interrupted and files_of(cut) == files_of(tmp_path / "whole")


@pytest.mark.parametrize("moment", [0.0, 0.3])
def test_killed_and_gone_on_with_gives_the_same_bytes(registry, recipe_file, tmp_path, moment):
    path = recipe_file()
    line = [sys.executable, "-m", "tryplicity.cli", "data", "download", str(path), "--out"]
    download(load_recipe(path, registry), tmp_path / "whole", no_progress)
    process = subprocess.Popen([*line, str(tmp_path / "cut")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list((tmp_path / "cut").glob("raw/stories/*")):
        time.sleep(0.002)
    time.sleep(moment / 10)
    process.send_signal(signal.SIGKILL)
    process.wait()
    raw = tmp_path / "cut" / "raw" / "stories"
    written = len(shards.shards(raw))
    shards.write(shards.path_of(raw, written), [Document("x", "half", "text", "")], "stories")  # not counted yet
    done = subprocess.run([*line, str(tmp_path / "cut")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")


def test_a_folder_of_another_recipe_and_one_where_another_is_at_work_are_refused(registry, recipe_file, tmp_path):
    from tryplicity.files import locked

    recipe = load_recipe(recipe_file(size="5000"), registry)
    download(recipe, tmp_path / "c", no_progress)
    with pytest.raises(UserError, match="this folder is of another recipe"):
        download(load_recipe(recipe_file(size="6000"), registry), tmp_path / "c", no_progress)
    with locked(tmp_path / "c" / ".lock"), pytest.raises(UserError, match="a download is at work there"):
        download(recipe, tmp_path / "c", no_progress)


def test_a_damaged_state_is_named(registry, recipe_file, tmp_path):
    recipe = load_recipe(recipe_file(size="5000"), registry)
    download(recipe, tmp_path / "c", no_progress)
    (tmp_path / "c" / "raw" / "stories" / "state.json").write_text("{")
    with pytest.raises(UserError, match=r"state\.json: damaged"):
        download(recipe, tmp_path / "c", no_progress)


# --- a source whose connection breaks ---

class Far(Source):
    """Stories from afar; the connection breaks before some of them, once each."""

    name = "far"
    breaks: set[int]
    asked: list[int]

    @dataclass(frozen=True)
    class Config:
        pass

    def __init__(self, config):
        pass

    def reading(self, position=None):
        from tryplicity.components import Reading

        source = self

        class Connection(Reading):
            rereads = False

            def __init__(self):
                self.at = position or 0
                source.asked.append(self.at)

            def __next__(self):
                if self.at in source.breaks:
                    source.breaks.discard(self.at)
                    raise Unreachable("far: it does not answer")
                if self.at >= 40:
                    raise StopIteration
                self.at += 1
                return Document(f"far:{self.at}", story(self.at), "text", "")

            def position(self):
                return self.at

        return Connection()


def far(breaks):
    Far.breaks, Far.asked = set(breaks), []
    return Recipe("far", 1e9, [Portion(Part(Far, Far.Config()))], shard_mb=0.01)


def test_a_connection_that_breaks_is_tried_again_from_where_it_stood(tmp_path):
    download(far([]), tmp_path / "whole", no_progress)
    said = []
    done = download(far([0, 3, 25]), tmp_path / "broken", no_progress, waits=(0.0, 0.0), say=said.append)
    assert done.states["far"].done and len(said) == 3 and "trying again in 0 s" in said[0]
    assert files_of(tmp_path / "broken") == files_of(tmp_path / "whole")
    assert Far.asked == [0, 0, 3, 25]  # what was read for a shard that is not full yet is not asked for again


def test_one_that_never_answers_ends_with_what_to_do_and_keeps_what_is_there(tmp_path):
    recipe = far([20])
    Far.breaks = type("Always", (set,), {"discard": lambda self, item: None})([20])
    with pytest.raises(UserError, match=r"it does not answer \(tried 3 times; what is there is kept: run the same"):
        download(recipe, tmp_path / "c", no_progress, waits=(0.0, 0.0))
    state = json.loads((tmp_path / "c" / "raw" / "far" / "state.json").read_text())
    assert 0 < state["documents"] <= 20 and not state["done"]
    Far.breaks = set()
    assert download(recipe, tmp_path / "c", no_progress).states["far"].documents == 40


def test_waits_grow():
    assert list(WAITS) == sorted(WAITS) and sum(WAITS) > 240


def test_what_becomes_of_a_corpus_may_change_and_what_it_is_may_not(registry, recipe_file, tmp_path):
    folder = tmp_path / "c"
    download(load_recipe(recipe_file(size="5000"), registry), folder, no_progress)
    download(load_recipe(recipe_file(size="5000", more="vocab_size: 500\n"), registry), folder, no_progress)
    assert "vocab_size: 500" in (folder / "recipe.yaml").read_text()
    kept = (folder / "recipe.yaml").read_text()
    with pytest.raises(UserError, match="this folder is of another recipe"):
        download(load_recipe(recipe_file(size="5000", more="languages: [en]\n"), registry), folder, no_progress)
    assert (folder / "recipe.yaml").read_text() == kept
