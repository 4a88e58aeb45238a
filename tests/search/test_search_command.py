"""`tryplicity search index` and `search ask`, as functions."""

import json

import pytest

from tryplicity import UserError
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
