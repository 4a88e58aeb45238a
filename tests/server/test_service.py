"""The server as a whole: what it says of itself, how much it does at once by default, what it counts, how it ends."""

import asyncio
import json
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import httpx
import pytest

from tests.server.test_limits import LONG, metrics_of, together
from tryplicity import Passage, load_plugins
from tryplicity.search.citations import CHECKED_MEANS
from tryplicity.server.conversations import Store
from tryplicity.server.options import Options
from tryplicity.server.security import HEADERS
from tryplicity.server.service import Searcher, Service


def test_what_it_says_of_itself_with_nothing_loaded(started):
    with started() as server:
        said = server.http.get("/api/model").json()
        assert said == {"state": "none", "card": None, "statistics": {}, "kernels": None,
                        "search": {"available": False, "state": "none", "name": None, "passages": None, "examples": [],
                                   "checked": CHECKED_MEANS},
                        "limits": {"max_tokens": 2048, "body_bytes": 1 << 20}}
        assert server.http.get("/health").json() == {"status": "ok"}
        assert server.http.get("/v1/models").json() == {"object": "list", "data": []}


def test_what_clients_rely_on_stays_as_it_is():
    """Numbers that answers are measured by; who changes one of them tells those who use the server."""
    options = Options()
    assert (options.host, options.port, options.loopback) == ("127.0.0.1", 5000, True)
    assert (options.max_tokens, options.choices, options.messages, options.active) == (2048, 128, 2000, 256)
    assert (options.body_bytes, options.import_bytes, options.schema_bytes) == (1 << 20, 64 << 20, 64 << 10)
    assert (options.heartbeat, options.body_seconds, options.stall_seconds, options.grace_seconds) == (10, 30, 60, 30)
    assert options.backlog == 1024


class Held:
    """A retriever that waits until it is let go on, and counts."""

    name = "held"

    def __init__(self):
        self.go_on, self.inside, self.most, self.asked = threading.Event(), 0, 0, []
        self._lock = threading.Lock()

    def search(self, question, limit):
        with self._lock:
            self.inside += 1
            self.most = max(self.most, self.inside)
            self.asked.append((question, limit))
        self.go_on.wait(30)
        with self._lock:
            self.inside -= 1
        return [Passage(f"p{n}", "Title", "url", "Text.", 1.0) for n in range(60)][:limit]


@pytest.fixture
def held(started):
    retriever = Held()
    with started(searcher=Searcher(retriever, "held")) as server:
        server.retriever = retriever
        yield server
        retriever.go_on.set()


def test_four_searches_at_once_and_thirty_two_waiting(held):
    answers = []
    threads = together(36, lambda n: answers.append(httpx.get(f"{held.url}/api/search?q={n}", timeout=60).status_code))
    held.until(lambda: held.service.search_gate.taken == 36 and held.retriever.inside == 4)
    refused = held.http.get("/api/search?q=more")
    assert refused.status_code == 429 and refused.json()["error"]["code"] == "rate_limit_exceeded"
    held.retriever.go_on.set()
    for thread in threads:
        thread.join()
    assert answers == [200] * 36 and held.retriever.most == 4 and len(held.retriever.asked) == 36
    assert held.http.get("/api/search?q=more").status_code == 200


@pytest.mark.parametrize("given, found", [("", 5), ("&limit=1", 1), ("&limit=50", 50), ("&limit=51", 50),
                                          ("&limit=999999", 50)])
def test_how_many_passages_come(held, given, found):
    held.retriever.go_on.set()
    assert len(held.http.get(f"/api/search?q=x{given}").json()["results"]) == found
    assert held.retriever.asked == [("x", found)]


@pytest.mark.parametrize("length, status", [(2000, 200), (2001, 422)])
def test_how_long_a_question_may_be(held, length, status):
    held.retriever.go_on.set()
    assert held.http.get("/api/search", params={"q": "x" * length}).status_code == status
    assert held.http.get("/api/conversations", params={"q": "x" * length}).status_code == status


@pytest.mark.parametrize("mean, slots, waiting, seconds", [
    (1.0, 4, 0, 1), (2.5, 1, 0, 3), (2.5, 1, 3, 10), (2.5, 4, 3, 3), (9.0, 2, 1, 9), (0.1, 8, 0, 1), (59.5, 1, 0, 60),
    (60.5, 1, 0, 60), (1.0, None, None, 1)])
def test_when_a_slot_is_likely_to_be_free(mean, slots, waiting, seconds):
    """As many turns of the mean as there are before it, divided by the slots; from 1 s to a minute."""
    async def ask():
        service = Service(Options(), Store(None))
        assert service.retry_after() == 1
        service.gate.mean_seconds = mean
        service.engine = SimpleNamespace(statistics=lambda: {"slots": slots, "waiting": waiting})
        said = service.retry_after()
        service.store.close()
        return said

    assert asyncio.run(ask()) == seconds


def test_waiting_for_the_last_request():
    async def wait():
        service = Service(Options(), Store(None))
        assert await service.until_idle(0.01) is True
        service.entered()
        service.entered()
        assert service.under_way == 2
        service.left()
        assert await service.until_idle(0.01) is False
        service.left()
        assert service.under_way == 0 and await service.until_idle(0.01) is True
        service.entered()
        asyncio.get_running_loop().call_later(0.05, service.left)
        begun = time.monotonic()
        await service.drain()
        assert service.draining and time.monotonic() - begun < 10
        assert await service.in_thread(lambda a, b: a + b, 2, 3) == 5
        service.close()

    asyncio.run(wait())


def test_the_end_waits_until_those_that_were_cut_off_have_told_their_clients():
    async def end():
        service, closed = Service(Options(grace_seconds=0.01), Store(None)), []
        service.engine = SimpleNamespace(close=lambda **_: closed.append(True))
        service.entered()
        asyncio.get_running_loop().call_later(0.3, service.left)
        await service.drain()
        assert closed == [True] and service.under_way == 0
        service.close()

    asyncio.run(end())


def test_what_outlasts_the_grace_is_told_before_the_connection_ends(started, chat_run):
    with started(chat_run, grace_seconds=0.05, slots=1) as server, \
            server.http.stream("POST", "/v1/completions", json={**LONG, "n": 8}) as answer:
        lines = (line for line in answer.iter_lines() if line.startswith("data: "))
        next(lines)
        server.loop.call_soon_threadsafe(server._stop.set)
        *_, last = lines
        assert json.loads(last[6:])["error"]["code"] == "shutting_down"


PLUGIN = """
from tryplicity import hookimpl

@hookimpl
def tryplicity_server_routes(app):
    from sanic.response import text

    async def after(request, response):
        if request.path == "/fails":
            raise ValueError("of mine")
        if request.path == "/replaced":
            return text("another", status=202)

    async def mine(request):
        return text("mine")

    app.on_response(after)
    for path in ("fails", "replaced"):
        app.add_route(mine, f"/{path}", methods=["GET"], name=path)
"""


@pytest.fixture
def with_middleware(started, tmp_path):
    (tmp_path / "with_middleware.py").write_text(PLUGIN)
    with started(plugins=load_plugins([str(tmp_path / "with_middleware.py")])) as server:
        yield server


def test_every_answer_is_counted_by_what_the_client_got(with_middleware):
    """Also where a plugin's middleware fails, or gives another answer."""
    server = with_middleware
    before = metrics_of(server)
    paths = ("/fails", "/replaced", "/health", "/health", "/none", "/v1/models")
    sent = [server.http.get(path).status_code for path in paths] + [server.http.put("/health").status_code]
    assert sent == [200, 202, 200, 200, 404, 200, 405]
    after = metrics_of(server)
    change = {key: value - before.get(key, 0) for key, value in after.items() if "requests_total" in key}
    label = 'tryplicity_requests_total{{method="{}",route="{}",status="{}"}}'
    assert {key: number for key, number in change.items() if number} == {
        label.format("GET", "fails", 200): 1, label.format("GET", "replaced", 202): 1,
        label.format("GET", "health", 200): 2, label.format("GET", "none", 404): 1,
        label.format("GET", "v1/models", 200): 1, label.format("PUT", "none", 405): 1,
        label.format("GET", "metrics", 200): 1}
    assert after["tryplicity_requests_under_way"] == 1      # this one
    assert after["tryplicity_request_seconds_count"] - before["tryplicity_request_seconds_count"] == 8


@pytest.mark.parametrize("path", ["/fails", "/replaced"])
def test_a_plugins_middleware_cannot_lose_what_keeps_a_browser_in(with_middleware, path):
    headers = with_middleware.http.get(path).headers
    assert {name: headers.get(name) for name in HEADERS} == HEADERS and headers["cache-control"] == "no-store"


def test_who_has_gone_is_counted_as_gone(started, chat_run):
    with started(chat_run, slots=1) as server:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/completions", json={**LONG, "stream": False, "n": 4}, timeout=0.3)
        server.free()
        server.until(lambda: server.service.under_way == 0)
        assert metrics_of(server)['tryplicity_requests_total{method="POST",route="v1/completions",status="499"}'] == 1


SLEEPY = """
import time
from dataclasses import dataclass
from tryplicity import Retriever, hookimpl

class Sleepy(Retriever):
    '''Takes an hour to load.'''
    name = "sleepy"

    @dataclass(frozen=True)
    class Config:
        hours: float = 1.0
        '''to wait'''

    def __init__(self, config):
        time.sleep(3600 * config.hours)

    def search(self, question, limit):
        return []

@hookimpl
def tryplicity_components():
    return [Sleepy]
"""


@pytest.mark.slow
def test_what_still_loads_does_not_hold_up_the_end(process, chat_run, tmp_path):
    (tmp_path / "sleepy.py").write_text(SLEEPY)
    server = process(what=chat_run, search="sleepy", plugins=[str(tmp_path / "sleepy.py")]).ready()
    assert server.http.get("/api/model").json()["search"]["state"] == "loading"
    assert server.http.get("/api/search?q=x").json()["error"]["code"] == "search_loading"
    server.signal()
    code, said = server.end(20)
    assert code == 0 and "Traceback" not in said


HALF_LOADED = """
import asyncio, time
from tryplicity import UserError
from tryplicity.server.app import bind, create_app, run
from tryplicity.server.conversations import Store
from tryplicity.server.options import Options
from tryplicity.server.service import Service

def fails():
    raise UserError("there is none of this name")

async def main():
    options = Options(port=0)
    service = Service(options, Store(None), lambda: time.sleep(3600), fails)
    await run(create_app(service), bind(options))

asyncio.run(main())
"""


def test_a_fault_in_loading_ends_the_process_though_all_else_still_loads():
    ran = subprocess.run([sys.executable, "-c", HALF_LOADED], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 1 and ran.stderr.endswith("UserError: there is none of this name\n")
