"""What goes over the wire, beside what it says: HEAD, and HTTP/1.0, which knows no chunks."""

import json
import socket

import pytest

TEXT = {"model": "talker", "prompt": "the model", "max_tokens": 6, "temperature": 0}


def exchange(server, method, path, body=b"", version="1.1", more=""):
    """(status, headers, all that came after them until the connection's end), without a library between."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 20) as connection:
        connection.sendall(f"{method} {path} HTTP/{version}\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
                           f"{more}\r\n".encode() + body)
        with connection.makefile("rb") as file:
            head, _, rest = file.read().partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    return int(first.split()[1]), dict(line.lower().split(": ", 1) for line in lines), rest


@pytest.fixture(scope="module")
def with_plugin(started, chat_run, tmp_path_factory):
    from tryplicity import load_plugins

    file = tmp_path_factory.mktemp("plugin") / "page_of_mine.py"
    file.write_text("from tryplicity import hookimpl\n\n@hookimpl\ndef tryplicity_server_routes(app):\n"
                    "    from sanic.response import text\n\n"
                    "    async def mine(request):\n        return text('mine', headers={'X-Mine': 'yes'})\n\n"
                    "    app.add_route(mine, '/mine/page', methods=['GET'])\n")
    with started(chat_run, plugins=load_plugins([str(file)])) as server:
        yield server


def test_head_is_get_without_the_body_everywhere(with_plugin):
    """On every route there is, those of plugins among them."""
    server, seen = with_plugin, 0
    id = server.new(title="t")
    for route in server.app.router.routes:
        if "GET" not in route.methods:
            continue
        path = "/" + route.path.replace("<id:str>", id).replace("<id:path>", "talker").replace("<path:path>", "app.js")
        path += "?q=x" if path.startswith("/api/search") else ""
        get, head = server.http.get(path), server.http.head(path)
        assert (head.status_code, head.content) == (get.status_code, b""), path
        assert set(get.headers) == set(head.headers), path
        if path != "/metrics":      # which has changed meanwhile
            assert {**get.headers, "content-length": ""} == {**head.headers, "content-length": ""}, path
            assert head.headers.get("content-length") == str(len(get.content)), path
        seen += get.status_code == 200
    assert seen >= 11
    assert server.http.head("/v1/completions").status_code == 405 and server.http.head("/none").status_code == 404


def test_a_body_never_follows_head(server):
    """Also not on a connection that goes on."""
    status, headers, rest = exchange(server, "HEAD", "/v1/models", more="Connection: close\r\n")
    assert status == 200 and int(headers["content-length"]) > 50 and rest == b""


def test_http_1_0_gets_streams_without_chunks(server):
    """As proxies ask that know no better; the end of the connection is the end of the stream."""
    body = json.dumps({**TEXT, "stream": True}).encode()
    whole = server.http.post("/v1/completions", json=TEXT).json()["choices"][0]["text"]
    for more in ("", "Connection: keep-alive\r\n"):
        status, headers, rest = exchange(server, "POST", "/v1/completions", body, "1.0", more)
        assert status == 200 and headers["connection"] == "close"
        assert "transfer-encoding" not in headers and "content-length" not in headers
        events = [part for part in rest.decode().split("\n\n") if part]
        assert events[0] == ": ping" and events[-1] == "data: [DONE]"
        assert all(event.startswith("data: ") for event in events[1:])
        assert "".join(json.loads(e[6:])["choices"][0]["text"] for e in events[1:-1]) == whole
    status, headers, rest = exchange(server, "POST", "/v1/completions", body, "1.1", "Connection: close\r\n")
    assert headers["transfer-encoding"] == "chunked" and rest.endswith(b"\r\n0\r\n\r\n")


@pytest.mark.parametrize("method, path, body, status", [
    ("GET", "/v1/models", b"", 200), ("GET", "/", b"", 200), ("GET", "/none", b"", 404),
    ("POST", "/v1/completions", json.dumps(TEXT).encode(), 200), ("POST", "/v1/completions", b"{", 400),
    ("HEAD", "/v1/models", b"", 200)])
def test_http_1_0_gets_whole_answers_with_their_length(server, method, path, body, status):
    found, headers, rest = exchange(server, method, path, body, "1.0")
    assert found == status and "transfer-encoding" not in headers and headers["connection"] == "close"
    assert int(headers["content-length"]) == len(rest) or (method == "HEAD" and rest == b"")
