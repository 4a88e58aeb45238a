"""Limits and forms that one request shows: how names are cut, how words are looked for, what a browser may keep."""

import threading

import pytest

from tests.server.test_limits import metrics_of
from tests.server.test_stored_conversations import Direct
from tryplicity import Passage
from tryplicity.server.conversations import CitedPassage, Conversation, Message, as_markdown
from tryplicity.server.page import folder
from tryplicity.server.service import Searcher


class Noting:
    """A retriever that notes what it is asked."""

    name, passages = "noting", 7

    def __init__(self):
        self.asked = []

    def search(self, question, limit):
        self.asked.append((question, limit))
        return [Passage("p", "Title", "https://d/", "A list holds items.", 1.0)]


@pytest.fixture(scope="module")
def server(started):
    retriever = Noting()
    with started(searcher=Searcher(retriever, "noting", examples=("What?",))) as running:
        running.retriever = retriever
        yield running


def test_an_answer_may_rest_on_five_passages(server):
    server.retriever.asked.clear()
    found = server.ask(server.new(), content="What is a list?", search=True)
    assert server.retriever.asked == [("What is a list?", 5)]
    assert [event["type"] for event in found] == ["question", "sources", "error"]
    assert found[-1]["error"]["code"] == "no_model" and found[-1]["retry_after"] is None
    [source] = found[1]["sources"]
    assert source == {"number": 1, "id": "p", "title": "Title", "url": "https://d/", "text": "A list holds items."}
    assert found[-1]["message"]["finish"] == "none" and found[-1]["message"]["sources"] == [source]


def test_what_is_said_of_a_search(server):
    said = server.http.get("/api/model").json()["search"]
    assert (said["available"], said["state"], said["name"], said["passages"], said["examples"]) == (
        True, "ready", "noting", 7, ["What?"])


@pytest.mark.parametrize("limit, status", [("1", 200), ("0", 422), ("000001", 200), ("999999", 200), ("1000000", 400),
                                           ("-1", 400), ("1.0", 400), ("", 200), ("٣", 400)])
def test_numbers_of_passages(server, limit, status):
    assert server.http.get(f"/api/search?q=x&limit={limit}").status_code == status


@pytest.mark.parametrize("title, name", [
    ("a" * 200, "a" * 60), ("a" * 59 + " b", "a" * 59 + "-"), ("!?", "conversation"), ("..", "conversation"),
    ("Was für ein Tag", "Was-f-r-ein-Tag")])
def test_names_of_files(server, title, name):
    id = server.new(title=title)
    for form, ending, kind in (("", "json", "application/json"), ("?format=json", "json", "application/json"),
                               ("?format=markdown", "md", "text/markdown; charset=utf-8")):
        answer = server.http.get(f"/api/conversations/{id}/export{form}")
        assert answer.headers["content-disposition"] == f'attachment; filename="{name}.{ending}"'
        assert answer.headers["content-type"] == kind
    everything = server.http.get("/api/conversations/export")
    assert everything.headers["content-disposition"] == 'attachment; filename="conversations.json"'
    assert everything.json()["format"] == 2


def test_the_borders_that_dashboards_ask_for(server):
    server.http.get("/api/search?q=x")
    for name in ("search_seconds", "request_seconds", "first_token_seconds"):
        start = f"tryplicity_{name}_bucket"
        borders = [key.split('"')[1] for key in metrics_of(server) if key.startswith(start)]
        assert list(map(float, borders)) == [0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300,
                                             float("inf")], name


def test_what_a_browser_may_keep(server):
    page = server.http.get("/")
    assert page.headers["cache-control"] == "no-cache" and page.headers["content-type"] == "text/html; charset=utf-8"
    for file in folder().glob("*.woff2"):
        font = server.http.get(f"/static/{file.name}").headers
        assert (font["cache-control"], font["content-type"]) == ("public, max-age=604800", "font/woff2")
    tag = page.headers["etag"]
    for given, status in ((tag, 304), (f"W/{tag}", 304), (f'"x", {tag}', 304), ('"x"', 200), ("", 200)):
        again = server.http.get("/", headers={"If-None-Match": given})
        assert again.status_code == status and again.headers["etag"] == tag
        assert (again.content == b"") == (status == 304)
    head = server.http.head("/")
    assert head.headers["content-length"] == str(len(page.content)) and head.headers["etag"] == tag


def test_fifty_words_are_looked_for(tmp_path):
    store = Direct(tmp_path / "c.sqlite")
    words = [f"word{n}" for n in range(50)]
    id = store.create("t").id
    store.append(id, Message(role="user", content=" ".join(words)))
    assert [c["id"] for c in store.summaries(" ".join([*words, "absent"]))] == [id]
    assert store.summaries(" ".join([*words[1:], "absent"])) == []
    assert [c["id"] for c in store.summaries(" ".join([*words, *words, words[0]]))] == [id]    # twice is once
    store.close()


def test_conversations_are_listed_the_latest_first_with_their_numbers(tmp_path):
    store = Direct(tmp_path / "c.sqlite")
    ids = [store.create(f"t{n}").id for n in range(3)]
    store.append(ids[1], Message(role="user", content="a"), Message(role="assistant", content="b", finish="stop"))
    listed = store.summaries()
    assert [c["id"] for c in listed] == [ids[1], ids[2], ids[0]] and [c["messages"] for c in listed] == [2, 0, 0]
    assert store.store.kept == store.count() == 3
    store.delete(ids[0])
    assert store.store.kept == store.count() == 2
    given = store.export()
    assert store.load(given) == {"imported": 0, "skipped": 2} and store.store.kept == 2
    given.conversations[0].messages.append(Message(role="user", content="more"))
    assert store.load(given) == {"imported": 1, "skipped": 1} and store.store.kept == store.count() == 3
    store.close()


def test_each_field_of_a_message_comes_back(tmp_path):
    store = Direct(tmp_path / "c.sqlite")
    id = store.create().id
    cited = CitedPassage(number=3, id="a", title="t", url="u", text="x")
    said = [Message(role="assistant", content="x", sources=[cited],
                    supported=supported, finish=finish, tokens_per_second=1.5, settings={"a": 1, "b": None, "c": 0.5},
                    quotation=quotation) for supported, finish, quotation in
            ((True, "stop", None), (False, "length", "> q"), (None, "none", ""), (None, None, None))]
    store.append(id, *said)
    assert store.get(id).messages == said
    said[0].content = "y"
    store.save(id, said[0])
    assert store.get(id).messages == said and store.save(id, Message(role="user", content="none of them")) is None
    assert len(store.get(id).messages) == 4
    store.close()


def test_a_conversation_as_markdown_by_hand():
    sources = [CitedPassage(number=1, id="a", title="A [list]\n of", url="https://d/a b", text="x"),
               CitedPassage(number=2, id="b", title="B", url="", text="x"),
               CitedPassage(number=3, id="c", title="C", url="a<b", text="x")]

    def answer(content, **more):
        return Message(role="assistant", content=content, **{"finish": "stop", "sources": sources[1:2], **more})

    said = [Message(role="user", content=" q \n"), answer("a", sources=sources),
            answer("", supported=False, quotation="> q"), answer("", finish="none")]
    assert as_markdown(Conversation(title=" T \n U", messages=said)) == """# T U

## Question

q

## Answer

a

Sources:

1. [A \\[list\\] of](<https://d/a b>)
2. B
3. C

## Answer



From the sources, not written by the model:

> q

Found, but the answer rests on none of them:

2. B

## Answer



Found:

2. B
"""


def test_calls_of_a_store_that_is_asked_from_many_threads_come_one_after_another(tmp_path):
    store, order = Direct(tmp_path / "c.sqlite"), []
    threads = [threading.Thread(target=lambda n=n: store.store.call(order.append, n).result()) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(order) == list(range(20))
    store.close()


SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize("path, body, param", [
    ("chat/completions", {**CHAT, "response_format": {**SCHEMA, "type": "text"}}, "response_format"),
    ("chat/completions", {**CHAT, "top_logprobs": 1}, "top_logprobs"),
    ("chat/completions", {**CHAT, "tool_choice": "required"}, "tool_choice"),
    ("chat/completions", {**CHAT, "function_call": {"name": "f"}}, "function_call"),
    ("completions", {"model": "m", "prompt": "x", "response_format": {"type": "json_schema"}}, "response_format"),
    ("responses", {"model": "m", "input": "x", "text": {"format": {"type": "text", "schema": {}}}}, "text.format"),
    ("responses", {"model": "m", "input": "x", "tool_choice": "required"}, "tool_choice"),
    ("chat/completions", CHAT, None), ("completions", {"model": "m", "prompt": "x"}, None),
    ("responses", {"model": "m", "input": "x"}, None)])
def test_what_does_not_fit_together_is_told_before_a_model_is_needed(server, path, body, param):
    answer = server.http.post(f"/v1/{path}", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"] == "no_model") == (
        (503, None, True) if param is None else (400, param, False))
    assert param is not None or answer.headers["x-should-retry"] == "false"
