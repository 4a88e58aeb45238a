"""`tryplicity tokenizer`: trained apart from a run, and looked at."""

import json

import pytest

from tests.command_line import call
from tryplicity.components import Document
from tryplicity.data.pieces import inspect, page
from tryplicity.data.tokenizer import SMALLEST_VOCABULARY, load_tokenizer, train_tokenizer

TEXT = "the cat sat on the mat. the cat sat on the mat. a dog ran in the rain, and the rain ran on. " * 20


@pytest.fixture(scope="module")
def words():
    return train_tokenizer([TEXT], SMALLEST_VOCABULARY + 20)


def test_counts_by_hand(words):
    said = inspect(words, [Document("a", "the cat", "text", ""), Document("b", "zzz", "code", ""),
                           Document("c", "é the", "text", "")])
    tokens = {text: len(words.encode(text, add_special_tokens=False).ids) for text in ("the cat", "zzz", "é the")}
    assert tokens["zzz"] == 3
    assert said["domains"]["code"] == {"documents": 1, "bytes": 3, "tokens": 3, "bytes_per_token": 1.0}
    text = tokens["the cat"] + tokens["é the"]
    assert said["domains"]["text"] == {"documents": 2, "bytes": 13, "tokens": text, "bytes_per_token": 13 / text}
    assert said["bytes"] == 16 and said["tokens"] == text + 3 and said["not_round_trip"] == []
    ids = {i for t in tokens for i in words.encode(t, add_special_tokens=False).ids}
    assert said["never_used"] == 256 + 20 - len(ids)
    assert {"token": "z", "times": 3} in said["rarest"] and said["rarest"][0]["times"] == 1
    assert "".join(said["probes"]["a number"]) == "1234567.89" and "every document comes back" in page(said)


def test_an_empty_text_has_no_rate(words):
    assert inspect(words, [])["bytes_per_token"] is None and "-" in page(inspect(words, []))


def test_trained_on_a_folder_and_looked_at(tmp_path, capfd, monkeypatch, corpus):
    monkeypatch.setenv("TRYPLICITY_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "words.json"
    code, said, err = call(capfd, "tokenizer", "train", str(corpus), "--vocab-size", "300", "--out", str(out))
    assert code == 0 and "300 tokens" in said, err
    assert load_tokenizer(out, 300).get_vocab_size() == 300
    code, said, _ = call(capfd, "tokenizer", "inspect", str(out), "--data", str(corpus), "--json")
    assert code == 0 and json.loads(said)["vocab_size"] == 300 and json.loads(said)["not_round_trip"] == []


def test_what_is_not_written_over(tmp_path, capfd, corpus, monkeypatch):
    monkeypatch.setenv("TRYPLICITY_CACHE", str(tmp_path / "cache"))
    run = tmp_path / "run"
    run.mkdir()
    for name in ("spec.yaml", "tokenizer.json"):
        (run / name).write_text("{}")
    (tmp_path / "letter.txt").write_text("dear")
    for out, why in ((run / "tokenizer.json", "the tokenizer of the run in"),
                     (tmp_path / "letter.txt", "is not a tokenizer")):
        code, _, err = call(capfd, "tokenizer", "train", str(corpus), "--out", str(out))
        assert code == 2 and why in err
    assert (run / "tokenizer.json").read_text() == "{}"
