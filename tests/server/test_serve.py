"""The whole process: what it says, how it ends, what it leaves."""

import json
import logging
import shutil
import signal
import socket
import threading

import httpx
import pytest

from tryplicity import UserError
from tryplicity.search.citations import CHECKED_MEANS
from tryplicity.server.app import bind
from tryplicity.server.options import Options

LONG = {"model": "talker", "prompt": "the model", "max_tokens": 200, "stream": True,
        "logit_bias": {str(special): -100 for special in range(10)}}


def test_it_opens_first_loads_then_and_sigterm_lets_what_runs_end(process, chat_run):
    server = process(what=chat_run, grace_seconds=30)
    assert server.url.startswith("http://127.0.0.1:")
    answer = server.http.get("/health")
    assert answer.status_code == 503 and answer.json() == {"status": "loading"}     # torch is not imported in a blink
    assert server.http.get("/").status_code == 200
    assert server.http.get("/api/model").json()["state"] == "loading"
    early = server.http.post("/v1/completions", json=LONG)
    assert early.status_code == 503 and early.headers["retry-after"] == "2"
    assert early.json()["error"]["code"] == "model_loading"
    server.ready()
    assert server.http.get("/api/model").json()["state"] == "ready"
    assert server.http.post("/v1/completions", json={**LONG, "stream": False, "max_tokens": 2}).status_code == 200
    server.http.get("/api/search?q=secret-question")
    with server.http.stream("POST", "/v1/completions", json=LONG) as response:
        lines = (line for line in response.iter_lines() if line.startswith("data: "))
        first = [next(lines) for _ in range(3)]
        server.signal()
        while (refused := httpx.post(f"{server.url}/v1/completions", json=LONG)).status_code == 200:
            pass
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "shutting_down"
        assert int(refused.headers["retry-after"]) > 0
        assert httpx.get(f"{server.url}/health").json() == {"status": "draining"}
        rest = list(lines)
    assert rest[-1] == "data: [DONE]"
    chunks = [json.loads(line[6:]) for line in [*first, *rest[:-1]]]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    code, said = server.end()
    assert code == 0 and "POST /v1/completions 200" in said and "GET /api/search 503" in said
    assert "secret-question" not in said and "the model" not in said.replace("there is no model", "")
    assert "Traceback" not in said
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/health")


@pytest.mark.slow
def test_what_outlasts_the_time_of_grace_is_told(process, chat_run, tmp_path):
    path = tmp_path / "c.sqlite"
    server = process(what=chat_run, grace_seconds=0.2, conversations=path).ready()
    id = server.http.post("/api/conversations", json={}).json()["id"]
    body = {"content": "x", "sampling": {"temperature": 1.9, "max_tokens": 400, "repetition_penalty": 2}}
    with server.http.stream("POST", f"/api/conversations/{id}/ask", json=body) as response:
        lines = (line for line in response.iter_lines() if line.startswith("data: "))
        for _ in range(5):
            next(lines)
        server.signal()
        events = [json.loads(line[6:]) for line in lines]
    code, said = server.end()
    assert code == 0 and "Traceback" not in said
    answer = _only(path).messages[1]
    if events[-1]["type"] == "error":       # it may have been done by then
        assert events[-1]["error"]["code"] == "shutting_down" and answer.finish == "cancelled" and answer.content


def _only(path):
    from tryplicity.server.conversations import Store

    store = Store(path)
    [conversation] = store.call(store.export).result().conversations
    store.close()
    return conversation


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_at_once(process, chat_run, number):
    server = process(what=chat_run, grace_seconds=60).ready()
    body = {**LONG, "max_tokens": 500}
    with pytest.raises(httpx.RemoteProtocolError), server.http.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        server.signal(number)
        while httpx.get(f"{server.url}/health").status_code == 200:
            pass
        server.signal(number)
        list(lines)
    assert server.end(10)[0] == 128 + number


def test_a_signal_while_it_loads(process, chat_run):
    server = process(what=chat_run)
    server.signal()
    code, said = server.end()
    assert code == 0 and "Traceback" not in said


@pytest.mark.slow     # that of a store alone runs always
def test_kill_9_keeps_the_question_and_the_beginning_of_the_answer(process, started, chat_run, tmp_path):
    path = tmp_path / "c.sqlite"
    server = process(what=chat_run, conversations=path).ready()
    id = server.http.post("/api/conversations", json={}).json()["id"]
    body = {"content": "What is a list?", "sampling": {"temperature": 1.9, "max_tokens": 490, "repetition_penalty": 2}}
    with pytest.raises(httpx.HTTPError), server.http.stream("POST", f"/api/conversations/{id}/ask",
                                                            json=body) as response:
        lines = (line for line in response.iter_lines() if '"text"' in line)
        next(lines)
        server.signal(signal.SIGKILL)
        list(lines)
    server.end()
    question, answer = _only(path).messages
    assert question.content == "What is a list?" and answer.role == "assistant"
    with started(conversations=path) as server:
        shown = server.http.get(f"/api/conversations/{id}").json()
    assert [m["finish"] for m in shown["messages"]] == [None, "cancelled"] and shown["title"] == "What is a list?"


def test_a_users_mistake_is_one_line(process):
    code, said = process(host="0.0.0.0").end()
    assert "--allow-public" in said and "UserError" in said and "Traceback" not in said
    assert code == 1     # 2 by the command line


@pytest.mark.parametrize("options, told", [
    ({"what": "/nowhere/run"}, "there is no such run folder"), ({"search": "pasages"}, "did you mean passages"),
    ({"search": "{"}, "--search"), ({"conversations": "/proc/none/c.sqlite"}, "cannot be used for conversations")])
def test_a_users_mistake_ends_it(monkeypatch, options, told):
    from tryplicity import load_plugins
    from tryplicity.server import app

    monkeypatch.setattr(app, "_log_to_stderr", lambda: None)
    with pytest.raises(UserError, match=told):
        app.serve(plugins=load_plugins(), **{"port": 0, "search": "none", "conversations": "none", **options})


def test_a_search_that_cannot_be_made_ready_does_not_keep_the_model_away(started, chat_run, tmp_path):
    with started(chat_run, search=f"{{type: passages, index: {tmp_path}/none.sqlite}}") as server:
        server.until(lambda: "none.sqlite" in server.http.get("/api/search?q=x").json()["error"]["message"])
        assert server.http.get("/api/search?q=x").status_code == 503
        assert server.http.get("/api/model").json()["search"]["available"] is False


def test_the_passages_of_an_index_are_found_and_asked_from(started, chat_run, tmp_path):
    from tryplicity import Document
    from tryplicity.search.building import build_index

    documents = [Document("list.append", "list.append(x) adds an item to the end.", "text", "list.html"),
                 Document("tuple", "A tuple is an immutable sequence of items.", "text", "tuple.html")]
    index = build_index(documents, tmp_path / "index.sqlite")
    with started(chat_run, search=f"{{type: passages, index: {index}}}") as server:
        server.until(lambda: server.http.get("/api/model").json()["search"]["available"])
        assert server.http.get("/api/model").json()["search"] == {
            "available": True, "state": "ready", "name": "passages", "passages": 2,
            "examples": ["What is list.append?", "What is tuple?"], "checked": CHECKED_MEANS}
        found = server.http.get("/api/search", params={"q": "immutable tuple"}).json()["results"]
        assert set(found[0]) == {"id", "title", "url", "text", "score"} and "immutable" in found[0]["text"]
        events = server.ask(server.new(), content="What is a tuple?", search=True, sampling={"max_tokens": 8})
        assert "immutable" in events[1]["sources"][0]["text"] and events[-1]["type"] == "done"
        assert events[-1]["message"]["supported"] in (True, False)


def test_the_key_comes_from_the_environment_too(process, monkeypatch):
    monkeypatch.setenv("TRYPLICITY_API_KEY", "sesame")
    server = process()
    assert server.http.get("/api/model").status_code == 401
    assert server.http.get("/api/model", headers={"Authorization": "Bearer sesame"}).status_code == 200


@pytest.mark.parametrize("given, variable", [("", None), ("  ", None), ("", "sesame"), (None, ""), (None, " ")])
def test_an_empty_key_is_not_no_key(monkeypatch, given, variable):
    """`--api-key "$UNSET"` must not open the server to everyone, whatever else is set."""
    from tryplicity import load_plugins
    from tryplicity.server import app

    monkeypatch.delenv("TRYPLICITY_API_KEY", raising=False)
    if variable is not None:
        monkeypatch.setenv("TRYPLICITY_API_KEY", variable)
    for host in ("127.0.0.1", "0.0.0.0"):
        with pytest.raises(UserError, match="the API key is empty"):
            app.serve(plugins=load_plugins(), port=0, search="none", conversations="none", api_key=given, host=host,
                      say=pytest.fail)


def test_an_empty_key_on_the_command_line_is_refused(monkeypatch):
    from click.testing import CliRunner

    from tryplicity.cli import main

    for arguments in (["--api-key", ""], ["--api-key", " "]):
        done = CliRunner().invoke(main, ["serve", "--port", "0", "--search", "none", *arguments])
        assert done.exit_code != 0 and "API key is empty" in (done.output + str(done.exception))


def test_conversations_are_kept_in_the_run_folder(process, chat_run, tmp_path, monkeypatch):
    """Nothing is written elsewhere; and it is said where."""
    run = shutil.copytree(chat_run, tmp_path / "run")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    server = process(what=run, conversations=None).ready()
    server.http.post("/api/conversations", json={"title": "kept"})
    server.signal()
    assert f"conversations are kept in {run}/conversations.sqlite" in server.end()[1]
    assert _only(run / "conversations.sqlite").title == "kept" and not (tmp_path / "data").exists()


def test_without_a_run_folder_they_are_kept_in_the_data_folder(tmp_path, monkeypatch):
    from tryplicity.server.app import default_conversations

    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    (tmp_path / "model.safetensors").touch()
    elsewhere = tmp_path / "data" / "tryplicity" / "conversations.sqlite"
    assert default_conversations() == default_conversations(tmp_path / "model.safetensors") == elsewhere
    assert default_conversations(tmp_path) == tmp_path / "conversations.sqlite"


def test_a_port_that_is_taken_is_told():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match=r"cannot listen there.*another --port"):
            bind(Options(port=taken.getsockname()[1]))


def test_an_unforeseen_error_tells_the_client_nothing(started, caplog):
    with started() as server:
        def broken():
            raise RuntimeError("secret-of-the-server")

        server.service.describe = broken
        with caplog.at_level(logging.ERROR, "tryplicity.server"):
            answer = server.http.get("/api/model")
        assert answer.status_code == 500 and "secret" not in answer.text and "Traceback" not in answer.text
        assert answer.json()["error"]["code"] == "internal_error"
        assert "secret-of-the-server" in caplog.text      # for who runs it
        assert server.http.get("/health").status_code == 200


def test_a_plugins_broken_routes_are_left_out(started, tmp_path, capsys):
    from tryplicity import load_plugins

    (tmp_path / "bad_routes.py").write_text(
        "from tryplicity import hookimpl\n\n"
        "@hookimpl\ndef tryplicity_server_routes(app):\n    raise ValueError('no')\n")
    with started(plugins=load_plugins([str(tmp_path / "bad_routes.py")])) as server:
        assert server.http.get("/health").status_code == 200
    assert "tryplicity_server_routes raised ValueError: no" in capsys.readouterr().err


def test_many_threads_may_ask_for_conversations_at_once(started):
    with started() as server:
        ids = []
        threads = [threading.Thread(target=lambda: ids.append(server.new(title="t"))) for _ in range(30)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(ids)) == 30 == len(server.http.get("/api/conversations").json()["conversations"])
