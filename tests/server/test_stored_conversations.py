"""The file of conversations: nothing acknowledged is lost, nothing half is kept."""

import json
import os
import signal
import sqlite3
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tryplicity.errors import UserError
from tryplicity.server.conversations import (
    NEW,
    Changed,
    CitedPassage,
    Export,
    Message,
    Store,
    Unknown,
    as_markdown,
    read_export,
    title_of,
)


class Direct:
    """A store whose calls are waited for."""

    def __init__(self, path=None):
        self.store = Store(path)

    def __getattr__(self, name):
        return lambda *a, **k: self.store.call(lambda: getattr(self.store, name)(*a, **k)).result()

    def close(self):
        self.store.close()


@pytest.fixture
def store(tmp_path):
    direct = Direct(tmp_path / "deep" / "conversations.sqlite")
    yield direct
    direct.close()


def question(text="what?", **more):
    return Message(role="user", content=text, **more)


def answer(text="that.", **more):
    return Message(role="assistant", content=text, finish="stop", **more)


def test_what_is_kept_comes_back_after_reopening(tmp_path):
    store = Direct(path := tmp_path / "c.sqlite")
    id = store.create("About lists").id
    said = answer("Lists [1].", supported=True, tokens_per_second=12.5, settings={"temperature": 0.0, "search": True},
                  sources=[CitedPassage(number=1, id="p1", title="list", url="http://x", text="a \ud7ff \x00 list")])
    store.append(id, asked := question("What are lists? 語 😀"), said)
    before = store.get(id)
    store.close()
    store = Direct(path)
    assert store.get(id) == before and before.messages == [asked, said] and before.title == "About lists"
    assert oct(path.stat().st_mode & 0o777) == "0o600"
    store.close()


def test_later_messages_are_dropped_and_others_left(store):
    first, second = store.create().id, store.create().id
    messages = [question("a"), answer("b"), question("c"), answer("d")]
    store.append(first, *messages)
    store.append(second, other := question("other"))
    store.append(first, new := question("C"), after=messages[1].id)
    assert store.get(first).messages == [*messages[:2], new]
    with pytest.raises(Unknown):
        store.append(first, question("x"), after=other.id)
    assert store.get(first).messages == [*messages[:2], new] and store.get(second).messages == [other]
    store.append(first, alone := question("anew"), after=None)
    assert store.get(first).messages == [alone]


def test_titles(store):
    id = store.create().id
    store.append(id, question(), title="What is a list?")
    assert store.get(id).title == "What is a list?"
    store.append(id, question(), title="Another")
    assert store.get(id).title == "What is a list?"     # the first question gave it
    assert store.rename(id, "Mine").title == "Mine"
    store.append(id, question(), title="Another")
    assert store.get(id).title == "Mine"
    assert title_of("  a\n b ") == "a b" and title_of(" ") == NEW
    long = title_of("word " * 40)
    assert len(long) <= 62 and long.endswith("word …") and title_of("x" * 99) == "x" * 59 + "…"


def test_deleting_takes_the_messages_along(store):
    id = store.create().id
    store.append(id, question())
    store.delete(id)
    for call in (store.delete, store.get):
        with pytest.raises(Unknown):
            call(id)
    store.save(id, answer())    # late, by an answer whose conversation has gone
    assert store.count() == 0 and store.export().conversations == []


def test_searching_titles_and_contents_in_any_case(store):
    lists, files = store.create("Straße and LISTS").id, store.create().id
    store.append(lists, question("How do I sort them?"), answer("With sorted()."))
    store.append(files, question("100% _safe_ file's 'quotes'"), answer("Ünïcode ΣΊΣΥΦΟΣ"))
    found = lambda query: [c["id"] for c in store.summaries(query)]  # noqa: E731
    assert found("lists SORT") == [lists] and found("strasse") == [lists] and found("ünï σίσυφος") == [files]
    assert found("100% _safe_ 'quotes'") == [files] and found("%") == [files] and found("a_b") == []
    assert found("") == found("  ") == [files, lists]   # the latest first
    assert [c["messages"] for c in store.summaries()] == [2, 2]


def test_an_export_imports_into_another_store(store, tmp_path):
    ids = [store.create(f"number {n}").id for n in range(3)]
    for id in ids:
        store.append(id, question(id), answer("b"))
    export = json.loads(store.export().model_dump_json())
    other = Direct()
    assert other.load(read_export(export)) == {"imported": 3, "skipped": 0}
    assert other.export() == store.export()
    assert other.load(read_export(export)) == {"imported": 0, "skipped": 3}
    store.append(ids[0], question("more"))
    assert other.load(store.export()) == {"imported": 1, "skipped": 2}      # beside the older one, under a new id
    assert other.count() == 4 and {len(c.messages) for c in other.export().conversations} == {2, 3}
    assert [m.content for m in other.get(ids[0]).messages] == [ids[0], "b"]
    assert other.load(read_export(export["conversations"][0])) == {"imported": 0, "skipped": 1}
    other.close()


@pytest.mark.parametrize("change, told", [
    (lambda e: e.update(format=3), "format"), (lambda e: e["conversations"][0].pop("title"), None),
    (lambda e: e["conversations"][0]["messages"][0].update(role="god"), "role"),
    (lambda e: e["conversations"][0]["messages"][0].update(sources=[{"number": 1}]), "sources"),
    (lambda e: e["conversations"][0].update(created="yesterday"), "created"),
    (lambda e: e["conversations"][0].update(evil=1), "evil"), (lambda e: e.update(conversations={}), "conversations")])
def test_what_no_export_gave_is_refused(store, change, told):
    id = store.create().id
    store.append(id, question())
    export = json.loads(store.export().model_dump_json())
    change(export)
    if told is None:
        assert read_export(export).conversations[0].title == NEW    # every field has its default
        return
    with pytest.raises(UserError, match=told):
        read_export(export)


def test_a_failure_in_the_middle_changes_nothing(store):
    id = store.create("kept").id
    store.append(id, first := question())
    twin = Message(id=first.id, role="assistant", content="same id")
    with pytest.raises(sqlite3.IntegrityError):
        store.append(id, question("new"), twin, title="changed")
    assert store.get(id).messages == [first] and store.get(id).title == "kept"


WRITER = """
import sys
from pathlib import Path
from tryplicity.server.conversations import Message, Store
store = Store(Path(sys.argv[1]))
id = store.call(store.create).result().id
for n in range(10**6):
    asked = Message(role="user", content=f"question {n}")
    store.call(lambda: store.append(id, asked, Message(role="assistant", content="half an ans"))).result()
    print(n, flush=True)
"""


def test_kill_9_loses_nothing_that_was_acknowledged(tmp_path):
    path = tmp_path / "c.sqlite"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
    acknowledged = -1
    for line in writer.stdout:
        acknowledged = int(line)
        if acknowledged >= 25:
            os.kill(writer.pid, signal.SIGKILL)
            break
    acknowledged = max([acknowledged, *(int(line) for line in writer.stdout if line.endswith("\n"))])
    writer.wait()
    store = Direct(path)
    [conversation] = store.export().conversations
    asked = [m.content for m in conversation.messages if m.role == "user"]
    assert asked == [f"question {n}" for n in range(len(asked))] and len(asked) in (acknowledged + 1, acknowledged + 2)
    # each answer was being written when the process ended: the next one says so
    assert {m.finish for m in conversation.messages if m.role == "assistant"} == {"cancelled"}
    assert len(conversation.messages) == 2 * len(asked)
    store.close()


def test_files_that_cannot_be_used_are_told(tmp_path):
    (broken := tmp_path / "broken.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(UserError, match=r"broken\.sqlite: cannot be used for conversations"):
        Store(broken)
    with pytest.raises(UserError, match="cannot be used"):
        Store(tmp_path)
    Direct(path := tmp_path / "newer.sqlite").close()
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA user_version=7")
    database.close()
    with pytest.raises(UserError, match="format 7, this one knows 2"):
        Store(path)


#: as the first version made it
FIRST = """
CREATE TABLE conversations (
    id TEXT PRIMARY KEY, title TEXT NOT NULL, created REAL NOT NULL, updated REAL NOT NULL) WITHOUT ROWID;
CREATE INDEX by_time ON conversations (updated);
CREATE TABLE messages (
    number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE,
    conversation TEXT NOT NULL REFERENCES conversations (id) ON DELETE CASCADE,
    role TEXT NOT NULL, content TEXT NOT NULL, sources TEXT NOT NULL, supported INTEGER, created REAL NOT NULL,
    finish TEXT, tokens_per_second REAL, settings TEXT NOT NULL);
CREATE INDEX by_conversation ON messages (conversation, number);
INSERT INTO conversations VALUES ('c', 'Lists', 1.0, 2.0);
INSERT INTO messages VALUES (1, 'm', 'c', 'user', 'What?', '[]', NULL, 1.5, NULL, NULL, '{}');
INSERT INTO messages VALUES (2, 'n', 'c', 'assistant', 'That.', '[]', 0, 2.0, 'stop', 3.5, '{"search": true}');
PRAGMA user_version=1;
"""


def test_a_file_of_the_first_version_opens_and_goes_on(tmp_path):
    database = sqlite3.connect(path := tmp_path / "c.sqlite")
    database.executescript(FIRST)
    database.close()
    for number in (2, 3):       # migrated the first time, as it should be the second
        store = Direct(path)
        messages = store.get("c").messages
        assert [m.content for m in messages][:2] == ["What?", "That."] and len(messages) == number
        assert messages[1].quotation is None and messages[1].supported is False and messages[1].settings["search"]
        store.append("c", answer(quotation="> Lists are. [1]"))
        assert store.get("c").messages[-1].quotation == "> Lists are. [1]"
        store.close()
    with sqlite3.connect(path) as database:
        assert database.execute("PRAGMA user_version").fetchone() == (2,)
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    database.close()


def test_an_export_of_the_first_version_is_read():
    message = {"id": "m", "role": "assistant", "content": "That.", "sources": [], "supported": False, "created": 1.0,
               "finish": "stop", "tokens_per_second": None, "settings": {}}
    [conversation] = read_export({"format": 1, "conversations": [
        {"id": "c", "title": "t", "created": 1.0, "updated": 1.0, "messages": [message]}]}).conversations
    assert conversation.id == "c" and conversation.messages[0].quotation is None


def test_ids_of_an_import_become_addresses_of_their_own(store):
    messages = [{"id": "same", "role": role, "content": role} for role in ("user", "assistant", "user")]
    ids = ["export", "import", "../x", "a/b", "?q", "é", "good-1", "good-1"]
    file = {"conversations": [{"id": id, "title": str(n), "messages": messages} for n, id in enumerate(ids)]}
    assert store.load(read_export(file)) == {"imported": 8, "skipped": 0}
    kept = store.export().conversations
    assert [c.title for c in kept if c.id == "good-1"] == ["6"] and len({c.id for c in kept}) == 8
    assert all(c.id == "good-1" or (len(c.id) == 32 and c.id.isalnum()) for c in kept)
    assert [[m.role for m in store.get(c.id).messages] for c in kept] == [["user", "assistant", "user"]] * 8


@pytest.mark.parametrize("change, told", [
    ({"created": 1e300}, "created"), ({"created": -1.0}, "created"), ({"updated": float("inf")}, "updated"),
    ({"messages": [{"role": "user", "content": "", "settings": {"a": float("inf")}}]}, "settings"),
    ({"messages": [{"role": "user", "content": "", "settings": {"a": {"b": [1]}}}]}, "settings"),
    ({"messages": [{"role": "user", "content": "", "settings": {"a": 10**400}}]}, "settings"),
    ({"messages": [{"role": "user", "content": "", "sources": [
        {"number": 10**400, "id": "", "title": "", "url": "", "text": ""}]}]}, "sources"),
    ({"messages": [{}] * 200_001}, "in parts")])
def test_an_import_that_no_page_could_show_is_refused(change, told):
    with pytest.raises(UserError, match=told):
        read_export({"conversations": [{"title": "t", **change}]})


def test_two_processes_share_a_file(tmp_path):
    one, two = Direct(tmp_path / "c.sqlite"), Direct(tmp_path / "c.sqlite")
    id = one.create("shared").id
    two.append(id, said := question("from the other"))
    assert one.get(id).messages == [said]
    one.close()
    two.close()


def test_markdown_shows_turns_and_sources(store):
    id = store.create("Lists\n# not a heading").id
    store.append(id, question("What?"), answer("That [1].", sources=[
        CitedPassage(number=1, id="p", title="a [b]", url="https://x/y", text="t"),
        CitedPassage(number=2, id="q", title="bad", url="https://x/> evil", text="t")]))
    assert as_markdown(store.get(id)) == (
        "# Lists # not a heading\n\n## Question\n\nWhat?\n\n## Answer\n\nThat [1].\n\nSources:\n\n"
        "1. [a \\[b\\]](<https://x/y>)\n2. bad\n")


def test_markdown_tells_what_is_quoted_from_what_the_model_said(store):
    source = CitedPassage(number=1, id="p", title="list", url="", text="Lists are.")
    id = store.create("Lists").id
    store.append(id, question("What?"), answer("Bananas.", supported=False, sources=[source],
                                               quotation="> Lists are. [1]"))
    assert as_markdown(store.get(id)).endswith(
        "## Answer\n\nBananas.\n\nFrom the sources, not written by the model:\n\n> Lists are. [1]\n\n"
        "Found, but the answer rests on none of them:\n\n1. list\n")
    assert read_export(json.loads(store.export().model_dump_json())) == store.export()


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(text, text), max_size=4))
def test_any_text_goes_in_and_out(turns):
    store = Direct()
    id = store.create().id
    messages = [m for asked, said in turns for m in (question(asked), answer(said))]
    store.append(id, *messages)
    assert store.get(id).messages == messages
    assert read_export(json.loads(store.export().model_dump_json())) == store.export()
    for asked, _ in turns:
        assert [c["id"] for c in store.summaries(asked)] == [id]
    store.close()
    assert Export.model_validate({"conversations": []}).conversations == []


def test_nothing_is_dropped_behind_a_message_that_another_process_added(tmp_path):
    """Two servers on one file: what the second one believes to be the last message is so no more."""
    here, there = Direct(tmp_path / "c.sqlite"), Direct(tmp_path / "c.sqlite")
    id = here.create().id
    here.append(id, question("one"), first := answer("1"))
    there.append(id, question("two"), answer("2"))
    for after, last in ((first.id, first.id), (None, first.id), (None, None)):
        with pytest.raises(Changed):
            here.append(id, question("in its place"), after=after, last=last)
    assert [m.content for m in here.get(id).messages] == ["one", "1", "two", "2"]
    here.append(id, question("in its place"), after=first.id, last=here.get(id).messages[-1].id)
    assert [m.content for m in there.get(id).messages] == ["one", "1", "in its place"]
    here.close()
    there.close()


@pytest.mark.parametrize("foreign", ["an index", "a note"])
def test_a_file_of_something_else_is_refused_and_stays_as_it_was(tmp_path, foreign):
    path = tmp_path / "theirs"
    if foreign == "an index":
        from tryplicity.components import Document
        from tryplicity.search import build_index

        build_index([Document("a", "Some text to find.", "text", "")], path)
    else:
        path.write_text("buy milk\n" * 100)
    before = path.read_bytes()
    with pytest.raises(UserError, match="--conversations"):
        Store(path)
    assert path.read_bytes() == before and [each.name for each in tmp_path.iterdir()] == ["theirs"]
