"""What files people have: compressed, .json, .csv, web archives; a column of text by its name or by a guess."""

import bz2
import csv
import gzip
import io
import json
import lzma
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tryplicity import UserError
from tryplicity_plugins.sources.files import Files
from tryplicity_plugins.sources.rows import text_column

PACKED = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress,
          ".zst": lambda data: pa.compress(data, codec="zstd", asbytes=True)}


def source_of(path, **options):
    return Files(Files.Config(str(path), **options))


def read(path, **options):
    return [(d.id, d.text) for d in source_of(path, **options).documents()]


@pytest.mark.parametrize("suffix", PACKED)
def test_compressed_files_hold_what_the_plain_ones_do(tmp_path, suffix):
    rows = "".join(json.dumps({"text": f"row {n} ü"}) + "\n" for n in range(3000)).encode()
    texts = {"a.jsonl": rows, "b.csv": b"text\nfrom a table\n", "c.html": "<p>Grüße".encode(), "d.txt": b"plain\n",
             "e.py": b"x = 1\n"}
    for name, data in texts.items():
        half = len(data) // 2       # in two members, or frames, as parallel compressors write them
        (tmp_path / f"{name}{suffix}").write_bytes(PACKED[suffix](data[:half]) + PACKED[suffix](data[half:]))
    source = source_of(tmp_path)
    shares, found = [], {}
    for document in source.documents():
        found[document.id] = document.text
        shares.append(source.read_share)
    assert found == {**{f"a.jsonl{suffix}:{n + 1}": f"row {n} ü" for n in range(3000)},
                     f"b.csv{suffix}:2": "from a table", f"c.html{suffix}": "Grüße\n", f"d.txt{suffix}:1": "plain\n",
                     f"e.py{suffix}:1": "x = 1\n"}
    assert shares == sorted(shares) and shares[-1] == 1.0 and not source.left_out
    assert {d.domain for d in source.documents() if ".py" in d.id} == {"code"}


@pytest.mark.parametrize("suffix", PACKED)
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.csv", "a.json", "a.html"])
def test_one_cut_short_is_told_or_counted_and_what_was_read_is_kept(tmp_path, name, suffix):
    rng = random.Random(0)
    rows = [f"{rng.getrandbits(8000):x}" for _ in range(1500)]      # hardly shrinks: half the file is half the rows
    text = {"a.jsonl": "".join(json.dumps({"text": row}) + "\n" for row in rows), "a.txt": "\n".join(rows),
            "a.csv": "\n".join(["text", *rows]), "a.json": json.dumps([{"text": row} for row in rows]),
            "a.html": "<p>".join(rows)}[name]
    path = tmp_path / f"{name}{suffix}"
    packed = PACKED[suffix](text.encode())
    path.write_bytes(packed[:len(packed) // 2])
    with pytest.raises(UserError, match=rf"{name}{suffix}.*: damaged or cut short \({suffix}\).*; mend it, or leave"):
        read(path)
    source = source_of(tmp_path, bad_rows="skip")
    kept = [d.text for d in source.documents()] if name != "a.html" else []
    if name in ("a.jsonl", "a.csv", "a.json"):
        assert kept == rows[:len(kept)] and 0 < len(kept) < 1500
        assert source.left_out.as_dict() == {f"damaged or cut short ({suffix})": 1}


def test_a_list_one_object_and_json_lines(tmp_path):
    rows = [{"text": f"text {n} \\ \" [é]", "n": n * 1.5} for n in range(500)]
    for name, text in (("list.json", json.dumps(rows)), ("pretty.json", json.dumps(rows, indent=2)),
                       ("bom.json", "\ufeff \n" + json.dumps(rows, ensure_ascii=False)),
                       ("lines.json", "".join(json.dumps(row) + "\n" for row in rows))):
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert read(tmp_path / name) == [(f"{name}:{n + 1}", row["text"]) for n, row in enumerate(rows)]
    for text in ('{"text": "alone"}', '{\n "text": "alone"\n}\n', '[{"text": "alone"}]'):
        (tmp_path / "one.json").write_text(text)
        assert read(tmp_path / "one.json") == [("one.json:1", "alone")]
    (tmp_path / "empty.json").write_text("[]")
    with pytest.raises(UserError, match="the corpus is empty"):
        read(tmp_path / "empty.json")


@given(st.lists(st.fixed_dictionaries({"text": st.text(min_size=1).filter(str.strip), "more": st.one_of(
    st.none(), st.floats(allow_nan=False), st.integers(), st.lists(st.text()))}), min_size=1, max_size=8),
    st.sampled_from([None, 1]), st.integers(1, 64))
@settings(max_examples=100, deadline=None)
def test_the_entries_of_a_list_are_those_that_json_itself_reads(tmp_path_factory, entries, indent, block):
    """However the blocks fall that it is read in."""
    from tryplicity_plugins.sources import json_files

    class Small(io.TextIOWrapper):
        def read(self, size=-1):
            return super().read(min(size, block) if size > 0 else size)

    text = json.dumps(entries, indent=indent, ensure_ascii=False).encode("utf-8", "surrogatepass")
    if b"\xed" in text:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_files.io, "TextIOWrapper", Small)
        assert list(json_files._entries(io.BufferedReader(io.BytesIO(text)))) == entries


@pytest.mark.parametrize("text, kept, why", [
    ('[{"text": "a"}, {"text": "b"}, {"text": }]', "ab", r"x\.json:3: not JSON: "),
    ('[{"text": "a"}, {"text": "b"}', "ab", r"x\.json:3: not JSON: it ends inside the list"),
    ('[{"text": "a"} {"text": "b"}]', "a", r"x\.json:2: not JSON: '\{' where the next entry"),
    ('[{"text": "a"}] and more', "a", r"x\.json:2: not JSON: there is more behind"),
    ('[{"text": "a"}, 5, {"text": "b"}]', "ab", r"x\.json:2: no text under the key 'text': it is not an object"),
    ('{"text": "a",', "", r"x\.json:1: not JSON"), ('"text"', "", r"x\.json:1: no text under the key 'text'"),
    ("[" + "[" * 100_000, "", r"x\.json:1: not JSON: nested too deeply")])
def test_a_broken_json_file_is_told_or_counted(tmp_path, text, kept, why):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=why):
        read(tmp_path / "x.json")
    source = source_of(tmp_path / "x.json", bad_rows="skip")
    try:
        assert "".join(d.text for d in source.documents()) == kept
    except UserError:
        assert kept == ""
    assert source.left_out.total == 1


def test_not_utf8_inside_a_list_spoils_one_entry(tmp_path):
    (tmp_path / "x.json").write_bytes(b'[{"text": "a"}, {"text": "\xff"}, {"text": "\\udcff b"}]')
    source = source_of(tmp_path / "x.json", bad_rows="skip")
    assert [d.text for d in source.documents()] == ["a", "\udcff b"]
    assert source.left_out.as_dict() == {"not UTF-8": 1} and source.left_out.examples == {"not UTF-8": ["x.json:2"]}


@given(st.lists(st.tuples(st.text(st.characters(exclude_characters="\r\0", exclude_categories=["Cs"]), min_size=1)
                          .filter(str.strip), st.integers()), min_size=1, max_size=6), st.sampled_from(",;\t"))
@settings(max_examples=100, deadline=None)
def test_what_pythons_own_writer_wrote_comes_back(tmp_path_factory, rows, delimiter):
    path = tmp_path_factory.mktemp("csv") / "x.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerows([("id", "Text"), *((number, text) for text, number in rows)])
    assert [text for _, text in read(path)] == [text for text, _ in rows]


def test_odd_rows_of_a_table_are_told_by_their_line_or_counted(tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes(b'text,n\n"two\nlines",1\ntoo,many,2\nfew\n\n"a"b,3\n\xff,4\nlast,5\n')
    with pytest.raises(UserError, match=r"x\.csv:4: a number of columns unlike the first row's: 3, not 2; mend it"):
        read(path)
    source = source_of(path, bad_rows="skip")
    assert [(d.id, d.text) for d in source.documents()] == [("x.csv:3", "two\nlines"), ("x.csv:9", "last")]
    assert source.left_out.as_dict() == {"with a number of columns unlike the first row's": 2, "not CSV": 1,
                                         "not UTF-8": 1}
    (tmp_path / "open.tsv").write_text('n\ttext\n1\t"it never\nends\n2\tx\n')
    with pytest.raises(UserError, match=r"open\.tsv:4: not CSV: unexpected end of data"):
        read(tmp_path / "open.tsv")


@pytest.mark.parametrize("rows, column", [
    ([{"id": 1, "Body": "x"}], "Body"), ([{"content": "x", "text": "y"}], "text"),
    ([{"id": "7", "review": "It is good."}, {"id": "8", "review": "no"}], "review"),
    ([{"review": "It is good."}], None),        # one object alone: settings, perhaps
    ([{"a": "two words", "b": "two more"}] * 2, None), ([{"n": 1}] * 2, None), ([], None), ([[1], "x"], None)])
def test_which_column_is_guessed(rows, column):
    assert text_column(rows) == column


def test_a_guess_is_said_and_a_name_decides(tmp_path):
    (tmp_path / "a.csv").write_text("id,review,also\n1,It is good.,x\n2,It is not.,y\n")
    pq.write_table(pa.table({"id": [1], "body": ["in Parquet"], "png": [b"\xff"]}), tmp_path / "b.parquet")
    (tmp_path / "c.jsonl").write_text('{"content": "in lines"}\n')
    source = source_of(tmp_path)
    assert [d.text for d in source.documents()] == ["It is good.", "It is not.", "in Parquet", "in lines"]
    assert source.left_out.as_dict() == {"other columns than 'body', which is taken for the text": 1,
                                         "other columns than 'review', which is taken for the text": 1}
    assert read(tmp_path / "a.csv", text_key="also") == [("a.csv:2", "x"), ("a.csv:3", "y")]
    with pytest.raises(UserError, match=r"a\.csv:2: no text under the key 'no': its keys are id, review, also"):
        read(tmp_path / "a.csv", text_key="no")


def test_settings_and_figures_in_a_folder_are_counted_and_stop_nothing(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "package.json").write_text('{"name": "x", "description": "a long one"}')
    (tmp_path / "tsconfig.json").write_text('{\n // a remark\n "a": 1}')
    (tmp_path / "figures.csv").write_text("x,y\n1,2\n3,4\n")
    (tmp_path / "archive.tar.gz").write_bytes(b"x")
    source = source_of(tmp_path)
    assert [d.text for d in source.documents()] == ["text"]
    assert source.left_out.as_dict() == {"without a column of text": 3, "of another kind (.tar.gz)": 1}
    with pytest.raises(UserError, match=r"package\.json:1: no text under the key 'text': its keys are name, desc"):
        read(tmp_path / "package.json")


def test_conversations_in_lists_and_tables(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"prompt": "What?", "response": "That."}] * 2))
    (tmp_path / "b.csv").write_text("prompt,response\nWho?,She.\n")
    (tmp_path / "settings.json").write_text('{"a": 1}')
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b'{"messages": [{"role": "user", "content": "x"}, '
                                                        b'{"role": "assistant", "content": "y"}]}\n'))
    source = source_of(tmp_path)
    assert [[m["content"] for m in c.messages] for c in source.conversations()] == [
        ["What?", "That."], ["What?", "That."], ["Who?", "She."], ["x", "y"]]
    assert source.left_out.as_dict() == {"without conversations": 1}


# --- web archives ---

PAGE = "<html><head><title>Fish</title></head><body><p>Grüße aus Köln</body></html>"


def archive(path, packed=True):
    from warcio.statusandheaders import StatusAndHeaders
    from warcio.warcwriter import WARCWriter

    def record(kind, url, body, content_type, status="200 OK", more=()):
        answer = StatusAndHeaders(status, [("Content-Type", content_type), *more], protocol="HTTP/1.1")
        headers = {"warc_content_type": content_type} if kind == "conversion" else {}
        return writer.create_warc_record(url, kind, payload=io.BytesIO(body), length=len(body), **headers,
                                         http_headers=answer if kind == "response" else None)

    with open(path, "wb") as file:
        writer = WARCWriter(file, gzip=packed)
        writer.write_record(writer.create_warcinfo_record("x", {"software": "a test"}))
        for one in (record("response", "http://a/", PAGE.encode(), "text/html; charset=utf-8"),
                    record("response", "http://b/", PAGE.encode("latin-1"), "text/html; charset=ISO-8859-1"),
                    record("response", "http://c/", b"\x89PNG", "image/png"),
                    record("response", "http://d/", b"<p>gone", "text/html", "404 Not Found"),
                    record("response", "http://e/", gzip.compress(PAGE.encode()), "text/html",
                           more=[("Content-Encoding", "gzip")]),
                    record("conversion", "http://f/", b"plain words", "text/plain")):
            writer.write_record(one)


@pytest.mark.parametrize("name", ["a.warc", "a.warc.gz"])
def test_a_web_archive_gives_its_pages_with_their_addresses(tmp_path, name):
    path = tmp_path / name
    archive(path, packed=name.endswith("gz"))
    source = source_of(path)
    page = "Fish\n\nGrüße aus Köln\n"
    assert [(d.id, d.text, d.url) for d in source.documents()] == [
        (f"{name}:2", page, "http://a/"), (f"{name}:3", page, "http://b/"), (f"{name}:6", page, "http://e/"),
        (f"{name}:7", "plain words", "http://f/")]
    assert source.left_out.as_dict() == {"answers with status 404": 1, "of another kind (image/png)": 1,
                                         "records of another kind (warcinfo)": 1}
    whole = path.read_bytes()
    for length in (len(whole) - 40, len(whole) * 2 // 3):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"damaged or cut short"):
            read(path)
        source = source_of(path, bad_rows="skip")
        kept = [d.url for d in source.documents()]
        assert kept == ["http://a/", "http://b/", "http://e/", "http://f/"][:len(kept)] and 2 <= len(kept) < 4
        assert sum(n for why, n in source.left_out.as_dict().items() if why.startswith("damaged")) == 1
