"""`tryplicity search index` and `search ask`, as functions."""

import json
import sqlite3
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
        "left out 3 files: 2 of another kind (.o) (a.o, ...), 1 not UTF-8 (old .txt)",
        "left out 2 passages: 2 the same as one before (Page, ...)"]
