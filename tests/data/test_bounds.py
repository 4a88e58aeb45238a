"""Hostile and huge texts: no piece, token or row takes memory or time without bound, and what is cut is whole."""

import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tryplicity import Document
from tryplicity.data.documents import in_parts, split_hash
from tryplicity.data.prepared import prepare
from tryplicity.data.tokenizer import LONGEST_TOKEN, load_tokenizer, token_bytes, train_tokenizer

RUNS = {"NUL": "\0", "spaces": " ", "lines": "\n", "letters": "a", "signs": "=", "tabs": "\t", "kana": "あ"}


@pytest.mark.parametrize("sign", RUNS.values(), ids=RUNS)
def test_a_run_of_one_sign_gives_tokens_of_bounded_length(tmp_path, make_source, sign):
    texts = [f"some text number {i} " + sign * (50_000 * (i == 3) + 100) + " and its end" for i in range(40)]
    prepared = prepare(make_source(texts=texts), 300, tmp_path)
    tokenizer = load_tokenizer(prepared.tokenizer_path)
    assert 6 < max(token_bytes(tokenizer)) <= LONGEST_TOKEN
    decoded = [tokenizer.decode(part.tokens_N[start + 1:end - 1].tolist(), skip_special_tokens=False)
               for part in (prepared.train, prepared.heldout)
               for start, end in zip(part.start_D, part.end_D, strict=True)]
    assert sorted(decoded) == sorted(texts)


def test_the_text_comes_back_whatever_the_pieces(tmp_path):
    tokenizer = train_tokenizer(["def f(x):\n        return  x\r\n\n\n" * 9, "don't 12345 => über 語!!"], 280)
    for text in ("\0" * 1000, " " * 1000 + "x", "a" * 1000, "\r\n" * 500, "x\n" + "\t " * 300, "=" * 300 + "\n" * 300):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text


def test_tokens_of_any_length_in_a_given_tokenizer_are_counted(tmp_path, make_source):
    from tryplicity.data.tokenizer import save_tokenizer

    tokenizer = train_tokenizer(["the cat"], 262)
    tokenizer.add_tokens(["z" * 70_000])        # more than 16 bits count
    save_tokenizer(tokenizer, tmp_path / "long.json")
    prepared = prepare(make_source(texts=["x y", "y z" + "z" * 70_000, "z x"]), 263, tmp_path / "cache",
                       tokenizer=tmp_path / "long.json")
    assert prepared.train.token_bytes_V[262] == 70_000


@given(st.text(alphabet="ab \n語", max_size=400), st.integers(2, 50))
@settings(max_examples=100, deadline=None)
def test_a_long_document_becomes_parts_of_one_work(text, longest):
    for id_ in ("rows.jsonl:1", "work#code"):
        parts = list(in_parts(Document(id_, text, "text", "u"), longest))
        assert "".join(part.text for part in parts) == text
        assert all(0 < len(part.text) <= longest for part in parts) or text == ""
        assert len({part.id for part in parts}) == len(parts) and len({split_hash(part.id) for part in parts}) == 1
        if len(parts) == 1:
            assert parts[0].id == id_


MEMORY = """
import json, resource, sys
from tryplicity import load_plugins
from tryplicity.data import parse_source, prepare
registry = load_plugins().registry
import pyarrow, pyarrow.parquet, tokenizers
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
prepared = prepare(parse_source(registry, sys.argv[1]), 300, sys.argv[2])
print(json.dumps({"grown": peak() - before, "documents": prepared.manifest["parts"]["train"]["documents"]
                  + prepared.manifest["parts"]["heldout"]["documents"]}))
"""


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_row_of_many_megabytes_costs_a_few_times_its_size(tmp_path, kind):
    """4 MB in one row: at 200 bytes a byte that was 800 MB."""
    rows = [f"a small row number {i}" for i in range(20)]
    rows[7] = "some words of a long text, " * 160_000
    rows[9] = " " * 1_000_000 + "x"
    folder = tmp_path / "texts"
    folder.mkdir()
    if kind == "jsonl":
        (folder / "x.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"text": rows}), folder / "x.parquet")
    done = subprocess.run([sys.executable, "-c", MEMORY, str(folder), str(tmp_path / "cache")], capture_output=True,
                          text=True, timeout=300, check=True)
    found = json.loads(done.stdout)
    assert found["documents"] > 4_000_000 // (1 << 18) and found["grown"] < 200, found
