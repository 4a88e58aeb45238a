"""Conversations out of files and of data sets, in each form; mistakes told with their place."""

import json

import pytest

from tryplicity import UserError
from tryplicity.data import parse_source
from tryplicity_plugins.sources.chat_rows import messages_of
from tryplicity_plugins.sources.files import Files
from tryplicity_plugins.sources.huggingface import HuggingFace

TALK = ({"role": "user", "content": "A list?"}, {"role": "assistant", "content": "Items\nin order."})


@pytest.mark.parametrize("row", [
    {"messages": [{"role": "user", "content": "A list?"}, {"role": "assistant", "content": "Items\r\nin order."}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "A "}, {"type": "text", "text": "list?"}]},
                  {"role": "assistant", "content": "Items\nin order.", "name": "x"}]},
    {"messages": {"role": ["user", "assistant"], "content": ["A list?", "Items\nin order."]}},
    {"id": 3, "conversations": [{"from": "human", "value": "A list?"}, {"from": "gpt", "value": "Items\nin order."}]},
    {"messages": [{"role": "system", "content": ""}, *TALK]},
    {"messages": None, "prompt": "A list?", "completion": "Items\nin order."},
    {"prompt": [TALK[0]], "completion": [TALK[1]]},
    {"instruction": "A list?", "input": "", "output": "Items\nin order."},
    {"question": "A list?", "answer": "Items\nin order."},
])
def test_every_form_gives_the_same_messages(row):
    assert messages_of(row, "here") == TALK


def test_an_input_comes_behind_its_instruction_and_a_developer_is_a_system():
    assert messages_of({"instruction": "Add.", "input": "1, 2", "output": "3"}, "")[0]["content"] == "Add.\n\n1, 2"
    assert messages_of({"messages": [{"role": "developer", "content": "x"}]}, "")[0]["role"] == "system"


@pytest.mark.parametrize("row, said", [
    ("text", "here: not an object but str"),
    ({"text": "a", "n": 1}, "here: no conversation: its keys are text, n; a row holds messages"),
    ({"messages": "hello"}, "here: messages: not a list of messages"),
    ({"conversations": ["a", "b"]}, "here: conversations: not a list of messages"),
])
def test_other_rows_are_refused(row, said):
    with pytest.raises(UserError, match=said):
        messages_of(row, "here")


@pytest.fixture
def chats(tmp_path):
    (tmp_path / "chats").mkdir()
    rows = [{"prompt": f"What is {i}?", "completion": f"Number {i}."} for i in range(5)]
    (tmp_path / "chats" / "a.jsonl").write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    (tmp_path / "chats" / "b.jsonl").write_text(json.dumps({"messages": TALK}))
    (tmp_path / "chats" / "readme.md").write_text("What is in these files.")
    return tmp_path / "chats"


def test_a_folder_and_a_file(chats, registry):
    source = parse_source(registry, str(chats))
    found = list(source.conversations())
    assert [c.id for c in found] == ["a.jsonl:1", "a.jsonl:3", "a.jsonl:5", "a.jsonl:7", "a.jsonl:9", "b.jsonl:1"]
    assert found[-1].messages == TALK and found[1].messages[1]["content"] == "Number 1."
    assert found[1].url == (chats / "a.jsonl").as_uri() + "?part=3" and source.read_share == 1.0
    assert [c.messages for c in parse_source(registry, str(chats / "b.jsonl")).conversations()] == [TALK]


def test_mistakes_in_a_file_name_it_and_the_line(chats):
    path = chats / "a.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    with pytest.raises(UserError, match=rf"{path}:2: not JSON"):
        list(Files(Files.Config(str(path))).conversations())
    path.write_text('\n{"text": "a"}\n')
    with pytest.raises(UserError, match=rf"{path}:2: no conversation: its keys are text;"):
        list(Files(Files.Config(str(path))).conversations())
    with pytest.raises(UserError, match=r"readme.md: no conversations: they are read from .jsonl files"):
        list(Files(Files.Config(str(chats / "readme.md"))).conversations())


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_a_data_set_is_streamed(tmp_path, kind):
    rows = [{"conversations": [{"from": "human", "value": f"What is {i}?"}, {"from": "gpt", "value": f"Number {i}."}]}
            for i in range(20)]
    path = tmp_path / f"rows.{kind}"
    if kind == "json":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    found = list(HuggingFace(HuggingFace.Config(kind, data_files=str(path))).conversations())
    assert [c.messages[1] for c in found] == [{"role": "assistant", "content": f"Number {i}."} for i in range(20)]
    assert len({c.id for c in found}) == 20 and found[3].url == f"{path}#train-3"
    assert len(list(HuggingFace(HuggingFace.Config(kind, data_files=str(path), limit=3)).conversations())) == 3


def test_a_data_set_of_texts_is_told(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n')
    source = HuggingFace(HuggingFace.Config("json", data_files=str(tmp_path / "x.jsonl")))
    with pytest.raises(UserError, match="huggingface:json: row 0: no conversation: its keys are text"):
        list(source.conversations())
