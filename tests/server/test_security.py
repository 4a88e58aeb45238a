"""Who gets in, and what a browser is told."""

import pytest

from tryplicity import UserError
from tryplicity.server.options import Options
from tryplicity.server.page import folder

KEY = "sesame-語"
BEARER = {"Authorization": b"Bearer " + KEY.encode()}


@pytest.fixture(scope="module")
def plugins(tmp_path_factory):
    from tryplicity import load_plugins

    file = tmp_path_factory.mktemp("plugin") / "more_routes.py"
    file.write_text("from tryplicity import hookimpl\n\n@hookimpl\ndef tryplicity_server_routes(app):\n"
                    "    from sanic.response import text\n\n"
                    "    async def mine(request):\n        return text('mine')\n\n"
                    "    app.add_route(mine, '/mine/page', methods=['GET', 'OPTIONS'])\n")
    return load_plugins([str(file)])


@pytest.fixture(scope="module")
def guarded(started, plugins):
    with started(api_key=KEY, plugins=plugins, cors=("https://friend.example",)) as server:
        yield server


def test_every_route_but_the_open_ones_needs_the_key(guarded):
    """Whatever routes there are, those of plugins among them."""
    open_ones, closed = set(), set()
    for route in guarded.app.router.routes:
        path = "/" + route.path.replace("<id:str>", "x").replace("<id:path>", "x").replace("<path:path>", "x.js")
        for method in route.methods:
            status = guarded.http.request(method, path).status_code
            (closed if status == 401 else open_ones).add(path)
    assert open_ones == {"/", "/static/x.js", "/health"}
    assert {"/metrics", "/mine/page", "/v1/models", "/api/conversations/x/ask", "/api/search"} <= closed


@pytest.mark.parametrize("headers, status", [
    (BEARER, 200), ({}, 401), ({"Authorization": "Bearer sesame"}, 401), ({"Authorization": "Bearer"}, 401),
    ({"Authorization": f"Basic {KEY}".encode()}, 401), ({"Authorization": b"bearer " + KEY.encode()}, 200),
    ({"Authorization": b"Bearer \xff\xfe"}, 401), ({"X-Api-Key": KEY.encode()}, 401)])
def test_the_key(guarded, headers, status):
    answer = guarded.http.get("/mine/page", headers=headers)
    assert answer.status_code == status
    if status == 401:
        assert answer.json()["error"]["code"] == "invalid_api_key" and answer.headers["www-authenticate"] == "Bearer"
        assert KEY not in answer.text


def test_addresses_that_are_not_there_ask_for_the_key_first(guarded):
    assert guarded.http.get("/v1/nothing").status_code == 401
    assert guarded.http.get("/v1/nothing", headers=BEARER).status_code == 404
    assert guarded.http.put("/v1/models", headers=BEARER).status_code == 405
    assert guarded.http.options("/mine/page").status_code == 401


def test_the_right_error_for_the_clients(guarded):
    import openai

    with pytest.raises(openai.AuthenticationError) as caught:
        guarded.openai(api_key="wrong").models.list()
    assert caught.value.code == "invalid_api_key"


@pytest.mark.parametrize("host, status", [
    ("localhost", 200), ("LOCALHOST:5000", 200), ("127.0.0.1:1", 200), ("[::1]:5000", 200), ("192.168.1.7", 200),
    ("me.localhost", 200), ("evil.example", 403), ("127.0.0.1.evil.example", 403), ("localhost.evil.example", 403),
    ("localhost@evil.example", 403), ("", 403), ("[", 403), ("evil.example:127.0.0.1", 403), ("0x7f.1.evil", 403),
    ("evil.example@localhost", 403),
    ("localhost/evil.example", 403), ("localhost#.evil.example", 403), ("2130706433", 403), ("localhost\u200b", 403),
    ("localhost\r\nHost: evil.example", 403), ("evil.example\r\nX-Forwarded-Host: localhost", 403)])
def test_a_name_that_is_not_ours_gets_no_answer(server, raw, host, status):
    """DNS rebinding: the page of evil.example has its name point here."""
    for path in ("/api/conversations", "/"):
        answer = raw(server, f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        assert answer.status == status and (status == 200 or b"host_not_allowed" in answer.body)


def test_a_request_without_a_host_gets_no_answer(server, raw):
    assert raw(server, b"GET /api/conversations HTTP/1.1\r\n\r\n").status == 403


def test_a_name_can_be_added(started):
    with started(hosts=("Chat.example",)) as server:
        for name, status in (("chat.example", 200), ("chat.example:443", 200), ("other.example", 403)):
            assert server.http.get("/api/model", headers={"Host": name}).status_code == status


@pytest.mark.parametrize("headers, status", [
    ({}, 200), ({"Origin": "{url}"}, 200), ({"Origin": "https://evil.example"}, 403), ({"Origin": "null"}, 403),
    ({"Origin": "http://localhost"}, 403), ({"Origin": "http://127.0.0.1:1"}, 403), ({"Origin": ""}, 403),
    ({"Sec-Fetch-Site": "cross-site"}, 403), ({"Sec-Fetch-Site": "same-site"}, 403),
    ({"Sec-Fetch-Site": "same-origin"}, 200), ({"Sec-Fetch-Site": "none"}, 200)])
def test_pages_from_elsewhere_get_no_answer(server, headers, status):
    headers = {name: value.replace("{url}", server.url) for name, value in headers.items()}
    assert server.http.get("/api/conversations", headers=headers).status_code == status
    assert server.http.post("/api/conversations", json={}, headers=headers).status_code == {200: 201}.get(status, 403)


def test_two_origins_are_both_looked_at(server, raw):
    for first, second in (("https://evil.example", server.url), (server.url, "https://evil.example")):
        answer = raw(server, f"GET /api/conversations HTTP/1.1\r\nHost: {server.url[7:]}\r\nOrigin: {first}\r\n"
                             f"Origin: {second}\r\n\r\n".encode())
        assert answer.status == 403 and b"origin_not_allowed" in answer.body


def test_a_link_from_elsewhere_opens_the_page(server):
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert server.http.get("/", headers=link).status_code == 200


def test_named_origins_may_ask_and_no_others(guarded):
    friend = {"Origin": "https://friend.example"}
    asked = {**friend, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    preflight = guarded.http.options("/v1/chat/completions", headers=asked)
    assert preflight.status_code == 204
    assert preflight.headers["access-control-allow-origin"] == "https://friend.example"
    assert "Authorization" in preflight.headers["access-control-allow-headers"]
    answer = guarded.http.get("/api/model", headers={**friend, **BEARER})
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "https://friend.example"
    assert answer.headers["vary"] == "Origin" and "access-control-allow-credentials" not in answer.headers
    assert guarded.http.get("/api/model", headers=friend).status_code == 401
    other = guarded.http.options("/v1/chat/completions", headers={**asked, "Origin": "https://friend.example.evil"})
    assert other.status_code == 403 and "access-control-allow-origin" not in other.headers


def test_no_cors_unless_named(server):
    answer = server.http.get("/api/model")
    assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize("path, headers", [("/", {}), ("/nothing", {}), ("/api/model", {}), ("/v1/models", {}),
                                           ("/api/model", {"Origin": "https://evil.example"}),
                                           ("/static/none.js", {})])
def test_every_answer_keeps_a_browser_in(server, path, headers):
    answer = server.http.get(path, headers=headers)
    policy = dict(part.strip().partition(" ")[::2] for part in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'" and policy["script-src"] == "'self'" and policy["base-uri"] == "'none'"
    assert policy["frame-ancestors"] == "'none'" and "unsafe" not in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["cache-control"] in ("no-store", "no-cache") and "server" not in answer.headers


def test_a_stream_has_them_too(server):
    body = {"model": "talker", "prompt": "a", "stream": True}
    with server.http.stream("POST", "/v1/completions", json=body) as answer:
        assert "content-security-policy" in answer.headers and answer.headers["cache-control"] == "no-store"
        answer.read()


# --- the page's files ---

def test_the_page_and_its_files(server):
    index = server.http.get("/")
    assert index.headers["content-type"] == "text/html; charset=utf-8" and "<html" in index.text
    for file in folder().iterdir():
        answer = server.http.get(f"/static/{file.name}")
        if file.suffix == ".py" or file.is_dir():
            assert answer.status_code == 404
            continue
        assert answer.content == file.read_bytes()
        kind = {".js": "text/javascript", ".css": "text/css", ".woff2": "font/woff2", ".svg": "image/svg+xml",
                ".html": "text/html", ".txt": "text/plain"}[file.suffix]
        assert answer.headers["content-type"].startswith(kind)
        again = server.http.get(f"/static/{file.name}", headers={"If-None-Match": f'"x", {answer.headers["etag"]}'})
        assert again.status_code == 304 and not again.content and again.headers["etag"] == answer.headers["etag"]
        head = server.http.head(f"/static/{file.name}")
        assert head.headers["content-length"] == str(len(answer.content)) and not head.content


@pytest.mark.parametrize("path", [
    "../setup.cfg", "%2e%2e/setup.cfg", "..%2fsetup.cfg", "%2e%2e%2fsetup.cfg", "....//setup.cfg", "/etc/passwd",
    "%2fetc%2fpasswd", "..\\setup.cfg", "%00", "a%00.js", "__init__.py", ".", "", "x" * 3000 + ".js",
    "../static/../setup.cfg", "../../home/user/README.md", "link.txt", "%ff.js"])
def test_nothing_outside_of_the_folder_is_given_out(started, raw, tmp_path, path):
    (tmp_path / "static").mkdir()
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "static" / "link.txt").symlink_to(tmp_path / "secret.txt")

    from tryplicity.server import page
    from tryplicity.server.errors import ApiError

    with pytest.raises(ApiError, match="no such file"):
        page.answer(None, tmp_path / "static", path)


@pytest.mark.parametrize("path", ["../setup.cfg", "%2e%2e/setup.cfg", "%2e%2e%2fsetup.cfg", "..%2f..%2fsetup.cfg",
                                  "/etc/passwd", "%2fetc%2fpasswd", "__init__.py", "a%00.js"])
def test_nor_through_the_server(server, raw, path):
    answer = raw(server, f"GET /static/{path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    assert answer.status in (400, 404) and b"metadata" not in answer.body and b"root:" not in answer.body


# --- where it may listen ---

@pytest.mark.parametrize("options, told", [
    ({"host": "0.0.0.0"}, "--allow-public"), ({"host": "::"}, "--allow-public"), ({"host": "192.168.1.7"}, "--api-key"),
    ({"host": "example.org"}, "--api-key"), ({"api_key": "  "}, "empty"),
    ({"api_key": "\u200b"}, "cannot be seen"), ({"api_key": "key\n"}, "cannot be seen"),
    ({"api_key": " key"}, "cannot be seen"), ({"cors": ("*",)}, "--cors"),
    ({"cors": ("example.org",)}, "--cors"), ({"cors": ("https://example.org/path",)}, "--cors")])
def test_careless_options_are_refused(options, told):
    with pytest.raises(UserError, match=told):
        Options(**options)


@pytest.mark.parametrize("options", [
    {"host": "0.0.0.0", "api_key": "k"}, {"host": "0.0.0.0", "allow_public": True}, {"host": "127.0.0.5"},
    {"host": "::1"}, {"host": "[::1]"}, {"host": "localhost"}, {"cors": ("http://localhost:3000",)}])
def test_careful_ones_are_taken(options):
    Options(**options)
