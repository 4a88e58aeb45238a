"""Preparation: found again, whole or not at all, the same whoever does it."""

import errno
import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from tryplicity import UserError
from tryplicity.data import bigram, cache
from tryplicity.data.prepared import prepare
from tryplicity.data.tokenizer import BOS, EOS, load_tokenizer, save_tokenizer, train_tokenizer


def visible(root):
    return sorted(str(p.relative_to(root)) for p in root.glob("*/*") if not p.name.startswith("."))


def test_the_second_time_everything_is_found(tmp_path, make_source):
    stages = []
    source = make_source(documents=80)
    first = prepare(source, 280, tmp_path, lambda stage, done, total: stages.append(stage))
    assert list(dict.fromkeys(stages)) == ["reading documents", "training the tokenizer", "tokenising"]
    stages.clear()
    second = prepare(source, 280, tmp_path, lambda stage, done, total: stages.append(stage))
    assert stages == [] and source.read == 1 and second.folder == first.folder
    assert second.identity == first.identity


def test_another_source_or_vocabulary_is_another_preparation_but_text_is_read_once(tmp_path, make_source):
    source = make_source(documents=80)
    identities = {prepare(source, 280, tmp_path).identity, prepare(source, 290, tmp_path).identity,
                  prepare(make_source(documents=80, seed=1), 280, tmp_path).identity}
    assert len(identities) == 3 and source.read == 1


def test_the_manifest_counts_what_is_there(tmp_path, make_source):
    prepared = prepare(make_source(documents=80), 280, tmp_path)
    for part, held_out in (("train", False), ("heldout", True)):
        counts = prepared.manifest["parts"][part]
        documents = list(prepared.collection.documents(held_out))
        tokens = np.fromfile(prepared.folder / f"{part}.bin", dtype=np.uint16)
        assert counts["documents"] == len(documents) == (tokens == BOS).sum() == (tokens == EOS).sum()
        assert counts["tokens"] == len(tokens) == sum(d["tokens"] for d in counts["domains"].values())
        assert counts["bytes"] == sum(len(d.text.encode()) for d in documents)
        for domain, of_domain in counts["domains"].items():
            assert of_domain["bytes"] == sum(len(d.text.encode()) for d in documents if d.domain == domain)


def test_special_tokens_written_in_a_text_are_text(tmp_path, make_source):
    prepared = prepare(make_source(texts=["a <|eos|> b", "<|bos|><|im_start|>", "c" * 9] * 10), 262, tmp_path)
    tokens = np.fromfile(prepared.folder / "train.bin", dtype=np.uint16)
    assert (tokens == EOS).sum() == (tokens == BOS).sum() == prepared.manifest["parts"]["train"]["documents"]


def test_a_given_tokenizer_is_used_and_must_fit(tmp_path, make_source):
    path = tmp_path / "mine.json"
    save_tokenizer(train_tokenizer(["the cat sat on the mat " * 5], 270), path)
    prepared = prepare(make_source(documents=80), 270, tmp_path / "cache", tokenizer=path)
    assert prepared.tokenizer_path.read_bytes() == path.read_bytes()
    assert "tokenizers" not in os.listdir(tmp_path / "cache")
    source = make_source(documents=81)
    with pytest.raises(UserError, match="270 tokens and the spec's vocab_size is 280"):
        prepare(source, 280, tmp_path / "cache", tokenizer=path)
    assert source.read == 0     # told before the work, not after


def test_vocabularies_above_65536_take_four_bytes(tmp_path, make_source):
    tokenizer = train_tokenizer(["the cat"], 262)
    tokenizer.add_tokens([f"made{i}" for i in range(66000 - 262)])
    save_tokenizer(tokenizer, tmp_path / "big.json")
    prepared = prepare(make_source(texts=["x made65700 y", "the cat made0"] * 3), 66000, tmp_path / "cache",
                       tokenizer=tmp_path / "big.json")
    assert prepared.manifest["dtype"] == "<u4" and prepared.train.tokens_N.dtype == np.uint32
    assert max(prepared.train.tokens_N.max(), prepared.heldout.tokens_N.max()) > 65535


@pytest.mark.parametrize("stage", ["reading documents", "training the tokenizer", "tokenising"])
def test_an_interruption_leaves_nothing_half_visible_and_it_can_be_done_again(tmp_path, make_source, stage):
    source = make_source(documents=80)

    def interrupt(now, done, total):
        if now == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(source, 280, tmp_path, interrupt)
    complete = {"reading documents": 0, "training the tokenizer": 2, "tokenising": 3}[stage]
    assert len(visible(tmp_path)) == complete
    assert not list(tmp_path.glob("*/.building-*"))
    assert prepare(source, 280, tmp_path).identity == prepare(source, 280, tmp_path / "other").identity


def test_what_a_killed_process_left_is_cleared_away(tmp_path, make_source):
    program = ("import os, signal, sys; from pathlib import Path; from tryplicity.data.cache import "
               "building\nwith building(Path(sys.argv[1]) / 'documents' / 'x') as folder:\n"
               "    (folder / 'half').write_text('half'); os.kill(os.getpid(), signal.SIGKILL)\n")
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    assert len(list(tmp_path.glob("documents/.building-*/half"))) == 1 and visible(tmp_path) == []
    prepare(make_source(documents=80), 280, tmp_path)
    assert not list(tmp_path.glob("*/.building-*"))


def test_two_at_once_end_with_the_same(tmp_path, make_source):
    results, barrier = [], threading.Barrier(2)

    def work():
        source = make_source(documents=80)
        waited = []

        def progress(stage, done, total):
            if stage == "reading documents" and not waited:
                waited.append(True)
                barrier.wait(timeout=20)      # both are in the middle of building the same folder

        results.append(prepare(source, 280, tmp_path, progress))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(results) == 2 and results[0].identity == results[1].identity
    assert len(visible(tmp_path)) == 4 and not list(tmp_path.glob("*/.building-*"))


def test_a_full_disk_is_told_in_a_line(tmp_path, make_source, monkeypatch):
    source = make_source(documents=80)

    def full(stage, done, total):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match=r"the disk is full.*TRYPLICITY_CACHE"):
        prepare(source, 280, tmp_path, full)
    assert visible(tmp_path) == []


def test_a_cache_that_cannot_be_made_is_told_in_a_line(tmp_path, make_source):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write here .*TRYPLICITY_CACHE"):
        prepare(make_source(documents=80), 280, tmp_path / "file" / "cache")


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.delenv("TRYPLICITY_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_root() == tmp_path / "xdg" / "tryplicity"
    monkeypatch.setenv("TRYPLICITY_CACHE", str(tmp_path / "mine"))
    assert cache.cache_root() == tmp_path / "mine"
    assert cache.cache_root(tmp_path / "given") == tmp_path / "given"


def test_the_bigram_reference_is_fitted_on_train_and_kept(tmp_path, make_source):
    prepared = prepare(make_source(documents=80), 280, tmp_path)
    parts = [[d.text.encode() for d in prepared.collection.documents(held_out)] for held_out in (False, True)]
    value = prepared.bigram_bits_per_byte()
    assert value == pytest.approx(bigram.bits_per_byte(*parts), rel=1e-12)
    assert json.loads((prepared.folder / "bigram.json").read_text()) == {"bits_per_byte": value}
    prepared.collection.path.unlink()
    assert prepared.bigram_bits_per_byte() == value


def test_every_domain_has_its_share_in_the_tokenizers_sample(tmp_path, make_source):
    from tryplicity.data.documents import collect
    from tryplicity.data.prepared import _sample

    collection = collect(make_source(documents=3000), tmp_path)
    domain = {d.text: d.domain for d in collection.documents()}
    sizes = {"code": 0, "text": 0}
    for text in _sample(collection, 100_000):
        sizes[domain[text]] += len(text.encode())
    assert 40_000 < sizes["code"] < 60_000 and 40_000 < sizes["text"] < 60_000
    everything = [d.text for d in collection.documents(held_out=False)]
    assert list(_sample(collection, 10**9)) == everything


def test_importing_the_package_loads_neither_torch_nor_datasets():
    program = ("import sys, tryplicity.data as data; [getattr(data, n) for n in data.__all__]\n"
               "print('torch' in sys.modules, 'datasets' in sys.modules)")
    command = [sys.executable, "-c", program]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.split() == ["False", "False"]


def test_the_saved_tokenizer_opens(tmp_path, make_source):
    prepared = prepare(make_source(documents=80), 280, tmp_path)
    assert load_tokenizer(prepared.tokenizer_path, 280).get_vocab_size() == 280
