"""A question in a conversation: its events in order, what is kept of it, and what happens when it is cut short."""

import json
import threading
import time

import pytest

from tests.server.conftest import make_run
from tryplicity import Passage, Retriever, UserError
from tryplicity.search.citations import CHECKED_MEANS
from tryplicity.server.ask import _checked, _latest
from tryplicity.server.conversations import Message, Store
from tryplicity.server.service import Searcher

SHELF = [Passage("p1", "list", "https://d/list", "A list holds items in order.", 2.0),
         Passage("p2", "tuple", "https://d/tuple", "A tuple is an immutable sequence.", 1.0)]
SHORT = {"temperature": 0, "max_tokens": 8}


class Shelf(Retriever):
    """Finds the passages whose title the question says."""

    name = "shelf"

    def __init__(self):
        self.asked = []

    def search(self, question, limit):
        self.asked.append(question)
        if "broken" in question:
            raise UserError("the shelf is broken; mend it")
        return [p for p in SHELF if p.title in question][:limit]


@pytest.fixture(scope="module")
def server(started, chat_run, tmp_path_factory):
    searcher = Searcher(Shelf(), "shelf", 2)
    with started(chat_run, searcher=searcher, conversations=tmp_path_factory.mktemp("c") / "c.sqlite") as running:
        yield running


def kinds(found):
    return [event["type"] for event in found if event["type"] != "text"]


def text(found):
    return "".join(event["text"] for event in found if event["type"] == "text")


def kept(server, id):
    return server.http.get(f"/api/conversations/{id}").json()["messages"]


def test_a_question_is_answered_and_kept(server):
    id = server.new()
    found = server.ask(id, content="What is a list?", search=True, sampling=SHORT)
    assert kinds(found) == ["question", "sources", "done"]
    question, sources, done = found[0]["message"], found[1]["sources"], found[-1]["message"]
    assert sources == [{"number": 1, "id": "p1", "title": "list", "url": "https://d/list", "text": SHELF[0].text}]
    assert question["content"] == "What is a list?" and question["role"] == "user" and question["finish"] is None
    assert done["role"] == "assistant" and done["finish"] == "length" and done["tokens_per_second"] > 0
    assert done["content"] == text(found).strip() and done["supported"] is False
    # nothing is cited: what was found stays with the answer, and what it says is quoted beside the model's text
    assert done["sources"] == sources and done["quotation"] == "> A list holds items in order. [1]"
    assert done["settings"]["passages"] == 1
    assert done["settings"]["max_tokens"] == 8 and done["settings"]["search"] is True
    assert kept(server, id) == [question, done]
    [listed] = [c for c in server.http.get("/api/conversations").json()["conversations"] if c["id"] == id]
    assert listed["title"] == "What is a list?" and listed["messages"] == 2
    assert set(listed) == {"id", "title", "created", "updated", "messages"}


def test_the_passages_are_in_the_prompt(server):
    id = server.new()
    with_sources = server.ask(id, content="What is a tuple?", search=True, sampling=SHORT)
    assert [s["id"] for s in with_sources[1]["sources"]] == ["p2"]
    without = server.ask(server.new(), content="What is a tuple?", sampling=SHORT)
    assert without[1]["sources"] == [] and without[-1]["message"]["supported"] is None
    assert without[-1]["message"]["quotation"] is None and "passages" not in without[-1]["message"]["settings"]
    assert text(with_sources) != text(without)


def test_an_answer_rests_on_what_was_said_before_and_is_the_chat_models(server):
    from tryplicity.inference.chat import reply
    from tryplicity.inference.sampler import Sampling

    id = server.new()
    first = server.ask(id, content="What is a list?", sampling=SHORT)
    second = server.ask(id, content="And a file?", sampling={**SHORT, "repetition_penalty": 1})
    said = [m["content"] for m in kept(server, id)]
    assert len(said) == 4 and said[1] == first[-1]["message"]["content"]
    messages = [{"role": r, "content": c} for r, c in zip(("user", "assistant", "user"), said[:3], strict=True)]
    assert text(second) == "".join(reply(server.service.engine, messages, Sampling(temperature=0), 8))


def test_the_conversation_before_is_not_read_again(server):
    id = server.new()
    server.ask(id, content="What is a list?", sampling=SHORT)
    before = server.service.engine.statistics()
    server.ask(id, content="And?", sampling=SHORT)
    after = server.service.engine.statistics()
    read = after["prompt_tokens_total"] - before["prompt_tokens_total"]
    cached = after["cached_tokens_total"] - before["cached_tokens_total"]
    assert cached > 20 and (read - cached < 20 or read < 20)     # the new question alone


def test_editing_drops_what_came_after(server):
    id = server.new()
    for question in ("one", "two", "three"):
        server.ask(id, content=question, sampling=SHORT)
    messages = kept(server, id)
    server.ask(id, content="TWO", after=messages[1]["id"], last=messages[-1]["id"], sampling=SHORT)
    edited = kept(server, id)
    assert [m["content"] for m in edited if m["role"] == "user"] == ["one", "TWO"] and edited[:2] == messages[:2]
    server.ask(id, content="ONE", after=None, last=edited[-1]["id"], sampling=SHORT)
    assert [m["content"] for m in kept(server, id) if m["role"] == "user"] == ["ONE"]
    assert server.http.get(f"/api/conversations/{id}").json()["title"] == "one"


def test_a_question_comes_last_whatever_another_tab_has_added(server):
    """Asking drops nothing: an older tab knows only its own first question."""
    id = server.new()
    for question in ("one", "two", "three"):
        server.ask(id, content=question, sampling=SHORT)
    before = kept(server, id)
    asked = server.ask(id, content="from the older tab", sampling=SHORT)
    assert kept(server, id)[:6] == before and len(kept(server, id)) == 8
    assert asked[0]["after"] == before[-1]["id"]    # so that the tab sees that it missed something


@pytest.mark.parametrize("change", ["edit", "edit the first", "regenerate", "continue"])
def test_what_drops_messages_says_which_it_believes_last(server, change):
    id = server.new()
    first = server.ask(id, content="one", sampling={**SHORT, "max_tokens": 3})[-1]["message"]
    body = {"edit": {"content": "ONE", "after": first["id"]}, "edit the first": {"content": "ONE", "after": None},
            "regenerate": {"regenerate": first["id"]}, "continue": {"continue": first["id"]}}[change]
    if change.startswith("edit"):
        missing = server.http.post(f"/api/conversations/{id}/ask", json={**body, "sampling": SHORT})
        assert missing.status_code == 400 and missing.json()["error"]["param"] == "last"
        body["last"] = first["id"]      # without: the answer that is regenerated or continued
    server.ask(id, content="from another tab", sampling=SHORT)
    before = kept(server, id)
    stale = server.http.post(f"/api/conversations/{id}/ask", json={**body, "sampling": SHORT})
    assert stale.status_code == 409 and stale.json()["error"]["code"] == "conversation_changed"
    assert kept(server, id) == before
    if change != "continue":
        body["last"] = before[-1]["id"]
        assert server.ask(id, **body, sampling=SHORT)[-1]["type"] == "done"


def test_regenerating_replaces_the_answer_and_what_came_after(server):
    id = server.new()
    first = server.ask(id, content="one", sampling={"seed": 1, "max_tokens": 8, "temperature": 1.5})
    second = server.ask(id, content="two", sampling=SHORT)
    again = server.ask(id, regenerate=first[-1]["message"]["id"], last=second[-1]["message"]["id"],
                       sampling={"seed": 2, "max_tokens": 8, "temperature": 1.5})
    assert kinds(again) == ["question", "sources", "done"] and again[0]["message"] == first[0]["message"]
    assert kept(server, id) == [first[0]["message"], again[-1]["message"]]
    assert again[-1]["message"]["content"] != first[-1]["message"]["content"]
    assert again[-1]["message"]["id"] != first[-1]["message"]["id"]


def test_continuing_goes_on_where_the_answer_stood(server):
    plain = {"temperature": 0, "repetition_penalty": 1}
    whole = server.ask(server.new(), content="one", sampling={**plain, "max_tokens": 24})[-1]["message"]["content"]
    id = server.new()
    half = server.ask(id, content="one", sampling={**plain, "max_tokens": 10})[-1]["message"]
    found = server.ask(id, **{"continue": half["id"]}, sampling={**plain, "max_tokens": 14})
    done = found[-1]["message"]
    assert kinds(found) == ["question", "sources", "done"] and done["id"] == half["id"]
    assert done["content"].startswith(half["content"]) and done["content"] == (half["content"] + text(found)).strip()
    if half["content"].isascii() and whole.isascii() and whole.startswith(half["content"]):
        assert done["content"].split() == whole.split()
    assert [m["id"] for m in kept(server, id)] == [found[0]["message"]["id"], half["id"]]


def test_who_closes_the_stream_stops_the_answer_and_its_beginning_is_kept(server):
    id = server.new()
    with server.http.stream("POST", f"/api/conversations/{id}/ask",
                            json={"content": "long", "sampling": {"max_tokens": 450, "temperature": 0}}) as response:
        seen = ""
        for line in response.iter_lines():
            event = json.loads(line[6:]) if line.startswith("data: ") else {}
            seen += event.get("text", "")
            if len(seen) > 12:
                break
    server.free()
    server.until(lambda: kept(server, id)[-1]["finish"])
    question, answer = kept(server, id)
    assert answer["finish"] == "cancelled" and answer["content"].startswith(seen.lstrip())
    assert len(answer["content"]) < 400
    # at once again, though the last one is hardly over
    again = server.ask(id, regenerate=answer["id"], sampling=SHORT)
    assert kept(server, id) == [question, again[-1]["message"]]


def test_one_answer_at_a_time_in_a_conversation(server):
    id = server.new()
    body = {"content": "long", "sampling": {"max_tokens": 450, "temperature": 0}}
    first = server.ask(server.new(), content="x", sampling=SHORT)       # others are not held up
    assert kinds(first)[-1] == "done"
    with server.http.stream("POST", f"/api/conversations/{id}/ask", json=body) as response:
        lines = response.iter_lines()     # kept: its end would close the stream
        next(line for line in lines if '"text"' in line)
        lock = server.service.writing[id][0]
        assert lock.locked()
        waiting = threading.Thread(target=lambda: answers.append(
            server.http.post(f"/api/conversations/{id}/ask", json={"content": "me too", "sampling": SHORT})))
        answers = []
        waiting.start()
        time.sleep(0.1)
    waiting.join(30)
    assert answers[0].status_code == 200 and [m["content"] for m in kept(server, id)][::2] == ["long", "me too"]
    assert server.service.writing == {}


def test_a_conversation_that_stays_busy_is_told(server, monkeypatch):
    import asyncio

    monkeypatch.setattr("tryplicity.server.ask.STOPPING_SECONDS", 0.1)
    id = server.new()

    async def hold():
        lock = asyncio.Lock()
        await lock.acquire()
        server.service.writing[id] = (lock, 1)
        return lock

    lock = asyncio.run_coroutine_threadsafe(hold(), server.loop).result()
    answer = server.http.post(f"/api/conversations/{id}/ask", json={"content": "me too"})
    assert answer.status_code == 409 and answer.json()["error"]["code"] == "conversation_busy"
    server.loop.call_soon_threadsafe(lock.release)
    server.loop.call_soon_threadsafe(server.service.writing.pop, id)
    assert kept(server, id) == []


@pytest.mark.parametrize("body, status, param", [
    ({}, 400, "content"), ({"content": "a", "regenerate": "b"}, 400, "content"), ({"content": "  "}, 400, "content"),
    ({"content": 5}, 400, "content"), ({"continue": "none"}, 404, None), ({"regenerate": "none"}, 404, None),
    ({"content": "a", "after": "none", "last": None}, 404, None), ({"content": "a", "after": None}, 400, "last"),
    ({"content": "a", "after": None, "last": "none"}, 409, None), ({"content": "a", "serach": True}, 400, "serach"),
    ({"content": "a", "sampling": {"temperature": 9}}, 422, "sampling.temperature"),
    ({"content": "a", "sampling": {"seed": -1}}, 422, "sampling.seed"),
    ({"content": "a", "sampling": {"heat": 1}}, 400, "sampling.heat")])
def test_mistakes_change_nothing(server, body, status, param):
    id = server.new()
    answer = server.http.post(f"/api/conversations/{id}/ask", json=body)
    assert answer.status_code == status and answer.json()["error"]["param"] == param
    assert kept(server, id) == [] and server.service.writing == {}


def test_only_answers_are_written_again(server):
    id = server.new()
    asked = server.ask(id, content="one", sampling=SHORT)[0]["message"]
    for what in ("regenerate", "continue"):
        answer = server.http.post(f"/api/conversations/{id}/ask", json={what: asked["id"]})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == what
    first = kept(server, id)[1]
    server.ask(id, content="two", sampling=SHORT)
    assert server.http.post(f"/api/conversations/{id}/ask", json={"continue": first["id"]}).status_code == 409
    assert server.http.post("/api/conversations/none/ask", json={"content": "a"}).status_code == 404


def test_a_search_that_fails_says_so_and_the_question_stays(server):
    id = server.new()
    found = server.ask(id, content="the broken shelf", search=True, sampling=SHORT)
    assert kinds(found) == ["question", "error"]
    assert found[-1]["error"]["code"] == "search_failed" and "mend it" in found[-1]["error"]["message"]
    assert [m["content"] for m in kept(server, id)] == ["the broken shelf"]


def test_too_many_tokens_to_write_are_as_many_as_the_server_writes(started, chat_run):
    with started(chat_run, max_tokens=5) as server:
        server.until(lambda: server.http.get("/api/model").json()["state"] == "ready")
        found = server.ask(server.new(), content="long", sampling={"max_tokens": 10**6, "temperature": 0})
        assert found[-1]["message"]["finish"] == "length"
        assert server.service.engine.statistics()["tokens_total"] == 5


def test_a_question_that_is_too_long_is_refused_in_the_stream(server):
    found = server.ask(server.new(), content="word " * 2000, sampling=SHORT)
    assert found[-1]["error"]["code"] == "context_length_exceeded"


def test_a_long_conversation_loses_its_oldest_turns_and_goes_on(server):
    id = server.new()
    for turn in range(12):
        found = server.ask(id, content=f"question {turn} " + "of the model and its list " * 3, sampling=SHORT)
        assert kinds(found)[-1] == "done", found[-1]
    assert len(kept(server, id)) == 24


def test_a_conversation_of_thousands_of_messages_goes_on_and_is_not_read_again_each_turn(server):
    said = [{"id": f"m{n}", "role": ("user", "assistant")[n % 2], "content": f"turn {n} of the model", "finish": "stop"}
            for n in range(3000)]
    long = {"conversations": [{"id": "thousands", "title": "long", "messages": said}]}
    assert server.http.post("/api/conversations/import", json=long).json() == {"imported": 1, "skipped": 0}
    cached = []
    for turn in range(8):
        before = server.service.engine.statistics()["cached_tokens_total"]
        found = server.ask("thousands", content=f"again {turn}", search=turn == 7, sampling=SHORT)
        assert kinds(found)[-1] == "done", found[-1]
        cached.append(server.service.engine.statistics()["cached_tokens_total"] - before)
    assert len(kept(server, "thousands")) == 3016
    assert sum(tokens > 100 for tokens in cached[1:7]) >= 3, cached      # as long as its beginning stays the same


def test_what_is_left_out_of_a_long_conversation():
    history = [{"role": ("user", "assistant")[n % 2], "content": str(n)} for n in range(21)]
    for budget in range(0, 23):
        left = _latest(history, lambda message: 1, budget)
        assert len(left) <= budget and (not left or left[0]["role"] == "user")
        assert left == history if budget >= 21 else len(left) in (0, 5, 13)
    assert _latest([], lambda message: 1, 5) == []


class Long(Retriever):
    """Five passages of hundreds of words."""

    name = "long"

    def search(self, question, limit):
        return [Passage(f"p{n}", f"list {n}", "", f"A list of kind {n} holds items. " * 60 + "x" * 500, 1.0)
                for n in range(5)][:limit]


@pytest.mark.parametrize("context, read", [(256, {0}), (900, {1, 2, 3, 4})])
def test_what_does_not_fit_is_left_out_and_said(started, registry, prepared, tmp_path, context, read):
    run = make_run(tmp_path / "tiny", registry, prepared, "name=tiny", f"context_length={context}",
                   "phases=[{kind: pretrain, share: 0.5}, {kind: chat, share: 0.5}]")
    with started(run, searcher=Searcher(Long(None), "long", 5)) as server:
        id = server.new()
        for _ in range(2):      # whose history does not fit either
            found = server.ask(id, content="What is a list?", search=True, sampling={**SHORT, "max_tokens": 60})
            done = found[-1]["message"]
            assert len(found[1]["sources"]) == len(done["sources"]) == 5, found[-1]
            assert done["settings"]["passages"] in read and done["supported"] is False
            assert done["quotation"].startswith("> A list of kind")
        [last] = server.ask(id, content="word " * 1000, search=True, sampling=SHORT)[-1:]
        assert last["error"]["code"] == "context_length_exceeded"


def test_without_a_model_the_sources_still_come_and_stay(started):
    with started(searcher=Searcher(Shelf(), "shelf", 2)) as server:
        id = server.new()
        found = server.ask(id, content="a list", search=True)
        assert kinds(found) == ["question", "sources", "error"] and len(found[1]["sources"]) == 1
        assert found[-1]["error"]["code"] == "no_model"
        question, nothing = kept(server, id)
        assert found[-1]["message"] == nothing and nothing["sources"] == found[1]["sources"]
        assert nothing["content"] == "" and nothing["finish"] == "none" and nothing["supported"] is None
        assert nothing["quotation"] == "> A list holds items in order. [1]"
        again = server.ask(id, regenerate=nothing["id"], search=True)
        assert kinds(again) == ["question", "sources", "error"] and "message" not in again[-1]
        assert kept(server, id) == [question, nothing]
        server.ask(id, content="a zebra", search=True)      # nothing found, nothing to keep
        assert [m["role"] for m in kept(server, id)] == ["user", "assistant", "user"]
        assert server.http.get("/api/search?q=tuple").json()["results"] == [SHELF[1]._asdict()]
        assert server.http.get("/api/model").json()["search"] == {
            "available": True, "state": "ready", "name": "shelf", "passages": 2, "examples": [],
            "checked": CHECKED_MEANS}


def test_without_a_search_it_is_told(started):
    with started() as server:
        assert server.http.get("/api/search?q=x").json()["error"]["code"] == "no_search"
        assert server.ask(server.new(), content="x", search=True)[-1]["error"]["code"] == "no_search"
        assert server.ask(server.new(), content="x")[-1]["error"]["code"] == "no_model"


def test_a_base_model_is_no_answerer(started, base_run):
    with started(base_run) as server:
        assert server.ask(server.new(), content="x")[-1]["error"]["code"] == "not_a_chat_model"
        assert server.http.get("/api/model").json()["kernels"] == server.service.kernels


def test_busy_is_told_with_the_time_to_wait_and_the_old_answer_stays(started, chat_run):
    with started(chat_run, slots=1, engine={"max_waiting": 0}) as server:
        id = server.new()
        old = server.ask(id, content="a", sampling=SHORT)[-1]["message"]
        with server.http.stream("POST", "/v1/completions", json={
                "model": "talker", "prompt": "a", "max_tokens": 480, "stream": True}) as response:
            lines = response.iter_lines()     # kept: its end would close the stream
            next(lines)
            found = server.ask(id, regenerate=old["id"], sampling=SHORT)
        assert found[-1]["error"]["code"] == "rate_limit_exceeded" and found[-1]["retry_after"] >= 1
        assert kept(server, id)[-1] == old


def test_marks_are_checked_and_numbered_as_they_occur():
    answer = Message(role="assistant", content="")
    text = " A tuple is an immutable sequence [2]. Bananas fly over Rome [1]. "
    done = _checked(answer, "tuple?", text, SHELF, "stop", 3.5)
    assert done.content == "A tuple is an immutable sequence [1]. Bananas fly over Rome."
    assert [(s.number, s.id) for s in done.sources] == [(1, "p2")] and done.supported is True
    assert done.quotation is None
    nothing = _checked(answer, "tuple?", "Bananas fly over Rome [1].", SHELF, "stop", None)
    assert nothing.supported is False and nothing.content == "Bananas fly over Rome."
    assert [(s.number, s.id) for s in nothing.sources] == [(1, "p1"), (2, "p2")]
    assert nothing.quotation == "> A tuple is an immutable sequence. [2]"


# --- /api/conversations ---

@pytest.mark.parametrize("id", ["%00", "%ff", "%ED%A0%80", "a%2Fb", "%2e%2e", "'%20OR%201=1", "x" * 6000])
def test_ids_that_are_none(server, id):
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/export"), ("POST", "/ask")):
        answer = server.http.request(method, f"/api/conversations/{id}{path}",
                                     **({"json": {"content": "a"}} if path == "/ask" else {}))
        assert answer.status_code == 404 and answer.json()["error"]["code"] == "not_found"


def test_no_line_of_a_question_is_taken_for_an_event(server):
    id, said = server.new(), 'a\r\n\r\ndata: {"type": "done"}\r\rdata: 1\u2028\x85\x00 list'
    found = server.ask(id, content=said, search=True, sampling=SHORT)
    assert kinds(found) == ["question", "sources", "done"] and found[0]["message"]["content"] == said
    assert kept(server, id)[0]["content"] == said


def test_a_search_of_a_thousand_words_finds(server):
    id = server.new()
    server.ask(id, content="zebra", sampling=SHORT)
    for words, number in (("zebra " * 300, 1), (" ".join(f"w{n}" for n in range(350)), 0)):
        answer = server.http.get("/api/conversations", params={"q": words})
        assert answer.status_code == 200 and len(answer.json()["conversations"]) == number


def test_conversations_over_http(server):
    http = server.http
    made = http.post("/api/conversations", json={"title": " My  list "})
    assert made.status_code == 201 and made.json()["title"] == "My list" and made.json()["messages"] == []
    id = made.json()["id"]
    assert http.post("/api/conversations").status_code == 201      # no body at all
    assert http.patch(f"/api/conversations/{id}", json={"title": "Renamed ü"}).json()["title"] == "Renamed ü"
    found = http.get("/api/conversations", params={"q": "RENAMED Ü"}).json()["conversations"]
    assert [c["id"] for c in found] == [id]
    for body, status in (({}, 400), ({"title": ""}, 400), ({"title": "x" * 201}, 422), ({"title": 1}, 400)):
        assert http.patch(f"/api/conversations/{id}", json=body).status_code == status
    assert http.delete(f"/api/conversations/{id}").status_code == 204
    for method in ("GET", "DELETE"):
        gone = http.request(method, f"/api/conversations/{id}")
        assert gone.status_code == 404 and gone.json()["error"]["code"] == "not_found"
    assert http.patch(f"/api/conversations/{id}", json={"title": "x"}).status_code == 404


def test_export_and_import_over_http(server, started, tmp_path):
    id = server.new(title='A "title"; filename=evil.html\u2028/..')
    server.ask(id, content="What?", sampling=SHORT)
    one = server.http.get(f"/api/conversations/{id}/export")
    assert one.headers["content-disposition"] == 'attachment; filename="A-title-filename-evil-html.json"'
    markdown = server.http.get(f"/api/conversations/{id}/export?format=markdown")
    assert markdown.headers["content-type"].startswith("text/markdown") and "## Question\n\nWhat?" in markdown.text
    assert server.http.get(f"/api/conversations/{id}/export?format=pdf").status_code == 400
    everything = server.http.get("/api/conversations/export").json()
    with started(conversations=tmp_path / "other.sqlite") as other:
        assert other.http.post("/api/conversations/import", content=one.content).json() == {
            "imported": 1, "skipped": 0}
        number = len(everything["conversations"])
        assert other.http.post("/api/conversations/import", json=everything).json() == {
            "imported": number - 1, "skipped": 1}
        assert other.http.get("/api/conversations/export").json() == everything
        refused = other.http.post("/api/conversations/import", json={"conversations": [{"evil": 1}]})
        assert refused.status_code == 400 and "import what an export gave" in refused.json()["error"]["message"]


@pytest.mark.parametrize("query, status", [("", 400), ("?q=", 400), ("?q=x&limit=0", 422), ("?q=x&limit=51", 200),
                                           ("?q=x&limit=a", 400), ("?q=x&limit=-1", 400), ("?q=" + "x" * 2001, 422),
                                           ("?q=%00%ff&limit=50", 200)])
def test_search_values(server, query, status):
    assert server.http.get(f"/api/search{query}").status_code == status


def test_search_is_limited(server):
    answer = server.http.get("/api/search", params={"q": "list tuple", "limit": 1}).json()
    assert [r["id"] for r in answer["results"]] == ["p1"] and answer["query"] == "list tuple" and answer["seconds"] >= 0


def test_conversations_survive_a_restart(started, chat_run, tmp_path):
    path = tmp_path / "c.sqlite"
    with started(chat_run, conversations=path) as server:
        id = server.new()
        server.ask(id, content="one", sampling=SHORT)
        before = server.http.get(f"/api/conversations/{id}").json()
    with started(chat_run, conversations=path) as server:
        assert server.http.get(f"/api/conversations/{id}").json() == before
        assert kinds(server.ask(id, content="two", sampling=SHORT))[-1] == "done"
    store = Store(path)
    assert store.call(store.count).result() == 1
    store.close()
