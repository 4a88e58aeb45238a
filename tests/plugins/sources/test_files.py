import json
import os
import socket
import subprocess
import sys

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
    with pytest.raises(UserError, match=r"latin\.txt: not UTF-8 at byte 15002 \(0xfc\); save it as UTF-8"):
        read(path)
    with pytest.raises(UserError, match="not UTF-8 at byte 15002 "):
        read(path, document_bytes=1000)
    parts = read(path, document_bytes=1000, bad_rows="skip")
    assert set("".join(d.text for d in parts)) == set("good\n") and 3000 * 5 - sum(len(d.text) for d in parts) < 2000
    lines = tmp_path / "x.jsonl"
    lines.write_bytes(b'{"text": "fine"}\n{"text": "\xff"}\n')
    with pytest.raises(UserError, match=r"x\.jsonl:2: not UTF-8: byte 10 of it is 0xff; mend it, or leave such rows "
                                        r"out: '\{type: files, path: \S+, bad_rows: skip\}'"):
        read(lines)


def test_text_that_is_not_utf8_can_be_left_out_and_is_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff")
    (tmp_path / "b.txt").write_text("good")
    (tmp_path / "c.jsonl").write_bytes(b'{"text": "fine"}\n{"text": "\xff"}\n')
    binary = pa.array([b"ok", b"\xff"], pa.binary())
    table = pa.table({"text": pa.StringArray.from_buffers(2, binary.buffers()[1], binary.buffers()[2])})
    pq.write_table(table, tmp_path / "d.parquet")
    source = Files(Files.Config(str(tmp_path), bad_rows="skip"))
    assert [d.text for d in source.documents()] == ["good", "fine", "ok"]
    assert source.left_out.counts == {"not UTF-8": 3}
    assert source.left_out.examples == {"not UTF-8": ["a.txt", "c.jsonl:2", "d.parquet:2"]}
    (tmp_path / "c.jsonl").unlink()
    with pytest.raises(UserError, match=r"d\.parquet:2: not UTF-8"):
        read(tmp_path)


def test_what_is_left_out_of_a_folder_is_counted_by_reason(tmp_path):
    """Nothing hangs (a pipe is not opened), nothing goes in circles, nothing stops the rest."""
    folder = tmp_path / "notes"
    (folder / "C# notes").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / "C# notes" / "a.txt").write_text("one")
    (folder / "linked.txt").symlink_to(folder / "C# notes" / "a.txt")
    (folder / "gone.txt").symlink_to(folder / "nowhere")
    (folder / "round.txt").symlink_to(folder / "round.txt")
    (folder / "C# notes" / "loop").symlink_to(folder)
    os.mkfifo(folder / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.path.relpath(folder / "socket.txt"))
    for name in ("x.png", "y.PNG", "Makefile"):
        (folder / name).write_bytes(b"\x89PNG")
    (folder / "old.txt").write_bytes("Grüße".encode("latin-1"))
    (folder / "nul.txt").write_bytes(b"\0" * 100_000)
    (folder / "empty.txt").write_text("")
    (folder / "blank.md").write_text(" \n")
    (folder / "rows.jsonl").write_text('{"text": null}\n\n{"text": "two"}\n{"text": ""}\n')
    source = Files(Files.Config(str(folder)))
    assert [(d.id, d.text) for d in source.documents()] == [
        ("linked.txt", "one"), ("rows.jsonl:3", "two"), ("C%23 notes/a.txt", "one")]
    assert source.left_out.as_dict() == {
        "empty": 4, "no regular file": 2, "of another kind (.png)": 2, "binary": 1, "hidden": 1,
        "linked to a folder": 1, "linked to nothing": 1, "not UTF-8": 1, "of another kind (no suffix)": 1,
        "unreadable (Too many levels of symbolic links)": 1}
    assert "1 linked to a folder (C# notes/loop)" in str(source.left_out)
    list(source.documents())
    assert source.left_out.total == 15      # counted anew each time


def test_what_may_not_be_read_is_counted():
    """As a user who is not root."""
    program = """
import encodings.utf_8_sig, os, tempfile
from tryplicity_plugins.sources.files import Files
from tryplicity import Document, Source, UserError
tempfile.gettempdir()
if os.getuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
with tempfile.TemporaryDirectory() as folder:
    os.mkdir(f"{folder}/locked"); os.mkdir(f"{folder}/open")
    for name in ("a.txt", "locked/b.txt", "open/c.txt", "secret.txt"):
        open(f"{folder}/{name}", "w").write(name)
    os.chmod(f"{folder}/locked", 0); os.chmod(f"{folder}/secret.txt", 0)
    source = Files(Files.Config(folder))
    print([d.text for d in source.documents()], source.left_out)
    os.chmod(f"{folder}/locked", 0o700)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == ("['a.txt', 'open/c.txt'] left out 2 items: 2 unreadable (Permission denied) "
                           "(locked/, secret.txt)\n"), done.stderr


def test_pages_and_source_code_are_read(tmp_path):
    (tmp_path / "a.html").write_text(
        "<!doctype html><html><head><title>Fish &amp; chips</title><style>p {}</style></head><body><nav>menu</nav>"
        "<h1>Caf&eacute;</h1><p>One <b>two</b>\n three<script>if (1 < 2) no()</script><p>4 &lt; 5<!-- no -->"
        "<pre>for x:\n    y</pre><ul><li>x<li>z</ul><table><tr><td>1<td>2</table></body></html>")
    (tmp_path / "b.htm").write_bytes("<meta charset='iso-8859-1'><p>Grüße".encode("latin-1"))
    (tmp_path / "c.rst").write_text("Title\n=====\n")
    (tmp_path / "d.py").write_text("print('x')\n")
    (tmp_path / "e.C").write_text("int x;\n")
    documents = {d.id: (d.text, d.domain) for d in read(tmp_path)}
    assert documents == {
        "a.html": ("Fish & chips\n\nCafé\n\nOne two three\n\n4 < 5\n\nfor x:\n    y\n\nx\nz\n\n1 2\n", "text"),
        "b.htm": ("Grüße\n", "text"), "c.rst": ("Title\n=====\n", "text"),
        "d.py": ("print('x')\n", "code"), "e.C": ("int x;\n", "code")}


def test_a_byte_order_mark_is_one_only_where_a_file_begins(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeffone\n" * 3000, encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('\ufeff{"text": "\ufeffx"}\n{"text": "\ufeffy"}\n', encoding="utf-8")
    documents = read(tmp_path, document_bytes=1000)
    assert "".join(d.text for d in documents[:-2]) == ("\ufeffone\n" * 3000)[1:]
    assert [d.text for d in documents[-2:]] == ["\ufeffx", "\ufeffy"]


def test_nothing_to_read_is_told(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        read(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no text here: looked for \.csv, .*\.txt, .*source code"):
        read(tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(UserError, match=r"the corpus is empty: none of its files .*; left out 1 item: 1 empty"):
        read(tmp_path)
    (tmp_path / "x.pdf").write_text("x")
    with pytest.raises(UserError, match=r"x\.pdf: \.pdf is not read"):
        read(tmp_path / "x.pdf")
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(UserError, match=r"pipe\.txt: neither a file nor a folder"):
        read(tmp_path / "pipe.txt")


@pytest.mark.parametrize("line, reason", [
    ('{"text": 1}', "no text under the key 'text'"),
    ('{"body": "x"}', "no text under the key 'text'"),
    ("[1]", "no text under the key 'text'"),
    ("{", "not JSON"),
    ("[" * 100_000, "not JSON"),
])
def test_odd_rows_stop_with_their_place_or_are_counted(tmp_path, line, reason):
    (tmp_path / "x.jsonl").write_text('{"text": "fine"}\n' + line + '\n{"text": "too"}\n' + line + "\n")
    with pytest.raises(UserError, match=rf"x\.jsonl:2: {reason}.*; mend it, or leave such rows out: .*bad_rows: skip"):
        read(tmp_path)
    source = Files(Files.Config(str(tmp_path), bad_rows="skip"))
    assert [d.text for d in source.documents()] == ["fine", "too"]
    assert str(source.left_out) == (f"left out 2 items: 2 {'with ' * reason.startswith('no ')}{reason} "
                                    "(x.jsonl:2, x.jsonl:4)")


def test_a_row_longer_than_the_limit_is_odd(tmp_path, monkeypatch):
    monkeypatch.setattr("tryplicity_plugins.sources.rows.MOST_BYTES", 1 << 20)
    with open(tmp_path / "x.jsonl", "w") as file:
        for size in (5, 3 << 20, 1 << 19, 1 << 20):
            file.write('{"text": "' + "a" * size + '"}\n')
        file.write('{"text": "last"}')
    source = Files(Files.Config(str(tmp_path), bad_rows="skip"))
    assert [(d.id, len(d.text)) for d in source.documents()] == [("x.jsonl:1", 5), ("x.jsonl:3", 1 << 19),
                                                                ("x.jsonl:5", 4)]
    assert source.left_out.as_dict() == {"longer than 1 MiB": 2} and source.read_share == 1.0


def test_broken_parquet_files_are_told_or_counted(tmp_path):
    pq.write_table(pa.table({"body": ["x"], "n": [1]}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match="no column 'text' of text: its columns are body, n"):
        read(tmp_path, text_key="text")
    with pytest.raises(UserError, match="no column 'n' of text"):
        read(tmp_path, text_key="n")
    whole = (tmp_path / "x.parquet").read_bytes()
    (tmp_path / "x.parquet").write_bytes(whole[:-20])
    with pytest.raises(UserError, match=r"x\.parquet: not a Parquet file, or one cut short"):
        read(tmp_path)
    (tmp_path / "y.txt").write_text("good")
    source = Files(Files.Config(str(tmp_path), bad_rows="skip"))
    assert [d.text for d in source.documents()] == ["good"]
    assert source.left_out.as_dict() == {"not a Parquet file, or one cut short": 1}


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "binary", "large_binary", "binary_view",
                                  "dictionary"])
def test_every_way_that_parquet_keeps_texts(tmp_path, kind):
    kind = pa.dictionary(pa.int32(), pa.string()) if kind == "dictionary" else getattr(pa, kind)()
    texts = ["one", "zwei ü", None, "one", ""]
    pq.write_table(pa.table({"text": pa.array(texts).cast(kind), "n": range(5)}), tmp_path / "x.parquet",
                   row_group_size=2)
    source = Files(Files.Config(str(tmp_path)))
    assert [(d.id, d.text) for d in source.documents()] == [
        ("x.parquet:1", "one"), ("x.parquet:2", "zwei ü"), ("x.parquet:4", "one")]
    assert source.left_out.as_dict() == {"empty": 2} and source.read_share == pytest.approx(0.8, abs=1e-2)


def test_names_with_our_separators_stay_apart(tmp_path):
    """Different files have different ids, and a `#` in a name makes nothing one work."""
    from tryplicity.data.documents import split_hash

    names = ["shard #1.txt", "shard #2.txt", "shard %231.txt", "C#/a.txt", "C#/b.txt", "a:1.txt", "a?part=1.txt",
             "+.txt", "new\nline.txt", "tab\t.txt"]
    (tmp_path / "C#").mkdir()
    for name in names:
        (tmp_path / name).write_text(name)
    for byte in (b"\xfe", b"\xff"):
        with open(os.fsencode(tmp_path) + b"/" + byte + b".txt", "w") as file:
            file.write("a name that is no text")
    documents = read(tmp_path)
    ids = [document.id for document in documents]
    assert len(set(ids)) == len({split_hash(id) for id in ids}) == len({d.url for d in documents}) == len(names) + 2
    assert not any(set(id) & set("#:?\n\t") for id in ids) and [id.encode() for id in ids]


def test_the_fingerprint_follows_the_files_and_the_options(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")

    def fingerprint(**options):
        return Files(Files.Config(str(tmp_path), **options)).fingerprint()

    seen = [fingerprint(), fingerprint(domain="code")]
    assert fingerprint() == seen[0]
    (tmp_path.parent / "link").symlink_to(tmp_path)
    for same in (f"{tmp_path}/", f"{tmp_path}/../{tmp_path.name}", str(tmp_path.parent / "link")):
        assert Files(Files.Config(same)).fingerprint() == seen[0]
    path.write_text("three")
    seen.append(fingerprint())
    os.utime(path, (1, 1))
    seen.append(fingerprint())
    (tmp_path / "b.txt").write_text("two")
    seen.append(fingerprint())
    (tmp_path / "c.png").write_text("what is left out is told again")
    seen.append(fingerprint())
    assert len(set(seen)) == 6


def test_the_share_read_grows_to_one(tmp_path):
    for name in "ab":
        rows = [json.dumps({"text": f"{name}{i}"}) for i in range(10)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    source = Files(Files.Config(str(tmp_path)))
    shares = [source.read_share for _ in source.documents()]
    assert shares == sorted(shares) and shares[-1] == 1.0 and 0 < shares[0] < 0.1
