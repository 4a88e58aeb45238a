"""The retriever `searxng` against a real little server that speaks as SearXNG does."""

import json
import threading
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tryplicity import UserError

RESULTS = [
    {"url": "https://docs.python.org/3/library/os.path.html", "title": "os.path  - paths", "score": 4.0,
     "content": "This module implements some useful functions\non pathnames.", "engine": "duckduckgo"},
    {"url": "javascript:alert(1)", "title": "bad", "content": "bad", "score": 3},
    {"url": "file:///etc/passwd", "title": "bad", "content": "bad", "score": 3},
    {"url": "https://docs.python.org/3/library/os.path.html", "title": "again", "content": "again"},
    {"url": "https://example.org/a", "title": "", "content": "No title <b>here</b>."},
    {"url": "https://example.org/b", "title": "No content", "content": None},
    {"url": "https://example.org/c", "title": "", "content": ""},
    {"url": 7, "title": [], "content": {}}, "no result", None,
    {"url": "http://[broken", "title": "x", "content": "y"},
]


@pytest.fixture
def instance():
    """`instance(status, body)` sets what is answered; `.asked` is what was asked."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            path, _, query = self.path.partition("?")
            server.asked.append((path, dict(urllib.parse.parse_qsl(query))))
            if server.wait:
                time.sleep(server.wait)
            try:
                self.send_response(server.status)
                self.end_headers()
                self.wfile.write(server.body)
            except OSError:
                pass    # the client has gone

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.asked, server.wait = [], 0
    server.status, server.body = 200, json.dumps({"query": "q", "number_of_results": 0, "results": RESULTS,
                                                  "answers": [], "suggestions": []}).encode()
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def make(registry, instance):
    return lambda **options: registry.part("retriever", {"type": "searxng", "url": instance.url, **options}).build()


def test_results_become_passages(instance, make):
    passages = make().search("How do I\njoin two paths & more?", 10)
    assert instance.asked == [("/search", {"q": "How do I join two paths & more?", "format": "json"})]
    assert [(p.title, p.url, p.text) for p in passages] == [
        ("os.path - paths", "https://docs.python.org/3/library/os.path.html",
         "This module implements some useful functions on pathnames."),
        ("example.org", "https://example.org/a", "No title <b>here</b>."),
        ("No content", "https://example.org/b", "No content")]
    assert passages[0].score == 4.0 and len({p.id for p in passages}) == 3
    assert make().search("q", 10) == passages and make().search("q", 1) == passages[:1]


def test_options_and_nothing_to_ask(instance, make):
    make(language="de").search("x" * 5000, 5)
    assert instance.asked[0][1] == {"q": "x" * 500, "format": "json", "language": "de"}
    assert make().search(" \n", 5) == [] and make().search("x", 0) == [] and len(instance.asked) == 1


@pytest.mark.parametrize("status, body, message", [
    (403, b"Forbidden", r"refuses JSON \(403\); in its settings.yml, under search, set formats: \[html, json\]"),
    (404, b"", "no /search"), (429, b"", "limits how often"), (500, b"", "answered 500"),
    (200, b"<html>", "no JSON"), (200, b"\xff\xfe", "no JSON"), (200, b"[1]", "not that of SearXNG"),
    (200, b"[" * 100_000, "no JSON"), (200, b" " * 4_000_001, "longer than 4 MB"),
])
def test_what_goes_wrong_is_one_clear_line(instance, make, status, body, message):
    instance.status, instance.body = status, body
    with pytest.raises(UserError, match=message) as told:
        make().search("q", 5)
    assert instance.url in str(told.value) and "\n" not in str(told.value)


@pytest.mark.parametrize("body", [b"{}", b'{"results": null}', b'{"results": 5}', b'{"results": []}'])
def test_no_results(instance, make, body):
    instance.body = body
    assert make().search("q", 5) == []


def test_one_that_is_slow_or_not_there(instance, make, registry):
    instance.wait = 1.5
    with pytest.raises(UserError, match=r"no answer within 0.2 s"):
        make(timeout=0.2).search("q", 5)
    gone = registry.part("retriever", {"type": "searxng", "url": "http://127.0.0.1:9"}).build()
    with pytest.raises(UserError, match="cannot be reached"):
        gone.search("q", 5)


@pytest.mark.parametrize("url", ["localhost:8888", "file:///etc/passwd", "https://", "http://a b", "http://x/?q=1"])
def test_the_address_must_be_one(registry, url):
    with pytest.raises(UserError, match="url"):
        registry.part("retriever", {"type": "searxng", "url": url})
