"""What is too much: bodies, values, clients that send or read slowly. Each is told, and costs nobody else anything."""

import json
import socket
import threading
import time

import pytest

#: nothing ends it early, and the tokens are many
LONG = {"model": "talker", "prompt": "the model", "max_tokens": 480, "stream": True,
        "logit_bias": {str(special): -100 for special in range(10)}}
ASK = {"model": "talker", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}


def post(length, body=b"", more=b"", path=b"/v1/chat/completions"):
    return b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n%b\r\n%b" % (path, length, more, body)


def error_of(answer):
    value = json.loads(answer.body)["error"]
    assert set(value) == {"message", "type", "param", "code"} and value["message"]
    return value


@pytest.fixture(scope="module")
def small(started, chat_run):
    with started(chat_run, body_bytes=5000, body_seconds=0.5, heartbeat=0.05, import_bytes=20_000,
                 schema_bytes=300) as server:
        yield server


def test_a_body_as_large_as_allowed_and_one_byte_larger(small):
    body = json.dumps({**ASK, "user": ""}).encode()
    exact = json.dumps({**ASK, "user": "x" * (5000 - len(body))}).encode()
    assert len(exact) == 5000
    assert small.http.post("/v1/chat/completions", content=exact).status_code == 200
    answer = small.http.post("/v1/chat/completions", content=exact + b" ")
    assert answer.status_code == 413 and answer.json()["error"]["code"] == "body_too_large"


@pytest.mark.parametrize("size", [6_000, 400_000, 6_000_000])
def test_who_sends_far_too_much_still_reads_why(small, size):
    for content in (b"x" * size, (b"x" * 1000 for _ in range(size // 1000))):     # with a length, and in chunks
        answer = small.http.post("/v1/chat/completions", content=content)
        assert answer.status_code == 413 and answer.json()["error"]["code"] == "body_too_large"
    assert small.http.post("/v1/chat/completions", json=ASK).status_code == 200


def test_a_length_beyond_all_bounds_is_not_waited_for(small, raw):
    start = time.monotonic()
    answer = raw(small, post(10**12, b"{"))
    assert answer.status in (408, 413) and time.monotonic() - start < 5


def test_a_client_that_waits_for_100_continue_is_answered_at_once(small, raw):
    answer = raw(small, post(10**9, more=b"Expect: 100-continue\r\n"))
    assert answer.status == 413 and error_of(answer)["code"] == "body_too_large"


def test_imports_may_be_larger(small):
    conversation = {"title": "t", "messages": [{"role": "user", "content": "x" * 8000}]}
    body = {"conversations": [conversation]}
    assert small.http.post("/api/conversations/import", json=body).status_code == 200
    assert small.http.post("/api/conversations", json={"title": "x" * 8000}).status_code == 413
    body["conversations"] *= 3
    assert small.http.post("/api/conversations/import", json=body).status_code == 413


def test_a_body_that_does_not_come(small, raw):
    answer = raw(small, post(100, b'{"model"'))
    assert answer.status == 408 and error_of(answer)["code"] == "timeout"


@pytest.mark.parametrize("body", [
    b"", b"{", b"[]", b"null", b"1", b'"x"', b"\xff\xfe", b'{"a": NaN}', b'{"a": Infinity}', b"[" * 4900,
    b'{"a":' * 700 + b"1" + b"}" * 700, b'{"model": "\\ud800"}', b'{"\\udfff": 1}',
    b"\xef\xbb\xbf{}", '{"model": "a"}'.encode("utf-16"), b'{"a": ' + b"9" * 4900 + b"}", b"{'a': 1}", b"{} {}"])
def test_what_is_no_json_object(small, body):
    answer = small.http.post("/v1/chat/completions", content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] in ("invalid_json", "missing_parameter", "unknown_parameter")


@pytest.mark.parametrize("request_, status", [
    (b"nonsense\r\n\r\n", 400), (b"GET / HTTP/9\r\nHost: localhost\r\n\r\n", 400),
    (b"GET /\xc3\xbc HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    (b"GET /health\x00 HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: a\r\n b\r\n\r\n", 400),
    (b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"X: a\r\n" * 5000 + b"\r\n", 413),
    (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n"
     b"0\r\n\r\nGET /health HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    (b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n", 405), (b"TRACE / HTTP/1.1\r\nHost: localhost\r\n\r\n", 405),
    (b"OPTIONS /api/model HTTP/1.1\r\nHost: localhost\r\n\r\n", 405),
    (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 20000 + b"\r\n\r\n", 413),
    (b"GET /" + b"a" * 20000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 413),
    (post(-5), 400), (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n"
                      b"Content-Length: 3\r\n\r\n{}", 400),
    (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
    (b"BREW /coffee HTTP/1.1\r\nHost: localhost\r\n\r\n", 404)])
def test_what_is_no_http(small, raw, request_, status):
    answer = raw(small, request_)
    assert answer.status == status
    error_of(answer)
    assert b"Traceback" not in answer.body and "default-src 'none'" in answer.headers["content-security-policy"]


def test_schemas_are_limited(small):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"description": "y" * 400}}}
    answer = small.http.post("/v1/chat/completions", json={**ASK, "response_format": form})
    assert answer.status_code == 422 and answer.json()["error"]["param"] == "response_format"


def test_hostile_schemas_are_refused_or_followed(server):
    """And do not take the process along."""
    deep = {"type": "object"}
    for _ in range(200):
        deep = {"type": "object", "properties": {"a": deep}, "required": ["a"]}
    for schema in (deep, {"type": "string", "pattern": "(a{1,1000}){1,1000}"}, {"type": "string", "pattern": "("},
                   {"$ref": "#"}, {"$ref": "http://127.0.0.1:1/x"}, {"enum": []}, {"allOf": [{}] * 500},
                   {"type": "array", "minItems": 10**9}, {"type": "string", "minLength": 10**12}, {"type": 5}):
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        answer = server.http.post("/v1/chat/completions", json={**ASK, "response_format": form})
        assert answer.status_code in (200, 400), (schema, answer.text)
    assert server.http.post("/v1/chat/completions", json=ASK).status_code == 200


def test_too_many_requests_at_once(started, chat_run):
    with started(chat_run, active=1) as server:
        with server.http.stream("POST", "/v1/completions", json=LONG) as response:
            lines = response.iter_lines()     # kept: its end would close the stream
            next(lines)
            answer = server.http.post("/v1/chat/completions", json=ASK)
            assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
            assert answer.json()["error"]["type"] == "rate_limit_error"
            assert server.http.get("/api/model").status_code == 200        # the page still comes
        server.free()
        server.until(lambda: server.http.post("/v1/chat/completions", json=ASK).status_code == 200)


def test_a_quiet_stream_says_that_it_lives(started, chat_run):
    """The first byte comes at once, though every slot is taken, and then a comment now and then."""
    with (started(chat_run, slots=1, heartbeat=0.05) as server,
          server.http.stream("POST", "/v1/completions", json=LONG) as first):
        kept = first.iter_lines()      # its end would close the stream
        next(kept)
        start = time.monotonic()
        with server.http.stream("POST", "/v1/chat/completions", json={**ASK, "stream": True}) as second:
            lines = second.iter_lines()
            assert next(lines) == ": ping" and time.monotonic() - start < 2
            assert ": ping" in [next(lines) for _ in range(8)]


def slow_reader(server, **body):
    """A connection that asks for much and reads nothing."""
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    connection.connect((host, int(port)))
    content = json.dumps({**LONG, "logprobs": 5, **body})
    connection.sendall(post(len(content), content.encode(), path=b"/v1/completions"))
    server.until(lambda: server.service.engine.statistics()["running"])
    return connection


def test_who_does_not_read_is_cut_off(started, chat_run):
    with started(chat_run, stall_seconds=0.3, slots=4) as server:
        connection = slow_reader(server, n=16)
        written = server.free()["tokens_total"]
        server.until(lambda: server.service.under_way == 0)
        assert 0 < written < 16 * 480      # long before all was written
        connection.close()
        assert server.http.post("/v1/chat/completions", json=ASK).status_code == 200


def test_who_falls_behind_does_not_fill_memory(started, chat_run):
    with started(chat_run, backlog=8, slots=4) as server:
        connection = slow_reader(server, n=16)
        written = server.free()["tokens_total"]
        assert 0 < written < 16 * 480
        connection.close()
        server.until(lambda: server.service.under_way == 0)


def test_half_a_request_holds_up_nobody(small):
    host, port = small.url.removeprefix("http://").split(":")
    idle = [socket.create_connection((host, int(port))) for _ in range(50)]
    for connection in idle:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: loc")
    assert small.http.post("/v1/chat/completions", json=ASK).status_code == 200
    for connection in idle:
        connection.close()


def metrics_of(server):
    """Every sample of /metrics, as Prometheus's own reader finds it."""
    from prometheus_client.parser import text_string_to_metric_families

    answer = server.http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=") and answer.text.endswith("\n")
    samples = {}
    for family in text_string_to_metric_families(answer.text):
        assert family.documentation
        for sample in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))
            key = f"{sample.name}{{{labels}}}" if labels else sample.name
            assert key not in samples
            samples[key] = sample.value
    return samples


def test_metrics_count_what_was_done(small):
    before = metrics_of(small)
    small.http.post("/v1/chat/completions", json={**ASK, "n": 2, "temperature": 0})
    small.http.post("/v1/chat/completions", content=b"{")
    after = metrics_of(small)
    change = {key: value - before.get(key, 0) for key, value in after.items()}
    route = 'tryplicity_requests_total{method="POST",route="v1/chat/completions",status="%d"}'
    assert change[route % 200] == 1 and change[route % 400] == 1
    assert change["tryplicity_completion_tokens_total"] == 6
    assert change['tryplicity_generations_total{reason="length"}'] == 2
    assert change["tryplicity_first_token_seconds_count"] == 2
    assert after["tryplicity_engine_slots"] == 4 and after["tryplicity_engine_running"] == 0
    for name in ("request_seconds", "first_token_seconds"):
        buckets = [v for k, v in after.items() if k.startswith(f"tryplicity_{name}_bucket")]
        assert buckets == sorted(buckets) and buckets[-1] == after[f"tryplicity_{name}_count"]


def test_metrics_as_openmetrics_where_they_are_asked_for_so(small):
    from prometheus_client.openmetrics.parser import text_string_to_metric_families

    answer = small.http.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    assert "tryplicity_requests" in {family.name for family in text_string_to_metric_families(answer.text)}


class Slow:
    """A retriever that takes its time, or waits to be let go on."""

    name = "slow"

    def __init__(self):
        self.seconds, self.go_on, self.held = 0.0, threading.Event(), False

    def search(self, question, limit):
        from tryplicity.components import Passage

        if self.held:
            self.go_on.wait(30)
        else:
            time.sleep(self.seconds)
        return [Passage("p", "Title", "url", "A list is a sequence.", 1.0)]


@pytest.fixture
def slow(started, chat_run):
    from tryplicity.server.service import Searcher

    retriever = Slow()
    with started(chat_run, searcher=Searcher(retriever, "slow", 1), slots=1, engine={"max_waiting": 0}, searches=12,
                 waiting_searches=0) as server:
        server.retriever = retriever
        yield server
        retriever.go_on.set()


def together(number, function):
    threads = [threading.Thread(target=function, args=(n,)) for n in range(number)]
    for thread in threads:
        thread.start()
    return threads


def test_the_times_of_a_histogram_are_those_that_were_told(slow):
    """The server tells each search's seconds to who asked; the buckets must count those, borders included."""
    told = []
    for seconds in (0, 0, 0, 0.03, 0.07, 0.15, 0.3, 0.6):
        slow.retriever.seconds = seconds
        told.append(slow.http.get("/api/search", params={"q": "x"}).json()["seconds"])
    found = {key: value for key, value in metrics_of(slow).items() if key.startswith("tryplicity_search_seconds_")}
    assert found.pop("tryplicity_search_seconds_count") == len(told)
    assert found.pop("tryplicity_search_seconds_sum") == pytest.approx(sum(told))
    borders = {float(key.split('"')[1]): value for key, value in found.items()}
    assert borders == {border: sum(seconds <= border for seconds in told) for border in borders}
    assert min(borders) <= 0.01 and max(b for b in borders if b != float("inf")) >= 60 and float("inf") in borders
    assert len(set(borders.values())) >= 4      # fine enough to tell these apart


def test_retry_after_is_how_long_such_requests_take(slow):
    """A second while nothing is known; after a dozen of 2.6 s each, those seconds: both for searches and for the
    engine's queue, where one that waits counts as well."""
    def retry_after(path, **body):
        answer = slow.http.post(path, json=body) if body else slow.http.get(path)
        assert answer.status_code == 429, answer.text
        assert f"try again in {answer.headers['retry-after']} s" in answer.json()["error"]["message"]
        return int(answer.headers["retry-after"])

    def busy():
        """What both queues say when they are full."""
        slow.retriever.held = True
        slow.retriever.go_on.clear()
        waiting = together(12, lambda _: slow.http.get("/api/search?q=x"))
        slow.until(lambda: slow.service.search_gate.taken == 12)
        with slow.http.stream("POST", "/v1/completions", json=LONG) as response:
            kept = response.iter_lines()
            next(kept)
            slow.until(lambda: slow.service.engine.statistics()["running"] == 1)
            said = retry_after("/api/search?q=x"), retry_after("/v1/chat/completions", **ASK)
        slow.retriever.go_on.set()
        for thread in waiting:
            thread.join()
        slow.retriever.held = False
        slow.free()
        return said

    assert busy()[0] == 1
    slow.service.search_gate.mean_seconds = slow.service.gate.mean_seconds = 1.0    # as if nothing had been asked yet
    slow.retriever.seconds = 2.6
    ids = [slow.new() for _ in range(12)]
    body = {"content": "What?", "search": True, "sampling": {"max_tokens": 1}}
    for thread in together(12, lambda n: slow.http.post(f"/api/conversations/{ids[n]}/ask", json=body)):
        thread.join()
    searching, writing = busy()
    assert 2 <= searching <= 4 and 2 <= writing <= 4


def test_metrics_have_no_labels_that_clients_choose(small):
    for path in ("/a", "/b", "/api/conversations/x1", "/api/conversations/x2"):
        small.http.get(path)
    small.http.request("MOO", "/x")
    samples = metrics_of(small)
    assert not [key for key in samples if "x1" in key or '"a"' in key or "MOO" in key]
