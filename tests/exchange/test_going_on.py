"""What comes in goes on: with its own tokenizer as any run, trained, scored, served and packed."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from tests.command_line import call
from tests.exchange.models import configs, save
from tryplicity import load_plugins
from tryplicity.data.tokenizer import load_tokenizer
from tryplicity.data.vocabulary import vocabulary_of
from tryplicity.exchange.importing import import_model
from tryplicity.inference import chat
from tryplicity.inference.engine import Engine

REGISTRY = load_plugins().registry


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("here")
    save(configs()["llama"], folder / "there")
    import_model(folder / "there", folder / "run", REGISTRY, context_length=64)
    return folder / "run"


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "texts").mkdir()
    for number in range(40):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"the other thing {number} is not the thing. " * 12)
    return tmp_path / "texts"


def test_a_training_with_its_tokenizer_keeps_what_the_special_tokens_are(run, texts, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("TRYPLICITY_CACHE", str(tmp_path / "cache"))
    code, _, err = call(capfd, "train", str(run / "spec.yaml"), "--hw", "cpu", "--data", f"files:{texts}", "--run",
                        str(tmp_path / "mine"), "--steps", "2", "--tokenizer", str(run / "tokenizer.json"),
                        "--set", "hardware.batch=2", "--set", "hardware.accumulation=1")
    assert code == 0, err
    due = vocabulary_of(load_tokenizer(run / "tokenizer.json"))
    assert vocabulary_of(load_tokenizer(tmp_path / "mine" / "tokenizer.json")) == due
    engine = Engine.load(tmp_path / "mine", REGISTRY)
    assert engine.vocabulary == due and engine.card.chat
    engine.close()


def test_a_chat_phase_writes_conversations_in_the_models_own_template(run, texts, tmp_path, capfd, monkeypatch):
    """From trained weights on: what is learnt is the assistant's words and the template's own end of them."""
    monkeypatch.setenv("TRYPLICITY_CACHE", str(tmp_path / "cache"))
    rows = [{"messages": [{"role": "user", "content": f"the thing {n}?"}, {"role": "assistant", "content": f"No {n}."}]}
            for n in range(40)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, err = call(capfd, "train", str(run / "spec.yaml"), "--hw", "cpu", "--data", f"files:{texts}", "--run",
                          str(tmp_path / "mine"), "--steps", "2", "--from", str(run), "--chat-data",
                          str(tmp_path / "chats.jsonl"), "--set", "phases=[{kind: pretrain}, {kind: chat}]",
                          "--set", "hardware.batch=2", "--set", "hardware.accumulation=1")
    assert code == 0, err
    assert "held-out bits per byte of answers: " in out + err and " before the first step, " in out + err
    (path,) = (tmp_path / "cache" / "tokens").glob("*/train.mask.bin")
    tokenizer, mask = load_tokenizer(run / "tokenizer.json"), np.fromfile(path, np.uint8)
    ids = np.fromfile(path.with_name("train.bin"), "<u2")
    written = tokenizer.decode(ids.tolist(), skip_special_tokens=False)
    assert written.count("<s>[user] the thing ") == written.count("</s>\n[assistant] No ") > 30
    learnt = tokenizer.decode(ids[mask == 1].tolist(), skip_special_tokens=False)
    assert re.fullmatch(r"(No \d+\.</s>)+", learnt), repr(learnt[:60])
    engine, before = Engine.load(tmp_path / "mine", REGISTRY), Engine.load(run, REGISTRY)
    messages = rows[0]["messages"][:1]
    assert chat.prompt(engine, messages) == chat.prompt(before, messages)
    assert engine.vocabulary.ends == before.vocabulary.ends == {260, 261} and engine.card.chat
    engine.close()
    before.close()


def test_it_is_scored_on_texts(run, texts, capfd):
    code, out, err = call(capfd, "eval", str(run), "--data", f"files:{texts}", "--json")
    assert code == 0, err
    assert 0 < json.loads(out)["bits_per_byte"] < 20


def test_exported_in_one_file_it_is_the_same(run, tmp_path, capfd):
    code, _, err = call(capfd, "export", str(run), "--linear", "int8", "--out", str(tmp_path / "one.safetensors"))
    assert code == 0, err
    engine, packed = Engine.load(run, REGISTRY), Engine.load(tmp_path / "one.safetensors", REGISTRY)
    assert packed.vocabulary == engine.vocabulary and packed.card.chat
    assert packed.encode("the other\n") == engine.encode("the other\n")
    engine.close()
    packed.close()
