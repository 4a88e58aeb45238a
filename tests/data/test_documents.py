"""Reading a source into the cache, and the split."""

import json

import pytest

from tryplicity import Document, UserError
from tryplicity.data.documents import HELD_OUT_SHARE, collect, split_hash


def ids(collection, held_out):
    return [d.id for d in collection.documents(held_out)]


def test_the_parts_are_disjoint_and_complete(tmp_path, make_source):
    collection = collect(make_source(documents=2000), tmp_path)
    train, heldout = ids(collection, False), ids(collection, True)
    assert not set(train) & set(heldout)
    assert sorted(train + heldout) == sorted(ids(collection, None))
    assert set(train + heldout) == {f"made/{i}" for i in range(2000)}
    assert 20 <= len(heldout) <= 65     # 40 expected


def test_the_split_looks_at_the_identity_alone(tmp_path, make_source):
    whole = collect(make_source(documents=2000), tmp_path)
    other = make_source(documents=1000, seed=3)     # fewer, and with other text
    other.documents = lambda: reversed(list(make_source.documents(other)))
    expected = {i for i in ids(whole, True) if int(i.split("/")[1]) < 1000}
    assert set(ids(collect(other, tmp_path), True)) == expected


def test_the_hash_is_the_same_on_every_machine():
    import hashlib

    digest = hashlib.blake2b(b"python/abc.py", digest_size=8).digest()
    assert split_hash("python/abc.py") == (int.from_bytes(digest, "big") >> 11) / 2**53


def test_parts_of_one_work_stay_together():
    assert len({split_hash(f"python/abc.py{part}") for part in ("", "#code", "#text")}) == 1


@pytest.mark.parametrize("documents", [2, 3, 10])
def test_a_small_corpus_still_has_both_parts(tmp_path, make_source, documents):
    collection = collect(make_source(documents=documents), tmp_path)
    assert len(ids(collection, True)) == 1 and len(ids(collection, False)) == documents - 1


def test_where_everything_would_be_held_out_one_document_trains(tmp_path, make_source):
    low = [i for i in range(2000) if split_hash(f"made/{i}") < HELD_OUT_SHARE][:3]
    source = make_source(documents=2000)
    source.documents = lambda: (Document(f"made/{i}", "some text", "text", "") for i in low)
    collection = collect(source, tmp_path)
    assert len(ids(collection, True)) == 2 and len(ids(collection, False)) == 1


def test_a_single_or_no_document_is_refused(tmp_path, make_source):
    with pytest.raises(UserError, match="single document; at least two"):
        collect(make_source(texts=["alone"]), tmp_path)
    with pytest.raises(UserError, match="the corpus is empty"):
        collect(make_source(texts=["", " \n"]), tmp_path)
    assert list((tmp_path / "documents").iterdir()) == []
    # measuring alone needs no second one; training on what was found there is refused as before
    assert [d.text for d in collect(make_source(texts=["alone"]), tmp_path, single=True).documents(True)] == ["alone"]
    with pytest.raises(UserError, match="single document; at least two"):
        collect(make_source(texts=["alone"]), tmp_path)


def test_documents_come_back_as_they_were_and_the_source_is_read_once(tmp_path, make_source):
    source = make_source(texts=["a\u2028b\r\n\x00c", "zwei Wörter\n\n語", "half a character \ud800 here"])
    kept = [d.text for d in collect(source, tmp_path).documents()]
    assert kept == ["a\u2028b\r\n\x00c", "zwei Wörter\n\n語", "half a character ? here"]
    collection = collect(source, tmp_path)
    assert source.read == 1
    sizes = [len(text.encode()) for text in kept]
    assert collection.manifest["domains"] == {"code": {"documents": 1, "bytes": sizes[0]},
                                              "text": {"documents": 2, "bytes": sizes[1] + sizes[2]}}
    assert collection.manifest["bytes"] == sum(sizes)
    lines = collection.path.read_text(encoding="utf-8").strip("\n").split("\n")
    assert [json.loads(line)["id"] for line in lines] == ids(collection, None)


def test_progress_is_a_share_where_the_source_knows_it(tmp_path, make_source):
    source, calls = make_source(documents=200), []
    collect(source, tmp_path / "a", lambda *call: calls.append(call))
    assert calls == [("reading documents", n, None) for n in (64, 128, 192)]
    source.read_share, calls[:] = 0.25, []
    collect(source, tmp_path / "b", lambda *call: calls.append(call))
    assert set(calls) == {("reading documents", 0.25, 1.0)}
