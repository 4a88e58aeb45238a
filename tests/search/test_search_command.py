"""`tryplicity search index` and `search ask`, as functions."""

import json
import sqlite3
import types
from contextlib import closing

import pytest

from tryplicity import UserError, load_plugins
from tryplicity.search import command


def test_a_folder_is_indexed_and_asked(tmp_path, registry):
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "zebra.md").write_text("# Zebras\n\nA zebra eats \x1b[31mgrass.\n\n## Stripes\n\nThey keep flies away.\n")
    told = []
    done = command.index(str(notes), tmp_path / "out" / "i.sqlite", registry, lambda *what: told.append(what))
    assert done["passages"] == 2 and done["index"] == str(tmp_path / "out" / "i.sqlite") and told
    assert "2 passages" in command.index_page(done)
    answer = command.ask("what do zebras eat", done["index"], 5, registry)
    assert json.loads(command.as_json(answer)) == answer
    assert answer["results"][0] | {"score": 0} == {
        "id": "zebra.md:1", "title": "Zebras", "url": (notes / "zebra.md").as_uri(),
        "text": "A zebra eats \x1b[31mgrass.", "score": 0}
    page = command.ask_page(answer)
    assert page.startswith("[1] Zebras\n    file:///") and "\x1b" not in page and "eats  [31mgrass." in page
    assert command.ask_page(command.ask("xylophone", done["index"], 5, registry)).startswith("nothing found")


def test_without_a_file_it_goes_into_the_cache(corpus, registry, tmp_path, monkeypatch):
    monkeypatch.setenv("TRYPLICITY_CACHE", str(tmp_path))
    done = command.index(str(corpus), None, registry)
    assert done["index"].startswith(str(tmp_path)) and done["passages"] >= 40
    assert command.index(str(corpus), None, registry)["index"] == done["index"]
    with pytest.raises(UserError, match="no such file or folder"):
        command.index("nowhere", None, registry)
    with pytest.raises(UserError, match="no such index"):
        command.ask("x", tmp_path / "none.sqlite", 5, registry)


def test_nothing_but_an_index_is_written_over(tmp_path, registry):
    """Not the notes that are read, not another program's database; an index of an older format is."""
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "a.md").write_text("# Zebras\n\nA zebra eats grass.\n")
    other = tmp_path / "mail.sqlite"
    with closing(sqlite3.connect(other)) as connection:
        connection.execute("CREATE TABLE mail (text)")
        connection.commit()
    for source, out in [(notes, notes / "a.md"), (notes / "a.md", notes / "a.md"), (notes, other)]:
        before = out.read_bytes()
        with pytest.raises(UserError, match="exists and is not a search index; it is not written over") as told:
            command.index(str(source), out, registry)
        assert str(told.value).startswith(f"{out}: ") and out.read_bytes() == before
    with pytest.raises(UserError, match="this is a folder"):
        command.index(str(notes), notes, registry)
    out = tmp_path / "i.sqlite"
    out.touch()
    assert command.index(str(notes), out, registry)["passages"] == 1
    with closing(sqlite3.connect(out)) as connection:
        connection.execute("PRAGMA user_version = 1")
        connection.commit()
    with pytest.raises(UserError, match="an index of format 1, and this program reads format 2; build it again"):
        command.ask("zebra", out, 1, registry)
    assert command.index(str(notes), out, registry)["passages"] == 1
    assert len(command.ask("zebra", out, 1, registry)["results"]) == 1


SOURCE = """
from dataclasses import dataclass
from tryplicity import Document, LeftOut, Source, hookimpl

class Mine(Source):
    name = "mine"

    @dataclass(frozen=True)
    class Config:
        pass

    def __init__(self, config):
        self.left_out = LeftOut("files")

    def fingerprint(self):
        return "1"

    def documents(self):
        self.left_out = LeftOut("files")
        for name in ("a.o", "b.o", "old\x1b.txt"):
            self.left_out.add("not UTF-8" if name.endswith("t") else "of another kind (.o)", name)
        for number in range(3):
            yield Document(str(number), "Page\\n\\nA zebra.", "text", "u:")

@hookimpl
def tryplicity_components():
    return [Mine]
"""


@pytest.mark.parametrize("cached", [False, True])
def test_what_is_left_out_is_counted_and_said(tmp_path, monkeypatch, cached):
    """Of the source's files and of passages; also where the index is found in the cache."""
    monkeypatch.setenv("TRYPLICITY_CACHE", str(tmp_path / "cache"))
    (tmp_path / "mine.py").write_text(SOURCE)
    registry = load_plugins([str(tmp_path / "mine.py")]).registry
    for _ in range(1 + cached):
        done = command.index("mine", None if cached else tmp_path / "i.sqlite", registry)
    told = json.loads(command.as_json(done))
    assert told["left_out"] == {"of another kind (.o)": 2, "not UTF-8": 1} and told["repeated"] == 2
    assert set(told) == {"index", "passages", "left_out", "repeated", "megabytes", "seconds"}
    assert command.index_page(done).split("\n")[1:-1] == [
        "left out 3 files: 2 of another kind (.o) (a.o, b.o), 1 not UTF-8 (old .txt)",
        "left out 2 passages: 2 the same as one before (Page, ...)"]


def test_a_passage_is_shown_by_four_lines_of_a_hundred_signs_at_most():
    def shown(text):
        result = {"title": "A\tb", "url": "u:\x07", "text": text}
        return command.ask_page({"results": [result, result]}).split("\n\n")

    first, second = shown("a " * 50)        # 99 signs: one more word would be 101
    assert first.split("\n") == ["[1] A b", "    u: ", "    " + "a " * 49 + "a"] and second.startswith("[2] A b\n")
    lines = shown("a " * 51)[0].split("\n")[2:]
    assert [len(line) for line in lines] == [4 + 99, 4 + 1]
    lines = shown("x" * 100 + " y\n\n" + "z " * 500)[0].split("\n")[2:]
    assert len(lines) == 4 and len(lines[0]) == 104 and lines[3].endswith(" ...") and len(lines[3]) <= 104


def test_what_begins_with_a_line_is_for_people():
    assert json.loads(command.as_json({"a": "é", "_left_out": ["b"]})) == {"a": "é"}
    assert "é" in command.as_json({"a": "é"})
    page = command.index_page({"passages": 1234, "megabytes": 0.1, "seconds": 2.5, "index": "i",
                               "_left_out": ["x\x1b"]})
    assert page == '1,234 passages, 0.1 MB, in 2.5 s: i\nx \nask it: tryplicity search ask "..." --index i'


def test_how_long_and_how_large_is_told_to_a_tenth(tmp_path, registry, monkeypatch):
    """And an answer's time to a tenth of a millisecond, by a clock of our own."""
    notes = tmp_path / "a.md"
    notes.write_text("# Zebras\n\nA zebra eats grass.\n")
    moments = iter([100.0, 102.345678, 7.0, 7.00123456])
    monkeypatch.setattr(command, "time", types.SimpleNamespace(perf_counter=lambda: next(moments)))
    done = command.index(str(notes), tmp_path / "i.sqlite", registry)
    size = (tmp_path / "i.sqlite").stat().st_size
    assert (done["seconds"], done["megabytes"]) == (2.3, round(size / 1e6, 1))
    assert (done["repeated"], done["left_out"]) == (0, {})
    assert command.ask("zebra", done["index"], 5, registry)["seconds"] == 0.0012
