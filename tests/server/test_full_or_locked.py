"""Conversations whose file another process holds, or for which there is no room: each is told as what it is, nothing
else waits for it, and it passes."""

import contextlib
import json
import os
import resource
import sqlite3
import subprocess
import sys
import threading

import httpx
import pytest

from tests.server.conftest import SERVE

HOLD = """
import sqlite3, sys
database = sqlite3.connect(sys.argv[1], isolation_level=None)
database.execute("PRAGMA busy_timeout = 10000")
database.execute("BEGIN IMMEDIATE")
print("held", flush=True)
sys.stdin.read()
database.execute("ROLLBACK")
"""


@contextlib.contextmanager
def held(path):
    """Another process holds the file."""
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        yield
    finally:
        holder.communicate("")


@pytest.fixture
def kept(started, chat_run, tmp_path, monkeypatch):
    from tryplicity.server import conversations

    monkeypatch.setattr(conversations, "BUSY_SECONDS", 1.5)
    path = tmp_path / "c.sqlite"
    with started(chat_run, conversations=path) as server:
        server.path = path
        yield server


def test_a_file_that_another_process_holds_is_a_503(kept):
    id, waits = kept.new(title="before"), []
    store = kept.service.store
    store.call(lambda: store._database.set_trace_callback(waits.append)).result()
    with held(kept.path):
        answers = []

        def create(_):
            answers.append(kept.http.post("/api/conversations", json={}))

        threads = [threading.Thread(target=create, args=(n,)) for n in range(6)]
        for thread in threads:
            thread.start()
        metrics = kept.http.get("/metrics")
        assert all(thread.is_alive() for thread in threads)     # those wait still
        assert "tryplicity_conversations 1.0" in metrics.text
        asked = kept.http.post("/v1/completions", json={"model": "talker", "prompt": "x", "max_tokens": 2})
        assert asked.status_code == 200
        for thread in threads:
            thread.join()
        # all together wait no longer than one of them would
        assert sum(int(said.rpartition("=")[2]) for said in waits if "busy_timeout" in said) < 2 * 1500
        for answer in answers:
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (503, "database_locked")
            assert "another process" in error["message"] and int(answer.headers["retry-after"]) >= 1
        assert kept.http.get(f"/api/conversations/{id}").json()["title"] == "before"       # reading goes on
        [event] = kept.ask(id, content="What is a list?")
        assert event["type"] == "error" and event["error"]["code"] == "database_locked" and event["retry_after"] >= 1
    assert kept.http.post("/api/conversations", json={}).status_code == 201
    assert kept.ask(id, content="What is a list?", sampling={"max_tokens": 2})[-1]["type"] == "done"
    assert "tryplicity_conversations 2.0" in kept.http.get("/metrics").text


def full(server):
    """Let the file have no more pages than it has."""
    def limit(pages):
        database = server.service.store._database
        [size] = database.execute("PRAGMA page_count").fetchone()
        database.execute(f"PRAGMA max_page_count = {size if pages is None else pages}")

    return lambda pages=None: server.service.store.call(limit, pages).result()


def test_a_file_that_is_full_is_a_507(kept):
    id = kept.new()
    kept.ask(id, content="What is a list?", sampling={"max_tokens": 2})
    before = kept.http.get(f"/api/conversations/{id}").json()
    limit = full(kept)
    limit()
    body = {"conversations": [{"title": "t", "messages": [{"role": "user", "content": "x" * 200_000}]}]}
    for _ in range(2):
        answer = kept.http.post("/api/conversations/import", json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (507, "database_full")
        assert "full" in answer.json()["error"]["message"] and answer.headers["x-should-retry"] == "false"
    [event] = kept.ask(id, content="x" * 200_000)
    assert event["error"]["code"] == "database_full"
    assert kept.http.get(f"/api/conversations/{id}").json() == before
    assert "tryplicity_conversations 1.0" in kept.http.get("/metrics").text
    limit(1 << 20)
    assert kept.http.post("/api/conversations/import", json=body).json() == {"imported": 1, "skipped": 0}
    assert kept.ask(id, content="again", sampling={"max_tokens": 2})[-1]["type"] == "done"
    database = sqlite3.connect(kept.path)       # what was told as kept is there for others to see
    assert database.execute("SELECT count(*) FROM conversations").fetchone() == (2,)


def test_a_limit_of_the_system_on_files_is_a_507_too(tmp_path):
    """In a process of its own, whose files may not grow beyond a size."""
    def small_files():
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, 1 << 18))

    options = {"port": 0, "search": "none", "conversations": str(tmp_path / "c.sqlite")}
    process = subprocess.Popen([sys.executable, "-c", SERVE, json.dumps(options)], stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, text=True, preexec_fn=small_files,
                               cwd=os.path.dirname(os.path.dirname(os.path.dirname(__file__))))
    try:
        url = process.stdout.readline().strip().replace("localhost", "127.0.0.1")
        body = {"conversations": [{"title": "t", "messages": [{"role": "user", "content": "x" * 600_000}]}]}
        with httpx.Client(base_url=url, timeout=60) as http:
            answer = http.post("/api/conversations/import", json=body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (507, "database_full"), answer.text
            assert http.post("/api/conversations", json={"title": "small"}).status_code == 201
            assert [c["title"] for c in http.get("/api/conversations").json()["conversations"]] == ["small"]
    finally:
        process.terminate()
        process.wait(30)


def test_a_commit_that_fails_leaves_nothing_open(tmp_path):
    """The next call must not be a part of what failed: it would be answered, and lost."""
    from tryplicity.server.conversations import Store

    store = Store(tmp_path / "c.sqlite")

    class Failing:
        """The connection, whose next COMMIT finds the disk full."""

        def __init__(self, database):
            self.database, self.fails = database, 1

        def execute(self, statement, *values):
            if statement == "COMMIT" and self.fails:
                self.fails -= 1
                raise sqlite3.OperationalError("database or disk is full")
            return self.database.execute(statement, *values)

        def __getattr__(self, name):
            return getattr(self.database, name)

    store._database = Failing(store._database)
    with pytest.raises(sqlite3.OperationalError):
        store.call(store.create, "lost").result()
    store.call(store.create, "kept").result()
    rows = sqlite3.connect(tmp_path / "c.sqlite").execute("SELECT title FROM conversations").fetchall()
    assert rows == [("kept",)]
    store.close()
