"""Who may ask: the key, the Host and Origin of a request, and the headers that keep a browser in.

Everything but the page, its files and /health needs the key, routes of plugins included: a request is refused unless
its path is in the short list of open ones. Without a key, a page from elsewhere must still not reach the server
through a visitor's browser: its Origin is refused, and a Host that is a foreign name is refused too, because a name
can be pointed at 127.0.0.1 after the page was loaded (DNS rebinding; Jackson et al., CCS 2007,
https://crypto.stanford.edu/dns/). An IP address as Host cannot.

Behind a proxy the Host is often the server's own address and the Origin the name that the browser sees. Such a request
is the page's own where the browser says so (Sec-Fetch-Site, which no script can set, https://www.w3.org/TR/fetch-metadata/;
browsers send it over https and to localhost), or where the name was given with --name. The open files hold no secret
and are given to any origin: a browser asks for module scripts with an Origin of its own.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
import socket
from typing import TYPE_CHECKING

from tryplicity.server.errors import ApiError

if TYPE_CHECKING:
    from sanic import Request

    from tryplicity.server.options import Options

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
                               "connect-src 'self'; font-src 'self'; base-uri 'none'; form-action 'none'; "
                               "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


#: a name or an address, and a port; nothing that another reader of the header could take for one
_HOST = re.compile(r"([\w.-]+|\[[0-9a-f:.]+\])(?::[0-9]*)?", re.ASCII)


_WEB_ORIGIN = re.compile(r"https?://([a-z0-9.-]+)(?::(?:80|443))?", re.ASCII)     # of a site, not of a port beside it


class Guard:
    """Checks every request before it is handled."""

    def __init__(self, options: Options) -> None:
        self.key = options.api_key.encode() if options.api_key else None
        self.cors = frozenset(origin.lower() for origin in options.cors)
        own = socket.gethostname().lower()
        self.given_names = frozenset(name.lower() for name in options.hosts)
        self.names = {"localhost", own, own.partition(".")[0], f"{own.partition('.')[0]}.local",
                      options.host.lower(), *(name.lower() for name in options.hosts)}

    def check(self, request: Request) -> None:
        """Raises ApiError for a request that may not be answered."""
        host = self._host(request)
        self._check_origin(request, host)
        if not is_open(request.path) and not self.is_preflight(request):
            self._check_key(request)

    def is_preflight(self, request: Request) -> bool:
        """Whether a browser asks, without the key, if a page of a welcome origin may ask."""
        return (request.method == "OPTIONS" and "access-control-request-method" in request.headers
                and self.allowed_origin(request) is not None)

    def allowed_origin(self, request: Request) -> str | None:
        """The foreign origin of a request that was named as welcome."""
        origin = request.headers.get("origin", "").lower()
        return origin if origin in self.cors else None

    def _host(self, request: Request) -> str:
        hosts = request.headers.getall("host", ())
        host = hosts[0].lower() if len(hosts) == 1 else ""
        match = _HOST.fullmatch(host)
        name = match[1].strip("[]") if match else ""
        if name not in self.names and not name.endswith(".localhost") and not _is_address(name):
            raise ApiError(403, "this server does not answer under the name in the Host header; start it with "
                                "--name NAME if the name is yours", code="host_not_allowed")
        return host

    def _check_origin(self, request: Request, host: str) -> None:
        if is_open(request.path):
            return
        origins = request.headers.getall("origin", ())
        if not origins:
            # no Origin comes with a plain GET from a foreign page (an image, a script, a link): browsers say so here
            foreign = request.headers.get("sec-fetch-site") in ("cross-site", "same-site")
            if foreign:
                raise ApiError(403, "a page of another site may not ask this server", code="origin_not_allowed")
            return
        own = {*self.cors, f"http://{host}", f"https://{host}"}
        if all(origin.lower() in own or self._is_named(origin) for origin in origins):
            return
        if len(origins) == 1 and request.headers.get("sec-fetch-site") == "same-origin":
            return      # a proxy gave the request another Host
        name = _WEB_ORIGIN.fullmatch(origins[0].lower())
        proxy = f", or with --name {name[1]} if a proxy serves this page there" if name and not _is_address(name[1]) \
            else ""
        raise ApiError(403, f"a page of another origin may not ask this server; name it with --cors if it is yours"
                            f"{proxy}", code="origin_not_allowed")

    def _is_named(self, origin: str) -> bool:
        """Whether it is a page under a name that this server was given with --name, on the usual ports."""
        match = _WEB_ORIGIN.fullmatch(origin.lower())
        return match is not None and match[1] in self.given_names

    def _check_key(self, request: Request) -> None:
        if self.key is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        given = given.strip().encode("utf-8", "surrogateescape")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given, self.key):
            message = "the API key is wrong" if given else "an API key is needed: send Authorization: Bearer KEY"
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def is_open(path: str) -> bool:
    """Whether a path is answered without the key."""
    return path in ("/", "/health") or path.startswith("/static/")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
