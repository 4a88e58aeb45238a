"""`tryplicity eval`: bits per byte of held-out text, against the training's own score and a plain forward pass."""

import hashlib
import json
import math
import shutil

import pytest
import torch
import torch.nn.functional as F

from tests.test_cli import call
from tryplicity.data.documents import split_hash
from tryplicity.data.tokenizer import BOS, EOS
from tryplicity.inference.packed import load_model
from tryplicity.training.metrics import read_lines


def told(capfd, *arguments):
    code, out, err = call(capfd, "eval", *map(str, arguments), "--json")
    assert code == 0, err
    return json.loads(out)


def held_out_of(texts):
    """(file name, text) of the documents that are held out, which their hash alone says."""
    documents = {path.name: path.read_text() for path in sorted(texts.iterdir())}
    return {name: text for name, text in documents.items() if split_hash(name) < 0.02}


def test_the_figure_is_the_training_s_own_and_the_domains_add_up_to_it(capfd, run, texts):
    said = told(capfd, run)
    trained = [line["validation_bits_per_byte"] for line in read_lines(run / "metrics.jsonl")
               if "validation_bits_per_byte" in line][-1]
    assert said["bits_per_byte"] == pytest.approx(trained, rel=1e-4)
    domains = said["domains"]
    assert set(domains) <= {"text", "code", "math"} and len(domains) == 2
    for what in ("documents", "bytes", "tokens"):
        assert said[what] == sum(domain[what] for domain in domains.values())
    assert said["bits_per_byte"] * said["bytes"] == pytest.approx(
        sum(domain["bits_per_byte"] * domain["bytes"] for domain in domains.values()))
    assert said["held_out"]["own"] and said["training_data"]["unchanged"]
    assert said["yardsticks"]["ppm"] > 0 and 0 <= said["yardsticks"]["overlap"] <= 1


def test_each_domain_is_what_a_plain_pass_over_its_documents_gives(capfd, run, registry, tmp_path):
    """Documents no longer than a context, each alone in the model: no row cuts one where there is one document."""
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("the model reads a list")
    said = told(capfd, run, "--data", folder)
    model, _, tokenizer, _ = load_model(run, registry, ternary=False)
    ids = [BOS, *tokenizer.encode("the model reads a list", add_special_tokens=False).ids, EOS]
    assert len(ids) <= 48
    with torch.no_grad():
        nats = F.cross_entropy(model(torch.tensor([ids]))[0, :-1], torch.tensor(ids[1:]), reduction="sum").item()
    assert said["bits_per_byte"] == pytest.approx(nats / math.log(2) / 22, rel=1e-4)
    assert (said["documents"], said["bytes"], said["tokens"]) == (1, 22, len(ids) - 1)


def test_the_identity_is_of_the_text_and_of_nothing_else(capfd, run, texts, tmp_path):
    wanted = tmp_path / "held-out"
    wanted.mkdir()
    for name, text in held_out_of(texts).items():
        (wanted / name).write_text(text)
    own, copied = told(capfd, run), told(capfd, run, "--data", wanted)
    digest = hashlib.sha256()
    for path in sorted(wanted.iterdir()):
        digest.update(path.stat().st_size.to_bytes(8, "little") + path.read_bytes())
    assert own["held_out"]["identity"] == copied["held_out"]["identity"] == digest.hexdigest()
    assert own["bits_per_byte"] == pytest.approx(copied["bits_per_byte"], rel=1e-6)
    assert {k: own["yardsticks"][k] for k in ("bigram", "xz", "ppm", "overlap")} == pytest.approx(
        {k: copied["yardsticks"][k] for k in ("bigram", "xz", "ppm", "overlap")})
    # the training's source with the training's share: what was held out
    share = told(capfd, run, "--data", texts, "--share", 0.02)
    assert share["held_out"]["identity"] == own["held_out"]["identity"] and share["documents"] == own["documents"]
    (wanted / sorted(path.name for path in wanted.iterdir())[0]).write_text("other words, nothing else")
    assert told(capfd, run, "--data", wanted)["held_out"]["identity"] != digest.hexdigest()


def test_what_was_trained_on_is_found_in_the_overlap(capfd, run, texts, tmp_path):
    seen = next(path for path in sorted(texts.glob("*.txt")) if split_hash(path.name) >= 0.02)
    shutil.copy(seen, tmp_path / "seen.txt")
    assert told(capfd, run, "--data", tmp_path / "seen.txt")["yardsticks"]["overlap"] == 1


def test_a_checkpoint_and_an_exported_file_are_measured_too(capfd, run, tmp_path, texts):
    whole, early = told(capfd, run), told(capfd, run, "--checkpoint", "step-4")
    assert early["bits_per_byte"] > whole["bits_per_byte"]
    assert told(capfd, run, "--checkpoint", "8")["bits_per_byte"] == pytest.approx(whole["bits_per_byte"], rel=1e-6)
    file = tmp_path / "small.safetensors"
    assert call(capfd, "export", str(run), "--rest", "int8", "--out", str(file))[0] == 0
    code, _, err = call(capfd, "eval", str(file))
    assert code == 2 and "give --data SOURCE" in err
    alone = told(capfd, file, "--data", texts, "--share", "0.02")
    assert alone["held_out"]["identity"] == whole["held_out"]["identity"] and alone["yardsticks"]["ppm"] is None
    assert alone["bits_per_byte"] == pytest.approx(whole["bits_per_byte"], rel=0.02)
    code, page, _ = call(capfd, "eval", str(file), "--data", str(texts))
    assert code == 0 and "overlap with the training text: not known" in page


def test_the_page_says_what_the_json_says(capfd, run):
    said = told(capfd, run)
    code, page, err = call(capfd, "eval", str(run))
    assert code == 0 and "scoring" in err
    assert f"{said['bits_per_byte']:.3f}" in page and said["held_out"]["identity"][:16] in page
    for domain, figures in said["domains"].items():
        assert f"{figures['bits_per_byte']:.3f}" in next(line for line in page.splitlines() if line.startswith(domain))


@pytest.mark.parametrize("arguments, line", [
    (["{run}", "--checkpoint", "step-3"], "no such checkpoint; there is step-4, step-8"),
    (["{run}", "--share", "0.5"], "--share is for --data"),
    (["{run}", "--data", "{run}/nowhere"], "nowhere"),
    (["{run}", "--data", "{texts}", "--share", "1e-9"], "none has so low a hash"),
    (["{run}/nothing"], "there is no such run folder"),
], ids=["no such checkpoint", "share alone", "no such data", "nothing chosen", "no run"])
def test_what_is_wrong_is_one_line(capfd, run, texts, arguments, line):
    code, out, err = call(capfd, "eval", *(argument.format(run=run, texts=texts) for argument in arguments))
    assert code == 2 and line in err.replace("\n", " ") and not out


def test_data_that_changed_is_said(capfd, run, texts, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    data = json.loads((copy / "data.json").read_text())
    (copy / "data.json").write_text(json.dumps({**data, "fingerprint": "another"}))
    code, out, err = call(capfd, "eval", str(copy), "--json")
    assert code == 0 and "no longer gives the documents" in err and not json.loads(out)["training_data"]["unchanged"]
    (copy / "data.json").write_text("{}")
    code, _, err = call(capfd, "eval", str(copy))
    assert code == 2 and "give --data SOURCE" in err
    code, out, err = call(capfd, "eval", str(copy), "--data", str(texts), "--json")
    assert code == 0 and "overlap with the training text is not known" in err
    assert json.loads(out)["training_data"] is None
