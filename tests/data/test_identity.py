"""Data is its content: where it lies, how it is written and when it was touched change nothing."""

import os
import shutil

import pytest

from tryplicity import UserError
from tryplicity.data import parse_source, prepare, prepare_conversations


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    (folder / "inner").mkdir(parents=True)
    for i in range(12):
        (folder / ("inner" if i % 2 else "") / f"{i}.txt").write_text(f"text number {i}, " * 20)
    rows = [f'{{"prompt": "What is {i}?", "completion": "It is {i}."}}\n' for i in range(20)]
    (folder / "chat.jsonl").write_text("".join(rows).replace('"prompt"', '"text": "row", "prompt"'))
    return folder


def ways(texts, tmp_path):
    """The same data, from other places, under other names, at other times."""
    yield "as it is", str(texts)
    yield "with a slash", f"{texts}/"
    yield "relative", os.path.relpath(texts)
    yield "with a dot", f"./{os.path.relpath(texts)}"
    (tmp_path / "link").symlink_to(texts)
    yield "a link", str(tmp_path / "link")
    shutil.copytree(texts, tmp_path / "elsewhere" / "copy")
    yield "a copy", str(tmp_path / "elsewhere" / "copy")
    for path in texts.rglob("*.txt"):
        os.utime(path, (1, 1))
    yield "touched", str(texts)
    shutil.make_archive(str(tmp_path / "archive"), "tar", texts)
    shutil.unpack_archive(tmp_path / "archive.tar", tmp_path / "unpacked")
    yield "an unpacked archive", str(tmp_path / "unpacked")
    texts.rename(tmp_path / "moved")
    yield "moved", f"{{type: files, path: {tmp_path / 'moved'}, document_bytes: 70000}}"


def test_the_same_content_is_the_same_data_and_is_tokenised_once(registry, texts, tmp_path):
    cache, identities, chats, stages = tmp_path / "cache", set(), set(), []
    for number, (_, written) in enumerate(ways(texts, tmp_path)):
        prepared = prepare(parse_source(registry, written), 270, cache, lambda stage, *_: stages.append(stage))
        identities.add(prepared.identity)
        chat = prepare_conversations(parse_source(registry, written), prepared.tokenizer_path, 270, cache,
                                     lambda stage, *_: stages.append(stage))
        chats.add(chat.identity)
        if number == 0:
            assert "tokenising" in stages and "training the tokenizer" in stages
            stages.clear()
    assert len(identities) == len(chats) == 1 and not {"tokenising", "training the tokenizer"} & set(stages)
    assert len(list((cache / "tokens").iterdir())) == 2 and len(list((cache / "tokenizers").iterdir())) == 1


def test_what_lies_where_it_lay_is_not_read_again(registry, texts, tmp_path, monkeypatch):
    prepare(parse_source(registry, str(texts)), 270, tmp_path / "cache")
    from tryplicity_plugins.sources.files import Files

    monkeypatch.setattr(Files, "documents", lambda self: pytest.fail("read again"))
    for written in (str(texts), f"{texts}/", os.path.relpath(texts)):
        prepare(parse_source(registry, written), 270, tmp_path / "cache")


@pytest.mark.parametrize("change", ["text", "name", "removed", "domain", "same size and time"])
def test_other_content_is_other_data(registry, texts, tmp_path, change):
    def identity(domain="text"):
        source = parse_source(registry, {"type": "files", "path": str(texts), "domain": domain})
        return prepare(source, 270, tmp_path / "cache").identity

    before, path = identity(), texts / "0.txt"
    if change == "text":
        path.write_text("other text")
    elif change == "name":
        path.rename(texts / "00.txt")
    elif change == "removed":
        path.unlink()
    elif change == "same size and time":
        info = path.stat()
        path.write_text(path.read_text().replace("text number", "next member"))
        os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))
    assert before != identity("code" if change == "domain" else "text")


def test_the_parts_of_a_folder_named_with_a_sharp_are_held_out_one_by_one(registry, tmp_path):
    """Cut at the `#`, a folder C# was one document, and `shard #1`, `shard #2` were another."""
    for folder in ("C#", "issues#1"):
        (tmp_path / "texts" / folder).mkdir(parents=True)
        for i in range(60):
            (tmp_path / "texts" / folder / f"shard #{i}.txt").write_text(f"{folder}, shard number {i}")
    prepared = prepare(parse_source(registry, str(tmp_path / "texts")), 270, tmp_path / "cache")
    parts = prepared.manifest["parts"]
    assert parts["train"]["documents"] + parts["heldout"]["documents"] == 120
    assert 1 <= parts["heldout"]["documents"] <= 12
    (tmp_path / "one").mkdir()
    for i in range(3):
        (tmp_path / "one" / f"shard #{i}.txt").write_text(f"shard number {i} " * 30)
    alone = prepare(parse_source(registry, str(tmp_path / "one")), 263, tmp_path / "cache")     # no single document
    assert alone.manifest["parts"]["train"]["documents"] == 2


def test_what_was_left_out_is_told_again_when_the_data_is_found(registry, texts, tmp_path):
    (texts / "picture.png").write_bytes(b"x")
    (texts / "rows.jsonl").write_text('{"text": "good"}\n{"body": "odd"}\n')
    source = {"type": "files", "path": str(texts), "bad_rows": "skip"}
    said = [str(prepare(parse_source(registry, source), 270, tmp_path / "cache").left_out) for _ in range(2)]
    assert said == ["left out 2 items: 1 of another kind (.png) (picture.png), "
                    "1 with no text under the key 'text' (rows.jsonl:2)"] * 2
    (texts / "more.png").write_bytes(b"x")      # the same data, but something else to say
    assert "2 of another kind (.png)" in str(prepare(parse_source(registry, source), 270, tmp_path / "cache").left_out)
    with pytest.raises(UserError, match=r"rows\.jsonl:2: no text under the key 'text'"):
        prepare(parse_source(registry, str(texts)), 270, tmp_path / "cache")
