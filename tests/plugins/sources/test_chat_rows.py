"""Conversations out of files and of data sets, in each form; mistakes told with their place."""

import json

import pytest

from tryplicity import UserError
from tryplicity.data import parse_source
from tryplicity_plugins.sources.chat_rows import conversation_of
from tryplicity_plugins.sources.files import Files
from tryplicity_plugins.sources.huggingface import HuggingFace
from tryplicity_plugins.sources.rows import BadRow

TALK = ({"role": "user", "content": "A list?"}, {"role": "assistant", "content": "Items\nin order."})


def messages_of(row):
    return conversation_of(row).messages


@pytest.mark.parametrize("row", [
    {"messages": [{"role": "user", "content": "A list?"}, {"role": "assistant", "content": "Items\r\nin order."}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "A "}, {"type": "text", "text": "list?"}]},
                  {"role": "assistant", "content": "Items\nin order.", "name": "x", "refusal": None}]},
    {"messages": {"role": ["user", "assistant"], "content": ["A list?", "Items\nin order."]}},
    {"id": 3, "conversations": [{"from": "human", "value": "A list?"}, {"from": "gpt", "value": "Items\nin order."}]},
    {"conversations": [{"from": "Human", "value": "A list?"}, {"from": "chatgpt", "value": "Items\nin order."}]},
    {"messages": [{"role": "prompter", "text": "A list?"}, {"role": "bard", "text": "Items\nin order."}]},
    {"messages": [{"role": "system", "content": ""}, *TALK]},
    {"messages": None, "prompt": "A list?", "completion": "Items\nin order."},
    {"prompt": [TALK[0]], "completion": [TALK[1]]},
    {"instruction": "A list?", "input": "", "output": "Items\nin order.", "system": "", "history": []},
    {"question": "A list?", "answer": "Items\nin order."},
    {"prompt": "A list?", "completion": None, "response": "Items\nin order."},
])
def test_every_form_gives_the_same_messages(row):
    assert messages_of(row) == TALK


def test_what_stands_beside_the_question():
    assert messages_of({"instruction": "Add.", "input": "1, 2", "output": "3"})[0]["content"] == "Add.\n\n1, 2"
    assert messages_of({"instruction": "Add.", "context": "1, 2", "response": "3"})[0]["content"] == "Add.\n\n1, 2"
    rows = {"system_prompt": "Be short.", "question": "2?", "response": "3", "history": [["0?", "1"], ["1?", "2"]]}
    assert [(m["role"], m["content"]) for m in messages_of(rows)] == [
        ("system", "Be short."), ("user", "0?"), ("assistant", "1"), ("user", "1?"), ("assistant", "2"), ("user", "2?"),
        ("assistant", "3")]


def test_a_system_beside_the_messages_comes_before_theirs():
    assert messages_of({"system": "Be short.", "conversations": list(TALK)}) == (
        {"role": "system", "content": "Be short."}, *TALK)
    developer = {"role": "developer", "content": "Be kind."}
    for system, said in (("Be short.", "Be short.\n\nBe kind."), ("Be kind.", "Be kind.")):
        assert messages_of({"system": system, "messages": [developer, *TALK]}) == (
            {"role": "system", "content": said}, *TALK)


CALL = '{"name": "area", "arguments": {"side": 3}}'
TOOL = {"type": "function", "function": {"name": "area", "parameters": {"type": "object"}}}


@pytest.mark.parametrize("row", [
    {"messages": [                                                  # OpenAI's
        {"role": "user", "content": "How big?"},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "area", "arguments": '{"side": 3}'}}]},
        {"role": "tool", "tool_call_id": "c1", "content": "9"},
        {"role": "assistant", "content": "9."}], "tools": [TOOL]},
    {"messages": [                                                  # OpenAI's older form
        {"role": "user", "content": "How big?"},
        {"role": "assistant", "content": "", "function_call": {"name": "area", "arguments": '{"side": 3}'}},
        {"role": "function", "name": "area", "content": "9"},
        {"role": "assistant", "content": "9."}], "functions": [TOOL]},
    {"conversations": [                                             # ShareGPT's, as LLaMA-Factory reads it
        {"from": "human", "value": "How big?"}, {"from": "function_call", "value": CALL},
        {"from": "observation", "value": "9"}, {"from": "gpt", "value": "9."}], "tools": json.dumps([TOOL])},
])
def test_calls_and_tools_are_text(row):
    assert [(m["role"], m["content"]) for m in messages_of(row)] == [
        ("system", f"You may call these functions:\n<tools>\n{json.dumps(TOOL)}\n</tools>"), ("user", "How big?"),
        ("assistant", f"<tool_call>\n{CALL}\n</tool_call>"), ("tool", "9"), ("assistant", "9.")]


def test_a_weight_of_zero_stays_with_its_message():
    talk = [{**TALK[0], "weight": 0}, {**TALK[1], "weight": 0}, TALK[0], {**TALK[1], "weight": 1}]
    assert [m.get("weight") for m in messages_of({"messages": talk})] == [None, 0, None, None]


def test_what_nothing_is_made_of_is_named():
    row = {"messages": [TALK[0], {**TALK[1], "name": "x", "audio": None, "reasoning": "hm"}], "id": 7, "tags": [],
           "n": 0, "system": "Be short."}
    assert conversation_of(row).unused == ("id", "messages[].name", "messages[].reasoning", "n")


@pytest.mark.parametrize("row, said", [
    ("text", "no conversation: not an object but str"),
    ({"text": "a", "n": 1}, "no conversation: its keys are text, n; a row holds messages"),
    ({"messages": []}, "no conversation: its keys are messages; a row holds"),
    ({"messages": "hello"}, "no conversation: messages is not a list of messages"),
    ({"conversations": ["a", "b"]}, "no conversation: conversations is not a list of messages"),
    ({"prompt": "a", "completion": ""}, "an empty message of the assistant"),
    ({"prompt": "a", "completion": None}, "an empty message of the assistant"),
    ({"prompt": "a", "completion": 5}, "content that is no text: that of the assistant is int"),
    ({"messages": [{"role": "robot", "content": "a"}]}, "an unknown role 'robot': it may be system,"),
    ({"messages": [{"content": "a"}]}, "an unknown role None"),
    ({"messages": [TALK[0]]}, "no message of the assistant to learn"),
    ({"messages": [TALK[0], {**TALK[1], "weight": 0}]}, "no message of the assistant to learn"),
    ({"messages": [TALK[0], {**TALK[1], "weight": 0.5}]}, "a weight other than 0 and 1"),
    ({"messages": [{"role": "user", "content": None}, TALK[1]]}, "no content of the user"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, TALK[1]]},
     "content that is no text: a part of type image_url"),
    ({"messages": [{"role": "user", "content": "a", "tool_calls": [{}]}, TALK[1]]}, "a call by the user"),
    ({"prompt": "a", "completion": "b", "history": ["c"]}, "a history that is no list of pairs"),
])
def test_other_rows_are_refused(row, said):
    with pytest.raises(BadRow, match=said):
        conversation_of(row)


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
    with pytest.raises(UserError, match=rf"{path}:2: no conversation: its keys are text;.*bad_rows: skip"):
        list(Files(Files.Config(str(path))).conversations())
    with pytest.raises(UserError, match=r"readme.md: .md is not read; files may be .csv, .json, .jsonl"):
        list(Files(Files.Config(str(chats / "readme.md"))).conversations())


ODD = [{"messages": [TALK[0], {"role": "assistant", "content": None}]}, {"prompt": "a", "completion": ""},
       {"messages": [{"role": "robot", "content": "a"}]}, {"prompt": "b", "completion": ""}]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_odd_rows_can_be_left_out_and_are_counted(chats, suffix):
    good = [{"messages": TALK, "topic": "x"}, {"prompt": "A list?", "completion": "Items\nin order.", "topic": "x"}]
    path = chats / f"c.{suffix}"
    rows = [good[0], *ODD, good[1]]
    if suffix == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows, pa.schema([
            ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
            ("prompt", pa.string()), ("completion", pa.string()),
            ("topic", pa.dictionary(pa.int8(), pa.string())), ("picture", pa.binary())])),
            path)
    source = Files(Files.Config(str(path), bad_rows="skip"))
    assert [(c.id, c.messages) for c in source.conversations()] == [(f"c.{suffix}:1", TALK), (f"c.{suffix}:6", TALK)]
    assert source.left_out.as_dict() == {
        "fields 'topic' of rows": 2, "with an empty message of the assistant": 2, "with an unknown role 'robot'": 1,
        "with no content of the assistant": 1}
    assert f"2 with an empty message of the assistant (c.{suffix}:3, c.{suffix}:5)" in str(source.left_out)
    with pytest.raises(UserError, match=rf"c\.{suffix}:2: no content of the assistant; mend it, or leave such rows"):
        list(Files(Files.Config(str(path))).conversations())


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
    with pytest.raises(UserError, match=r"huggingface:json: row 0: no conversation: .* text;.*bad_rows: skip"):
        list(source.conversations())
