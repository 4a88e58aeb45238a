import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tryplicity import UserError
from tryplicity_plugins.sources.files import Files


def read(path, **options):
    return list(Files(Files.Config(str(path), **options)).documents())


def test_a_folder_of_every_kind_of_file_in_a_fixed_order(tmp_path):
    (tmp_path / "b.txt").write_text("plain\r\ntext")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "n.MD").write_bytes(b"\xef\xbb\xbf# Title\n")
    (tmp_path / "c.jsonl").write_text('{"text": "one"}\n\n{"text": "zwei \\u00fc", "more": 1}\n')
    pq.write_table(pa.table({"text": ["p", None, "q"], "n": [1, 2, 3]}), tmp_path / "d.parquet")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.txt").write_text("no")
    documents = read(tmp_path)
    assert [(d.id, d.text) for d in documents] == [
        ("b.txt", "plain\ntext"), ("c.jsonl:1", "one"), ("c.jsonl:3", "zwei ü"), ("d.parquet:1", "p"),
        ("d.parquet:3", "q"), ("a/n.MD", "# Title\n")]
    assert documents[0].url == (tmp_path / "b.txt").resolve().as_uri()
    assert {d.domain for d in read(tmp_path, domain="code")} == {"code"}


def test_one_file_and_another_key(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"body": "one"}\n')
    assert [(d.id, d.text) for d in read(tmp_path / "x.jsonl", text_key="body")] == [("x.jsonl:1", "one")]
    pq.write_table(pa.table({"body": pa.array(["big"], pa.large_string())}), tmp_path / "y.parquet")
    assert [d.text for d in read(tmp_path / "y.parquet", text_key="body")] == ["big"]


@pytest.mark.parametrize("text", ["One paragraph of text.\n\n" * 400, "a line\n" * 2000, "word " * 4000,
                                  "語" * 5000])
def test_a_long_file_is_cut_into_documents_that_join_to_the_whole(tmp_path, text):
    (tmp_path / "long.txt").write_text(text, encoding="utf-8")
    documents = read(tmp_path, document_bytes=1000)
    assert "".join(d.text for d in documents) == text
    assert len({d.id for d in documents}) == len(documents) > 5
    assert all(len(d.text.encode()) <= 2000 for d in documents)
    if "paragraph" in text:
        assert all(d.text.endswith(".\n\n") for d in documents)
    assert len(read(tmp_path, document_bytes=100_000)) == 1


def test_text_that_is_not_utf8_names_the_file_and_the_byte(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"good\n" * 3000 + "Gr\u00fc\u00dfe".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.txt: not UTF-8 at byte 15002 \(0xfc\); save the file as "
                                         "UTF-8"):
        read(tmp_path)
    with pytest.raises(UserError, match="not UTF-8 at byte 15002 "):
        read(tmp_path, document_bytes=1000)
    lines = tmp_path / "x.jsonl"
    path.rename(tmp_path / "latin.bin")
    lines.write_bytes(b'{"text": "fine"}\n{"text": "\xff"}\n')
    with pytest.raises(UserError, match=r"x\.jsonl: not UTF-8 at byte 27 "):
        read(tmp_path)


def test_text_that_is_not_utf8_can_be_left_out_and_is_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff")
    (tmp_path / "b.txt").write_text("good")
    (tmp_path / "c.jsonl").write_bytes(b'{"text": "fine"}\n{"text": "\xff"}\n')
    binary = pa.array([b"ok", b"\xff"], pa.binary())
    table = pa.table({"text": pa.StringArray.from_buffers(2, binary.buffers()[1], binary.buffers()[2])})
    pq.write_table(table, tmp_path / "d.parquet")
    source = Files(Files.Config(str(tmp_path), encoding_errors="skip"))
    assert [d.text for d in source.documents()] == ["good", "fine", "ok"] and source.skipped == 3
    (tmp_path / "a.txt").unlink()
    (tmp_path / "c.jsonl").unlink()
    with pytest.raises(UserError, match=r"d\.parquet: row 2: not UTF-8"):
        read(tmp_path)


def test_nothing_to_read_is_told(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        read(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no text here: looked for \*\.txt, \*\.md, \*\.jsonl, \*\.parquet"):
        read(tmp_path)
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="the corpus is empty: none of its 2 files"):
        read(tmp_path)
    (tmp_path / "x.pdf").write_text("x")
    with pytest.raises(UserError, match=r"x\.pdf: \.pdf is not read"):
        read(tmp_path / "x.pdf")


@pytest.mark.parametrize("line, message", [
    ('{"text": 1}', "x.jsonl:2: no text under the key 'text': its keys are text"),
    ('{"body": "x"}', "x.jsonl:2: no text under the key 'text': its keys are body"),
    ("[1]", "x.jsonl:2: no text under the key 'text': it is not an object"),
    ("{", "x.jsonl:2: not JSON"),
])
def test_broken_rows_name_the_line(tmp_path, line, message):
    (tmp_path / "x.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(UserError, match=message):
        read(tmp_path)


def test_broken_parquet_files_are_told(tmp_path):
    pq.write_table(pa.table({"body": ["x"], "n": [1]}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match="no column 'text' of text; its columns are body, n"):
        read(tmp_path)
    with pytest.raises(UserError, match="no column 'n' of text"):
        read(tmp_path, text_key="n")
    whole = (tmp_path / "x.parquet").read_bytes()
    (tmp_path / "x.parquet").write_bytes(whole[:-20])
    with pytest.raises(UserError, match=r"x\.parquet: not a Parquet file, or one cut short"):
        read(tmp_path)


def test_the_fingerprint_follows_the_files_and_the_options(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")

    def fingerprint(**options):
        return Files(Files.Config(str(tmp_path), **options)).fingerprint()

    seen = [fingerprint(), fingerprint(domain="code")]
    assert fingerprint() == seen[0]
    path.write_text("three")
    seen.append(fingerprint())
    os.utime(path, (1, 1))
    seen.append(fingerprint())
    (tmp_path / "b.txt").write_text("two")
    seen.append(fingerprint())
    assert len(set(seen)) == 5


def test_the_share_read_grows_to_one(tmp_path):
    for name in "ab":
        rows = [json.dumps({"text": f"{name}{i}"}) for i in range(10)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    source = Files(Files.Config(str(tmp_path)))
    shares = [source.read_share for _ in source.documents()]
    assert shares == sorted(shares) and shares[-1] == 1.0 and 0 < shares[0] < 0.1
