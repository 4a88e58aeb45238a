"""From --data to a source, through the installed plugins."""

import pytest

import tryplicity
from tryplicity import UserError
from tryplicity.data import parse_source


@pytest.fixture(scope="module")
def registry():
    return tryplicity.load_plugins().registry


def test_the_ways_to_name_a_source(registry, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("text")
    monkeypatch.chdir(tmp_path)
    assert parse_source(registry, "python-docs").name == "python-docs"
    for text in (str(tmp_path), f"files:{tmp_path}", f"{{type: files, path: {tmp_path}}}",
                 {"type": "files", "path": str(tmp_path)}):
        source = parse_source(registry, text)
        assert source.name == "files" and source.config.path == str(tmp_path)
    assert parse_source(registry, "a.txt").config.path == "a.txt"
    source = parse_source(registry, "huggingface:HuggingFaceFW/fineweb-edu")
    assert source.name == "huggingface" and source.config.dataset == "HuggingFaceFW/fineweb-edu"
    assert parse_source(registry, "{type: files, path: x, text_key: body}").config.text_key == "body"
    assert parse_source(registry, "{type: python-docs, packages: [python]}").config.packages == ("python",)


@pytest.mark.parametrize("text, message", [
    ("python-doc", "no such file or folder, and no source of that name .did you mean python-docs"),
    ("no/such/folder", "no such file or folder"),
    ("files:", "path is missing; write files:PATH"),
    ("{type: files, path: [}", "not a YAML mapping"),
    ("{type: file, path: x}", "did you mean files"),
    ("{type: files, pth: x}", r"(?s)pth: unknown key .did you mean path"),
    ("{path: x}", "type is missing"),
    ("{type: files, path: x, encoding_errors: skip}", "unknown key .there are: bad_rows"),
    ("{type: files, path: x, bad_rows: ignore}", "bad_rows: .*ignore"),
    ("{type: python-docs, packages: [perl]}", "perl"),
    ("{type: huggingface, dataset: x, limit: 0}", "limit: .*0"),
])
def test_a_mistake_ends_in_one_clear_line(registry, text, message):
    with pytest.raises(UserError, match=message):
        parse_source(registry, text)
