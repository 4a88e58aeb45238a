"""The Sanic application, and the process around it: `serve` opens the socket, loads, answers, drains, ends."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sanic import HTTPResponse, Request, Sanic
from sanic.application.state import ApplicationServerInfo
from sanic.config import Config
from sanic.exceptions import MethodNotAllowed, SanicException
from sanic.handlers import ErrorHandler
from sanic.headers import format_http1_response
from sanic.helpers import has_message_body
from sanic.http import Http, Stage
from sanic.http.constants import HTTP
from sanic.response import json
from sanic.router import Router
from sanic.server.protocols.http_protocol import HttpProtocol
from sanic.server.protocols.websocket_protocol import WebSocketProtocol

from tryplicity.errors import UserError
from tryplicity.run import Run
from tryplicity.server import api, ask, errors, openai, page, responses, routing, security, tokens
from tryplicity.server.conversations import Store
from tryplicity.server.limits import read_body, read_json
from tryplicity.server.options import Options
from tryplicity.server.service import Searcher, SearchUnavailable, Service
from tryplicity.spec import parse_value

if TYPE_CHECKING:
    from sanic_routing import Route

    from tryplicity.inference.engine import Engine
    from tryplicity.plugins import Plugins
    from tryplicity.registry import Registry

log = logging.getLogger("tryplicity.server")
KEY_VARIABLE = "TRYPLICITY_API_KEY"
METHODS = frozenset({"GET", "HEAD", "POST", "PATCH", "DELETE", "OPTIONS", "PUT"})
_number, _asking = itertools.count(1), threading.Lock()


class AnyRequest(Request):
    """Sanic puts the address of a request that it could not read into the request whose answer says so, where a broken
    one would break that too."""

    def __init__(self, url_bytes: bytes, headers: Any, version: str, method: str, *more: Any, **named: Any) -> None:
        super().__init__(b"*" if method == "NONE" else url_bytes, headers, version, method, *more, **named)


class EitherHttp(Http):
    """Sanic would answer HTTP/1.0 in chunks, which that version does not know: there the end of the connection is the
    end of the answer. And what every answer must have is put into it here: before a plugin's middleware, which may fail
    or give another answer, it could get lost."""

    async def http1_response_header(self, data: bytes, end_stream: bool) -> None:
        response = self.response
        self.request.app.ctx.finish(self.request, response)
        known = end_stream or (not data and response.body) or "content-length" in response.headers
        if known or self.head_only or self.request.version != "1.0" or not has_message_body(response.status):
            return await super().http1_response_header(data, end_stream)
        self.keep_alive = False
        response.headers["connection"] = "close"
        self.stage, self.response_func = Stage.RESPONSE, self._until_the_end
        return await self._send(format_http1_response(response.status, response.processed_headers) + data)

    async def _until_the_end(self, data: bytes, end_stream: bool) -> None:
        if data:
            await self._send(data)
        if end_stream:
            self.response_func, self.stage = None, Stage.IDLE


class HeadRouter(Router):
    """What answers GET answers HEAD too, a plugin's routes included; Sanic leaves out the body."""

    def get(self, path: str, method: str, host: str | None) -> tuple[Route, Any, dict[str, Any]]:
        try:
            return super().get(path, method, host)
        except MethodNotAllowed:
            if method != "HEAD":
                raise
            return super().get(path, "GET", host)


class App(Sanic):
    """Sanic, with every request counted, timed and logged by its path, never by what it says."""

    service: Service

    async def handle_request(self, request: Request) -> None:
        service, start = self.ctx.service, time.monotonic()
        service.entered()
        try:
            await super().handle_request(request)
        finally:
            service.left()
            seconds = time.monotonic() - start
            gone = request.conn_info is not None and request.conn_info.lost
            status = 499 if gone else getattr(request.ctx, "status", 500)
            route = request.route.path if request.route else "none"
            method = request.method if request.method in METHODS else "other"
            service.metrics.requests.labels(route, method, str(status)).inc()
            service.metrics.request_seconds.observe(seconds)
            log.info("%s %s %d %.0f ms", method, shown_path(request), status, 1000 * seconds)


def shown_path(request: Request) -> str:
    """For the log: without the query, which says what was looked for, and on one line."""
    return request.path.encode("unicode_escape").decode()[:200]


class Errors(ErrorHandler):
    """Every error as OpenAI's API writes it; what was not foreseen is told to the log alone."""

    def default(self, request: Request, exception: Exception) -> HTTPResponse:
        error = errors.as_api_error(exception)
        if error.status == 500:
            log.error("%s %s", request.method, shown_path(request), exc_info=exception)
        return json(error.as_dict(), status=error.status, headers=error.headers)

    @staticmethod
    def log(request: Request, exception: Exception) -> None:
        """Not Sanic's own way, which prints what users got wrong with a traceback."""


def create_app(service: Service, plugins: Plugins | None = None, *, page_folder: Path | None = None) -> App:
    """Every route of the server, those of plugins included, behind the same guard."""
    options, number = service.options, next(_number)
    config = Config(env_prefix=None)     # SANIC_... of the environment must not undo a limit
    config.update({
        "ACCESS_LOG": False, "AUTO_EXTEND": False, "MOTD": False, "KEEP_ALIVE_TIMEOUT": 75, "REQUEST_TIMEOUT": 30,
        "RESPONSE_TIMEOUT": 24 * 3600,   # a place in the queue may take long: the limits here are this server's own
        "REQUEST_MAX_SIZE": options.body_bytes, "FALLBACK_ERROR_FORMAT": "json",
        "TOUCHUP": number == 1})     # Sanic rewrites its own classes to be faster, which works once in a process
    app = App(f"tryplicity-{number}", config=config, error_handler=Errors(), request_class=AnyRequest,
              router=HeadRouter(), configure_logging=False)
    app.ctx.service = service
    guard = security.Guard(options)

    async def before(request: Request) -> HTTPResponse | None:
        if request.method == "NONE":    # Sanic's stand-in for a request it could not read
            return None
        guard.check(request)
        if guard.is_preflight(request):
            return HTTPResponse(status=204)
        if service.draining and not security.is_open(request.path):
            raise errors.draining()
        return None

    def finish(request: Request, response: HTTPResponse) -> None:
        request.ctx.status = response.status
        response.headers.update({k: v for k, v in security.HEADERS.items() if k not in response.headers})
        response.headers.setdefault("Cache-Control", "no-store")
        if origin := guard.allowed_origin(request):
            response.headers.update({"Access-Control-Allow-Origin": origin, "Vary": "Origin",
                                     "Access-Control-Allow-Methods": "GET, POST, PATCH, DELETE",
                                     "Access-Control-Allow-Headers": "Authorization, Content-Type",
                                     "Access-Control-Expose-Headers": "Retry-After",
                                     "Cross-Origin-Resource-Policy": "cross-origin"})

    async def read(request: Request, empty: bool = False) -> dict[str, Any]:
        body = await read_body(request, options.body_bytes, options.body_seconds)
        return {} if empty and not body else read_json(body)

    async def health(request: Request) -> HTTPResponse:
        state = "draining" if service.draining else "loading" if service.state == "loading" else "ok"
        return json({"status": state}, status=200 if state == "ok" else 503)

    async def counts(request: Request) -> HTTPResponse:
        gauges = {"requests_under_way": service.under_way, "conversations": service.store.kept}
        if service.engine is not None:
            for name, value in service.engine.statistics().items():
                if isinstance(value, int | float):
                    gauges[f"engine_{name}"] = value
        text, content_type = service.metrics.text(gauges, request.headers.get("accept", ""))
        return HTTPResponse(text, content_type=content_type)

    app.on_request(before)
    app.ctx.finish = finish
    routing.add(app, "GET", "/health", health)
    routing.add(app, "GET", "/metrics", counts)
    page.add_routes(app, page_folder)
    for routes in (openai, responses, tokens, api, ask):
        routes.add_routes(app, service, read)
    if plugins is not None:
        plugins.call("tryplicity_server_routes", app=app)
    return app


async def run(app: App, sock: socket.socket, *, signals: bool = True, ready: Callable[[], None] | None = None,
              stop: asyncio.Event | None = None) -> None:
    """Serve on a bound socket until SIGTERM, Ctrl-C or `stop`; then drain. Raises what kept the model from loading."""
    service: Service = app.ctx.service
    loop, ending = asyncio.get_running_loop(), stop or asyncio.Event()

    def on_signal(number: int) -> None:
        if ending.is_set():
            os._exit(128 + number)      # asked twice; what is in the store is on disk already
        log.info("draining; once more ends at once")
        ending.set()

    usual = WebSocketProtocol if app.websocket_enabled else HttpProtocol    # a plugin may have such a route
    protocol = type("Protocol", (usual,), {"HTTP_CLASS": EitherHttp})
    server = await app.create_server(sock=sock, backlog=1024, protocol=protocol,
                                     asyncio_server_kwargs={"start_serving": False})
    # Sanic's own runner says so too; without it every answer has an empty Alt-Svc header
    app.state.server_info.append(ApplicationServerInfo(settings={"version": HTTP.VERSION_1, "port": None}))
    try:
        await server.startup()
    except SanicException as error:
        raise UserError(f"the routes do not fit together: {error}; a plugin's clash with these") from None
    await server.before_start()
    await server.start_serving()
    await server.after_start()
    if signals:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, on_signal, number)
    service.start_loading(ending.set)
    if ready is not None:
        ready()
    try:
        await ending.wait()
        if service.fault is None:
            await service.drain()
    finally:
        await server.before_stop()
        server.close()
        for connection in list(server.connections):
            connection.close()      # once what was written to it is sent
        deadline = loop.time() + 2
        while server.connections and loop.time() < deadline:
            await asyncio.sleep(0.02)
        for connection in list(server.connections):
            connection.abort()
        await service.until_idle(2)
        await loop.run_in_executor(None, service.close)
        await server.after_stop()
        Sanic.unregister_app(app)
    if service.fault is not None:
        raise service.fault


def bind(options: Options) -> socket.socket:
    """Raises UserError when the address is taken or not this machine's."""
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 18)   # what the system keeps for one slow reader
        sock.bind((options.host.strip("[]"), options.port))
        sock.listen(1024)
    except OSError as error:
        sock.close()
        raise UserError(f"{options.host}:{options.port}: cannot listen there: {error.strerror or error}; choose "
                        "another --port, or stop what uses it") from None
    sock.setblocking(False)
    return sock


def serve(what: str | Path | None = None, *, plugins: Plugins, search: str = "passages", slots: int = 8,
          device: str = "cpu", weights: str | None = None, conversations: str | Path | None = None,
          say: Callable[[str], None] = print, **options: Any) -> None:
    """`tryplicity serve`: blocks until a signal ends it. Raises UserError.

    what: a run folder or an exported file; None: no model, search alone. search: a retriever as `--search` names it,
    or "none". device: what the model runs on, as torch names it. weights: as Engine.load's. conversations: the file
    they are kept in, by default in the run folder, or without one in the user's data folder; "none" keeps them in
    memory. options: those of `Options`; the key is also taken from TRYPLICITY_API_KEY. say: is told the address.
    """
    if options.get("api_key") is None:
        options["api_key"] = os.environ.get(KEY_VARIABLE)   # set and empty is a mistake, and not no key
    chosen = Options(**options)
    if what is not None and not Path(what).exists():
        Run.open(what)      # which says what is wrong, before torch is loaded
    load_engine = engine_loader(what, plugins, slots, device, weights) if what is not None else None
    sock = bind(chosen)
    host, port = sock.getsockname()[:2]
    _log_to_stderr()
    path = None if conversations == "none" else Path(conversations) if conversations else default_conversations(what)
    service = Service(chosen, Store(path), load_engine, searcher_loader(search, plugins) if search != "none" else None)
    app = create_app(service, plugins)
    shown = f"[{host}]" if ":" in host else "localhost" if chosen.loopback else host
    log.info("conversations are kept %s", "in memory, and gone at the end" if path is None else f"in {path}")
    asyncio.run(run(app, sock, ready=lambda: say(f"http://{shown}:{port}")))
    if service.loading:     # in C++ by now, where the interpreter's end would abort it with all of the process
        logging.shutdown()
        sys.stdout.flush()
        os._exit(0)


def engine_loader(what: str | Path, plugins: Plugins, slots: int, device: str,
                  weights: str | None = None) -> Callable[[], Engine]:
    """What loads the weights, all else of the model having been checked. Raises UserError."""
    from tryplicity.inference.packed import open_model

    if device != "cpu":
        from tryplicity.inference.engine import usable_device

        usable_device(device)
    opened = open_model(what, registry_of(plugins))

    def load() -> Engine:
        from tryplicity.inference.engine import Engine

        engine = Engine.load(opened, registry_of(plugins), device, weights=weights, slots=slots)
        if engine.tokenizer is None:
            log.warning("%s came without a tokenizer: only prompts of tokens are answered", engine.card.id)
        return engine

    return load


EXAMPLES = 4    # questions on the page's first screen


def searcher_loader(search: str, plugins: Plugins) -> Callable[[], Searcher]:
    """search: the name of a retriever, or `{type: ..., option: ...}` as YAML."""

    def load() -> Searcher:
        value = parse_value(search, "--search")
        part = registry_of(plugins).part("retriever", value)
        try:
            retriever = part.build()
        except UserError as error:
            raise SearchUnavailable(str(error)) from None
        except Exception as error:  # a plugin's fault must not end the server
            raise SearchUnavailable(f"retriever {part.name}: {type(error).__name__}: {error}") from error
        passages = getattr(retriever, "passages", None)
        return Searcher(retriever, retriever.name, passages if isinstance(passages, int) else None,
                        tuple(retriever.examples(EXAMPLES)))

    return load


def registry_of(plugins: Plugins) -> Registry:
    """The plugins' components, asked for once though two threads load."""
    with _asking:
        return plugins.registry


def default_conversations(what: str | Path | None = None) -> Path:
    """conversations.sqlite in the run folder that is served, if it may be written to; else
    $XDG_DATA_HOME/tryplicity/conversations.sqlite, ~/.local/share by default."""
    if what is not None and Path(what).is_dir() and os.access(what, os.W_OK):
        return Path(what) / "conversations.sqlite"
    home = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(home).expanduser() / "tryplicity" / "conversations.sqlite"


def _log_to_stderr() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
