"""A corpus from its recipe to a model's data, as a user makes it."""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.command_line import call
from tests.corpus.stories import story
from tryplicity.corpus import load_recipe, shards
from tryplicity.corpus.download import download
from tryplicity.corpus.filtering import filter_corpus
from tryplicity.corpus.report import kappa, markdown, report
from tryplicity.errors import UserError

PLUGIN = Path(__file__).with_name("long_words.py")


def no_progress(what, done, total):
    pass


def filtered(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted((folder / "filtered").iterdir())}


def kept(folder):
    return [document.text for path in sorted((folder / "filtered").glob("*.parquet"))
            for document, _ in shards.read_shard(path)]


@pytest.fixture
def corpus(registry, recipe_file, texts, tmp_path):
    """Downloaded: 60 stories, of which the 6th comes again at the end, and the 10th nearly; and a bad one."""
    (texts / "960.txt").write_text(story(5))
    (texts / "970.txt").write_text(story(9, 60).replace("the", "their", 1))
    (texts / "009.txt").write_text(story(9, 60))
    (texts / "980.txt").write_text("12 34 56 78 90 " * 40)
    folder = tmp_path / "corpus"
    download(load_recipe(recipe_file(), registry), folder, no_progress)
    return folder


def test_copies_and_what_the_panel_votes_against_are_left_out_and_counted(registry, corpus):
    said = report("small", filter_corpus(corpus, registry, no_progress))
    assert said["documents"] == 60 and said["dropped"] == 3
    assert said["sources"]["stories"]["dropped"] == {
        "copies: the same text": 1, "copies: nearly the same text": 1, "statistical: words too short": 1}
    texts = kept(corpus)
    assert texts == [story(n, 60 if n == 9 else 12) for n in range(60)]
    assert said["bytes"] == sum(len(text.encode()) for text in texts)
    named = {reason: [one["id"] for one in some] for reason, some in said["examples"].items() if reason != "kept"}
    assert named == {"copies: the same text": ["960.txt"], "copies: nearly the same text": ["970.txt"],
                     "statistical: words too short": ["980.txt"]}
    page = markdown(said)
    assert "60 documents kept" in page and "| copies: the same text | 1 | 960.txt: " in page
    assert f"| stories | 60 | {said['bytes'] / 1e6:,.1f} | 3 |" in page and "| statistical | 60 | 1 | 0 |" in page


def test_two_processes_give_the_same_bytes_and_so_does_going_on(registry, corpus, tmp_path):
    for name in ("two", "cut"):
        shutil.copytree(corpus, tmp_path / name)
    filter_corpus(corpus, registry, no_progress)
    filter_corpus(tmp_path / "two", registry, no_progress, workers=2)
    looks = iter([False] * 4)
    assert filter_corpus(tmp_path / "cut", registry, no_progress, stopping=lambda: next(looks, True)) is None
    assert not (tmp_path / "cut" / "filtered" / "manifest.json").exists()
    filter_corpus(tmp_path / "cut", registry, no_progress)
    assert filtered(corpus) == filtered(tmp_path / "two") == filtered(tmp_path / "cut")


def test_killed_and_gone_on_with(registry, corpus, tmp_path):
    shutil.copytree(corpus, tmp_path / "cut")
    filter_corpus(corpus, registry, no_progress)
    process = subprocess.Popen([sys.executable, "-m", "tryplicity.cli", "data", "filter", str(tmp_path / "cut"),
                                "--workers", "1"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list((tmp_path / "cut" / "work").glob("*.json")):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    filter_corpus(tmp_path / "cut", registry, no_progress)
    assert filtered(corpus) == filtered(tmp_path / "cut")


def test_a_stranger_s_judge_and_the_best_third(recipe_file, texts, tmp_path, capfd):
    path = recipe_file(judges="[{judge: long_words, keep_top: 0.3}]")
    folder = str(tmp_path / "corpus")
    for line in (["download", str(path), "--out", folder], ["filter", folder, "--workers", "1", "--json"]):
        code, out, err = call(capfd, "data", *line, "--plugin", str(PLUGIN))
        assert code == 0, err
    said = json.loads(out)
    assert said["documents"] == 18 and said["judges"] == {"long_words": {"keep": 18, "drop": 42}}
    means = sorted((len("".join(story(n).split())) / len(story(n).split()), story(n)) for n in range(60))
    assert sorted(kept(Path(folder))) == sorted(text for _, text in means[-18:])


def test_the_whole_way_to_a_trained_model(recipe_file, texts, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("TRYPLICITY_CACHE", str(tmp_path / "cache"))
    folder, spec = str(tmp_path / "corpus"), str(Path(__file__).parents[1] / "small.yaml")
    assert call(capfd, "data", "download", str(recipe_file()), "--out", folder)[0] == 0
    code, _, err = call(capfd, "train", spec, "--hw", "cpu", "--data", f"corpus:{folder}", "--steps", "2", "--run",
                        str(tmp_path / "run"))
    assert code == 2 and "no corpus that is filtered to the end" in err
    assert call(capfd, "data", "filter", folder, "--workers", "1")[0] == 0
    code, out, _ = call(capfd, "data", "inspect", folder)
    assert code == 0 and "small (filtered): 60 documents" in out and "school grade" in out
    code, _, err = call(capfd, "train", spec, "--hw", "cpu", "--data", f"corpus:{folder}", "--steps", "2", "--run",
                        str(tmp_path / "run"))
    assert code == 0, err


def test_a_download_that_is_not_done_and_a_folder_that_is_none(registry, recipe_file, tmp_path):
    recipe = load_recipe(recipe_file(), registry)
    with pytest.raises(UserError, match="there is no corpus here; make one"):
        filter_corpus(tmp_path / "nothing", registry, no_progress)
    download(recipe, tmp_path / "c", no_progress, lambda: True)
    with pytest.raises(UserError, match="stories is not downloaded to the end"):
        filter_corpus(tmp_path / "c", registry, no_progress)


def test_a_damaged_shard_is_named(registry, corpus):
    path = corpus / "raw" / "stories" / "part-00000.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"part-00000\.parquet: not a shard of a corpus, or damaged"):
        filter_corpus(corpus, registry, no_progress)


def test_where_nothing_is_left_that_is_said(recipe_file, texts, tmp_path, capfd):
    path, folder = recipe_file(judges="[{judge: long_words, keep_at: 99}]"), str(tmp_path / "corpus")
    assert call(capfd, "data", "download", str(path), "--out", folder, "--plugin", str(PLUGIN))[0] == 0
    code, _, err = call(capfd, "data", "filter", folder, "--workers", "1", "--plugin", str(PLUGIN))
    assert code == 2 and "nothing is left: see" in err and (tmp_path / "corpus" / "report.md").exists()


def test_a_forecast_fetches_nothing(tmp_path, capfd):
    code, out, _ = call(capfd, "data", "download", "web-40gb", "--out", str(tmp_path / "c"), "--dry-run")
    assert code == 0 and "40.00 GB of text" in out and "fineweb-edu" in out and "16,000.0 MB" in out
    assert not (tmp_path / "c").exists()


def test_kappa_by_hand():
    """Of 20 documents both keep 8 and both drop 6: (0.7 - (12*10 + 8*10) / 400) / (1 - 0.5) = 0.4."""
    assert kappa({"keep / keep": 8, "drop / drop": 6, "keep / drop": 4, "drop / keep": 2}) == pytest.approx(0.4)
    assert kappa({"keep / keep": 5}) is None



def test_the_judge_in_the_documentation_is_short_and_works_as_it_stands_there(recipe_file, texts, tmp_path, capfd):
    page = (Path(__file__).parents[2] / "docs" / "corpora.md").read_text(encoding="utf-8")
    block = page.partition("## A judge of your own")[2].partition("```python\n")[2].partition("```")[0]
    plugin, folder = tmp_path / "long_words.py", str(tmp_path / "corpus")
    plugin.write_text(block, encoding="utf-8")
    assert len(block.splitlines()) < 40 and "--plugin long_words.py" in page
    (texts / "900.txt").write_text("a b c d e f g " * 30, encoding="utf-8")
    path = recipe_file(judges="[{judge: long_words}]")
    for line in (["download", str(path), "--out", folder], ["filter", folder, "--workers", "1", "--json"]):
        code, out, err = call(capfd, "data", *line, "--plugin", str(plugin))
        assert code == 0, err
    said = json.loads(out)
    assert said["documents"] == 60 and said["sources"]["stories"]["dropped"] == {"long_words: short words": 1}
