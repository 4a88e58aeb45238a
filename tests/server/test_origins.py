"""Whose pages may ask: the server's own, also behind a proxy that gives requests another Host."""

from types import SimpleNamespace

import multidict
import pytest

from tryplicity.errors import UserError
from tryplicity.server.errors import ApiError
from tryplicity.server.options import Options
from tryplicity.server.security import Guard


def verdict(options=None, path="/api/model", **headers):
    """None, or the message of the refusal."""
    named = _Headers({name.replace("_", "-"): value for name, value in headers.items()})
    request = SimpleNamespace(path=path, method="POST", headers=named)
    try:
        Guard(options or Options()).check(request)
    except ApiError as refusal:
        return str(refusal)


class _Headers(multidict.CIMultiDict):
    def getall(self, name, default=()):
        return super().getall(name, default)


@pytest.mark.parametrize("path", ["/", "/static/app.js", "/health"])
def test_open_files_are_given_to_any_origin(path):
    assert verdict(path=path, host="127.0.0.1:5000", origin="http://chat.example.org") is None


def test_the_page_behind_a_plain_proxy_is_the_servers_own():
    behind = dict(host="127.0.0.1:5000", origin="https://chat.example.org")
    assert verdict(**behind, sec_fetch_site="same-origin") is None      # the browser says so
    for site in ({}, {"sec_fetch_site": "cross-site"}, {"sec_fetch_site": "same-site"}):
        assert "--name chat.example.org" in verdict(**behind, **site)
    named = Options(hosts=("chat.example.org",))
    assert verdict(named, **behind) is None and verdict(named, **behind | {"origin": "http://chat.example.org"}) is None
    for foreign in ("https://chat.example.org.evil.net", "https://chat.example.org:8080", "https://evil.net", "null",
                    "file://chat.example.org"):
        assert verdict(named, **behind | {"origin": foreign}) is not None


def test_a_name_pointed_at_this_machine_is_refused_whatever_the_browser_says():
    assert verdict(host="evil.example:5000", origin="http://evil.example:5000", sec_fetch_site="same-origin")


@pytest.mark.parametrize("origin", ["app://obsidian.md", "chrome-extension://abcdefghijklmnop", "tauri://localhost",
                                    "https://example.org", "http://[::1]:3000", "moz-extension://0a1b-2c"])
def test_any_origin_can_be_named(origin):
    assert verdict(Options(cors=(origin,)), host="127.0.0.1:5000", origin=origin) is None
    assert verdict(host="127.0.0.1:5000", origin=origin) is not None


@pytest.mark.parametrize("origin, word", [("null", "sandboxed"), ("*", "scheme"), ("example.org", "scheme"),
                                          ("https://example.org/path", "scheme"), ("https://", "scheme")])
def test_what_is_no_origin_is_refused(origin, word):
    with pytest.raises(UserError, match=word):
        Options(cors=(origin,))
