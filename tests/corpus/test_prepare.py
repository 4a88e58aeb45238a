"""One command from a recipe to a trained model, and what kills do to it."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.command_line import call
from tests.corpus.planted import plant, recipe
from tests.corpus.stories import story
from tryplicity.data import TokenFile

PLUGIN = Path(__file__).with_name("long_words.py")
SMALL = Path(__file__).parents[1] / "small.yaml"
GOAL = f"train: {{spec: {SMALL}, steps: 2, settings: [training.checkpoint_every=1]}}\n"


def files_of(folder):
    """Hashes of the corpus, its tokenizer and token files: of all that must not depend on how often it was stopped."""
    found = {}
    for kind in ("raw", "work", "filtered", "prepared/documents", "prepared/tokens", "prepared/tokenizers",
                 "tokenizer.json"):
        for path in sorted([folder / kind] if (folder / kind).is_file() else (folder / kind).rglob("*")):
            name = str(path.relative_to(folder))
            if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts) \
                    and "judges" not in name:
                found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def killed_and_gone_on_with(line, folder, whole, kills, environment):
    """Run the command, kill it with SIGKILL at random moments, and at last let it end. A moment is when there are so
    many files as a random number between none and those of the `whole`, and a little later: seconds say nothing on a
    machine that has other things to do. How many there were each time it was killed."""
    draw, killed = random.Random(kills), []
    for moment in sorted(draw.sample(range(1, number_of_files(whole)), kills)):
        process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment,
                                   start_new_session=True)
        while process.poll() is None and number_of_files(folder) < moment:
            time.sleep(0.01)
        time.sleep(draw.uniform(0.0, 0.5))
        if process.poll() is None:
            killed.append(number_of_files(folder))
            os.killpg(process.pid, signal.SIGKILL)  # its workers too, as a machine that goes down does
        process.wait()
    done = subprocess.run(line, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return killed


def number_of_files(folder):
    return sum(len(files) for _, _, files in os.walk(folder))


def prepare_line(recipe, folder):
    return [sys.executable, "-m", "tryplicity.cli", "data", "prepare", str(recipe), "--out", str(folder)]


def test_one_command_from_texts_to_a_model_and_a_second_one_passes_over_it(recipe_file, tmp_path, capfd):
    path, folder = recipe_file(more=GOAL), tmp_path / "c"
    code, out, err = call(capfd, "data", "prepare", str(path), "--out", str(folder), "--workers", "1", "--json")
    assert code == 0, err
    said = json.loads(out)
    assert said["documents"] == 60 and said["run"] == str(folder / "run")
    assert (folder / "run" / "model.safetensors").exists() and (folder / "report.md").exists()
    tokens, = (folder / "prepared" / "tokens").iterdir()
    parts = {name: TokenFile(tokens, name) for name in ("train", "heldout")}
    assert said["tokens"] == {name: int(part.end_D[-1]) for name, part in parts.items()}
    assert (tokens / "tokenizer.json").read_text() == (folder / "tokenizer.json").read_text() == \
        (folder / "run" / "tokenizer.json").read_text()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.parent != folder}
    code, again, err = call(capfd, "data", "prepare", str(path), "--out", str(folder), "--workers", "1", "--json")
    assert code == 0 and json.loads(again) == said, err
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_killed_and_gone_on_with_it_is_the_same(recipe_file, tmp_path, capfd):
    path = recipe_file(more="vocab_size: 300\n")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(prepare_line(path, tmp_path / "whole"), capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    killed = killed_and_gone_on_with(prepare_line(path, tmp_path / "cut"), tmp_path / "cut", tmp_path / "whole", 2,
                                     environment)
    assert killed
    found = files_of(tmp_path / "cut")
    assert found == files_of(tmp_path / "whole") and any("train.bin" in name for name in found)


@pytest.mark.parametrize(("more", "said"), [
    (f"train: {{spec: {SMALL}}}\n", "exactly one of steps, tokens and minutes"),
    (f"train: {{spec: {SMALL}, steps: 2}}\nvocab_size: 5\n", "vocab_size is 5, and the spec under train"),
    ("train: {spec: nowhere, steps: 2}\n", "nowhere"),
])
def test_what_cannot_become_a_model_is_said_before_anything_is_fetched(recipe_file, tmp_path, capfd, more, said):
    code, _, err = call(capfd, "data", "prepare", str(recipe_file(more=more)), "--out", str(tmp_path / "c"))
    assert code == 2 and said in err and not (tmp_path / "c").exists()


def test_without_a_vocabulary_it_ends_with_the_filtered_text(recipe_file, tmp_path, capfd):
    code, out, err = call(capfd, "data", "prepare", str(recipe_file()), "--out", str(tmp_path / "c"), "--json",
                          "--workers", "1")
    assert code == 0, err
    assert "tokens" not in json.loads(out) and not (tmp_path / "c" / "prepared").exists()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_ten_times_before_five_judges_it_is_the_same(tmp_path):
    """Of the five, a reader is trained and a head fitted on the way; a killed training goes on from its checkpoint.
    What they come to is compared too."""
    plant(tmp_path, line_mb=3, stories=60)
    for name, change in (("good", str), ("bad", str.upper)):
        (tmp_path / name).mkdir()
        for number in range(24):
            (tmp_path / name / f"{number}.txt").write_text(change(story(100 + number)))
    small = tmp_path / "reader.yaml"
    small.write_text(SMALL.read_text().replace("checkpoint_every: 4", "checkpoint_every: 2"))
    five = ("[{judge: statistical}, {judge: {type: fineweb_edu, model: null}}, {judge: {type: perplexity, spec: "
            "reader.yaml, data: good, steps: 12, most: 20}}, {judge: {type: embedding, good: good, bad: bad}}, "
            "{judge: long_words, keep_top: 0.9}]")
    path = recipe(tmp_path, five, GOAL)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRYPLICITY_CACHE": str(tmp_path / "cache")}
    lines = [[*prepare_line(path, tmp_path / name), "--workers", "1", "--plugin", str(PLUGIN)] for name in ("a", "b")]
    done = subprocess.run(lines[0], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    killed = killed_and_gone_on_with(lines[1], tmp_path / "b", tmp_path / "a", 10, environment)
    assert len(killed) >= 8, killed  # the others came just when it ended
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    for made in ("perplexity/model.safetensors", "embedding/head.json"):
        one, other = ((tmp_path / name / "work" / "judges" / made).read_bytes() for name in ("a", "b"))
        assert one == other, made
    said = json.loads((tmp_path / "b" / "report.json").read_text())
    assert len(said["judges"]) == 5 and said["documents"] > 30 and said["dropped"] >= 3
    assert (tmp_path / "b" / "run" / "model.safetensors").exists()
