"""The page in headless Chromium, on a real server in a process of its own, with a small model that was really trained
and an index of a few real passages. Nothing but the server can be reached: any other request fails the test."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync"]
SERVE = """
import json, sys
from tryplicity import load_plugins
from tryplicity.server.app import serve
what, options = json.loads(sys.argv[1])
serve(what, plugins=load_plugins(), say=lambda line: print(line, flush=True), **options)
"""
PWN = "<img src=x onerror=\"window.pwned=1\"><script>window.pwned=1;alert(1)</script>"
DOCUMENTS = {
    "join": ("library/os.path", "os.path.join joins one or more path segments intelligently. The return value is the "
             "concatenation of all segments, with exactly one directory separator following each part."),
    "groupby": ("library/itertools", "itertools.groupby makes an iterator that returns consecutive keys and groups "
                "from the iterable. Sort the data by the same key function first."),
    "finally": ("reference/compound", "If finally is present, it specifies a cleanup handler. The finally clause is "
                "executed on the way out whether an exception occurred or not."),
    "readline": ("tutorial/files", "For reading lines from a file, loop over the file object. This is memory "
                 "efficient, fast, and leads to simple code."),
    "hostile": (f"notes/{PWN}.md", f"The zebra protocol is described here. {PWN} It closes the zebra handshake."),
}
FILLER = "The function returns the value that was given to it, and the value is a list of the lines of the file."


def find_browser() -> str:
    for name in BROWSERS:
        if path := shutil.which(name):
            return path
    pytest.fail(f"the page's tests need a browser: none of {', '.join(BROWSERS)} is on the PATH "
                "(Debian: apt-get install chromium)")


@dataclass
class Server:
    """`tryplicity serve` in a process of its own."""

    what: str | None
    options: dict
    process: subprocess.Popen | None = None
    url: str = ""
    key: str | None = None

    def start(self) -> "Server":
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen([sys.executable, "-c", SERVE, json.dumps([self.what, self.options])],
                                        stdout=subprocess.PIPE, text=True, env=environment)
        self.url = self.process.stdout.readline().strip()
        assert self.url, f"the server did not start: exit {self.process.wait()}"
        return self

    def wait_until_ready(self) -> "Server":
        for _ in range(600):
            model = self.call("GET", "/api/model")
            if model["state"] != "loading" and (model["search"]["available"] or self.options["search"] == "none"):
                return self
            time.sleep(0.1)
        raise AssertionError("the model was not loaded within a minute")

    def call(self, method: str, path: str, body=None):
        headers = {"Content-Type": "application/json"}
        if self.options.get("api_key"):
            headers["Authorization"] = f"Bearer {self.options['api_key']}"
        request = urllib.request.Request(self.url + path, None if body is None else json.dumps(body).encode(), headers,
                                         method=method)
        with urllib.request.urlopen(request, timeout=30) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def stop(self, how=signal.SIGTERM) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(how)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.process.stdout.close()

    def conversation(self, messages, title="Imported") -> str:
        """A conversation that someone had elsewhere; its id here."""
        before = {each["id"] for each in self.call("GET", "/api/conversations")["conversations"]}
        self.call("POST", "/api/conversations/import",
                  {"format": 1, "conversations": [{"title": title, "messages": messages}]})
        after = {each["id"] for each in self.call("GET", "/api/conversations")["conversations"]}
        [new] = after - before
        return new


def until(page, condition: str, seconds: float = 20) -> None:
    """Wait for a JavaScript expression to hold. (The browser's own way to wait evaluates text in the page, which its
    policy forbids.)"""
    end = time.monotonic() + seconds
    while not page.evaluate(condition):
        assert time.monotonic() < end, f"not within {seconds:g} s: {condition}"
        page.wait_for_timeout(20)


def free_port() -> int:
    with contextlib.closing(socket.socket()) as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@pytest.fixture(scope="session")
def chat_run(registry, prepared, cache, tmp_path_factory) -> Path:
    """A small chat model, trained for a few steps on answers of some length: what it says has no sense, and no end."""
    from tryplicity import load_plugins
    from tryplicity.builder import build
    from tryplicity.data import parse_source, prepare_conversations
    from tryplicity.run import Run
    from tryplicity.training.loop import Budget, train

    folder = tmp_path_factory.mktemp("browser")
    chats = folder / "chats.jsonl"
    rows = [{"question": f"What is {i}?", "answer": FILLER * 12} for i in range(60)]
    chats.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = prepare_conversations(parse_source(registry, str(chats)), prepared.tokenizer_path, 300, cache)
    spec = Path(__file__).parent.parent / "small.yaml"
    built = build(str(spec), "cpu", registry, [
        "hardware.batch=1", "linear=bitlinear", "heads=[]", "context_length=2048", "training.validate_every=1000",
        "phases=[{kind: pretrain, share: 0.5}, {kind: chat, share: 0.5}]"])
    run = Run(folder / "run")
    run.create(spec=built.spec.as_yaml(), hardware="", build={}, data={}, tokenizer=prepared.tokenizer_path.read_text())
    train(built, prepared, run, Budget(steps=12), load_plugins(), phase_data={1: data})
    return run.folder


@pytest.fixture(scope="session")
def index(tmp_path_factory) -> Path:
    from tryplicity.components import Document
    from tryplicity.search import build_index

    documents = [Document(id, f"{title}\n\n{text}", "text", title) for id, (title, text) in DOCUMENTS.items()]
    return build_index(documents, tmp_path_factory.mktemp("index") / "passages.index")


@pytest.fixture(scope="session")
def make_server(chat_run, index, tmp_path_factory):
    """`make_server(model=False, api_key=...)`: started, ready, and stopped at the end."""
    started = []

    def make(*, model=True, wait=True, **options):
        database = tmp_path_factory.mktemp("server") / "conversations.sqlite"
        options = {"search": f"{{type: passages, index: '{index}'}}", "conversations": str(database),
                   "port": free_port(), **options}
        server = Server(str(chat_run) if model else None, options).start()
        started.append(server)
        return server.wait_until_ready() if wait else server

    yield make
    for server in started:
        server.stop()


@pytest.fixture(scope="session")
def server(make_server):
    """The one that most tests share."""
    return make_server()


@pytest.fixture(scope="session")
def bare(make_server):
    """A server without a model."""
    return make_server(model=False)


@pytest.fixture(scope="session")
def browser():
    from playwright.sync_api import sync_playwright

    path = find_browser()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


@dataclass
class Seen:
    """What a page did that it must not do."""

    elsewhere: list = field(default_factory=list)
    errors: list = field(default_factory=list)
    dialogs: list = field(default_factory=list)


@pytest.fixture
def open_page(browser):
    """`open_page(server, path, width, height, settings={...}, **context options)` -> page. At the end: nothing was
    asked of anyone but the server, nothing was refused by its policy, no script failed, no dialog came."""
    seen, contexts = Seen(), []

    def open_page(server, path="/", width=1280, height=800, settings=None, ready=True, **options):
        options.setdefault("color_scheme", "dark")
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        context.set_default_timeout(20_000)

        def only_the_server(route):
            if route.request.url.startswith(server.url.rstrip("/") + "/"):
                route.continue_()
            else:
                seen.elsewhere.append(route.request.url)
                route.abort()

        context.route("**/*", only_the_server)
        if settings:
            context.add_init_script(
                f"localStorage.getItem('tryplicity.settings') ?? "
                f"localStorage.setItem('tryplicity.settings', {json.dumps(json.dumps(settings))})")
        page = context.new_page()
        page.on("pageerror", lambda error: seen.errors.append(str(error)))
        page.on("console", lambda message: seen.errors.append(message.text) if message.type == "error"
                and "Failed to load resource" not in message.text else None)

        def on_dialog(dialog):
            seen.dialogs.append(dialog.message)
            dialog.dismiss()

        page.on("dialog", on_dialog)
        page.goto(server.url + path)
        page.wait_for_selector("html[data-ready]", state="attached")
        if ready:
            page.wait_for_selector("#model .dot:not([data-state=unknown])")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert seen == Seen()
