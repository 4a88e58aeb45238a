"""`train --tokenizer FILE`: the run is of its tokens, keeps it, and goes on with no other."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.command_line import call
from tryplicity.data.tokenizer import load_tokenizer

SPEC = str(Path(__file__).parents[1] / "small.yaml")
OTHER = "colourless green ideas sleep furiously, 1234567 of them, in folder C:\\temp\\x "


@pytest.fixture
def tokenizer(tmp_path, capfd, monkeypatch):
    """`tokenizer(name, size)`: trained on a text of its own."""
    monkeypatch.setenv("TRYPLICITY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TRYPLICITY_TENSORBOARD", "0")

    def trained(name, size):
        texts = tmp_path / f"of-{name}"
        texts.mkdir()
        for number in range(8):
            (texts / f"{number}.txt").write_text(f"{name} {OTHER * 9}")
        out = tmp_path / f"{name}.json"
        code, said, err = call(capfd, "tokenizer", "train", str(texts), "--vocab-size", str(size), "--out", str(out))
        assert code == 0 and said.rstrip().endswith(f"--tokenizer {out}"), err
        return out

    return trained


def test_a_run_takes_the_tokenizer_that_is_given_and_goes_on_with_it(tmp_path, capfd, tokenizer, corpus):
    ours, other = tokenizer("ours", 300), tokenizer("other", 300)

    def train(steps, *more):
        return call(capfd, "train", SPEC, "--hw", "cpu", "--set", "hardware.batch=1", "--set", "vocab_size=300",
                    "--data", str(corpus), "--run", str(tmp_path / "run"), "--steps", str(steps), *more)

    code, _, err = train(1, "--tokenizer", str(ours))
    assert code == 0, err
    kept = tmp_path / "run" / "tokenizer.json"
    assert kept.read_text() == ours.read_text()
    tokens = next(folder for folder in (tmp_path / "cache" / "tokens").iterdir()
                  if (folder / "tokenizer.json").read_text() == ours.read_text())
    ends = np.load(tokens / "heldout.documents.npy")["end"]
    ids = np.fromfile(tokens / "heldout.bin", dtype="<u2")
    text = load_tokenizer(ours).decode(ids[1:int(ends[0]) - 1].tolist())
    assert text in [path.read_text() for path in corpus.iterdir()]

    code, _, err = train(2, "--resume", "--tokenizer", str(other))
    assert code == 2 and f"--tokenizer: {other} is not the tokenizer of the run" in err
    code, _, err = train(2, "--resume", "--tokenizer", str(ours))       # what it has already
    assert code == 0, err
    assert kept.read_text() == ours.read_text()


def test_one_of_another_size_or_none_at_all_is_refused_before_anything_is_written(tmp_path, capfd, tokenizer, corpus):
    wrong = tokenizer("wrong", 290)
    (tmp_path / "broken.json").write_text(json.dumps({"model": {}}))
    for path, why in ((wrong, "the tokenizer has 290 tokens and the spec's vocab_size is 300"),
                      (tmp_path / "none.json", "no tokenizer here"),
                      (tmp_path / "broken.json", "not a tokenizer.json")):
        code, _, err = call(capfd, "train", SPEC, "--hw", "cpu", "--set", "vocab_size=300", "--data", str(corpus),
                            "--run", str(tmp_path / "run"), "--steps", "1", "--tokenizer", str(path))
        assert code == 2 and why in err and not (tmp_path / "run" / "spec.yaml").exists()
