"""A small real model behind a real server, on a free port."""

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
import torch

ROOT = Path(__file__).parents[2]
SERVE = """
import json, sys
from tryplicity import load_plugins
from tryplicity.server.app import serve
options = json.loads(sys.argv[1])
try:
    serve(options.pop("what", None), plugins=load_plugins(options.pop("plugins", ())),
          say=lambda url: print(url, flush=True), **options)
except Exception as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


def make_run(folder, registry, prepared, *settings, seed=0):
    """A run folder whose weights were never trained: what it writes is noise, and differs from prompt to prompt."""
    from safetensors.torch import save_file

    from tryplicity.builder import build
    from tryplicity.model import assemble, initialise
    from tryplicity.run import Run

    built = build(str(ROOT / "tests" / "small.yaml"), "cpu", registry, ["heads=[]", "context_length=512", *settings])
    model = initialise(assemble(built.spec), "cpu", seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    run = Run(folder)
    run.create(spec=built.spec.as_yaml(), hardware="", build={}, data={}, tokenizer=prepared.tokenizer_path.read_text())
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, run.weights)
    return folder


@pytest.fixture(scope="session")
def chat_run(registry, prepared, tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "chat", registry, prepared, "name=talker",
                    "phases=[{kind: pretrain, share: 0.5}, {kind: chat, share: 0.5}]")


@pytest.fixture(scope="session")
def base_run(registry, prepared, tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "base", registry, prepared, "name=writer")


class Running:
    """A server in a thread of this process."""

    def __init__(self, service, url, stop, thread, loop):
        self.service, self.url, self._stop, self._thread, self.loop = service, url, stop, thread, loop
        self.http = httpx.Client(base_url=url, timeout=60)

    def stop(self):
        self.http.close()
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(60)
        assert not self._thread.is_alive()

    def openai(self, **options):
        import openai

        options = {"api_key": self.service.options.api_key or "none", "max_retries": 0, **options}
        return openai.OpenAI(base_url=f"{self.url}/v1", **options)

    def until(self, condition, seconds=20):
        """Wait until it holds."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "it never came true"
            time.sleep(0.01)

    def free(self):
        """Wait until no slot is taken; the engine's statistics then."""
        self.until(lambda: not (s := self.service.engine.statistics())["running"] and not s["waiting"])
        return self.service.engine.statistics()

    def ask(self, conversation, **body):
        """The events of an answer."""
        with self.http.stream("POST", f"/api/conversations/{conversation}/ask", json=body) as response:
            if response.status_code != 200:
                response.read()
                raise AssertionError(f"{response.status_code} {response.text}")
            return list(events(response))

    def new(self, **body):
        return self.http.post("/api/conversations", json=body).json()["id"]


def events(response):
    """The data of server-sent events as they come."""
    for line in response.iter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line[6:])


def start_server(run=None, *, searcher=None, search=None, conversations=None, plugins=None, slots=4, engine=None,
                 **options):
    """A running server, ready. run: a run folder; None: no model. search: as `--search` says it."""
    from tryplicity import load_plugins
    from tryplicity.server import app as server
    from tryplicity.server.conversations import Store
    from tryplicity.server.options import Options
    from tryplicity.server.service import Service

    if search is not None:
        load_searcher = server.searcher_loader(search, load_plugins())
    else:
        load_searcher = searcher and (lambda: searcher)
    chosen = Options(**{"port": 0, "grace_seconds": 5.0, **options})
    sock = server.bind(chosen)
    url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    started, box = threading.Event(), {}

    def load():
        from tryplicity.inference.engine import Engine

        return Engine.load(run, load_plugins().registry, slots=slots, **(engine or {}))

    async def main():
        service = Service(chosen, Store(conversations), load if run else None, load_searcher)
        box.update(service=service, stop=asyncio.Event(), loop=asyncio.get_running_loop())
        app = server.create_app(service, plugins)
        box["app"] = app
        await server.run(app, sock, signals=False, ready=started.set, stop=box["stop"])

    def target():
        try:
            asyncio.run(main())
        except BaseException as error:
            box["error"] = error
            started.set()

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    assert started.wait(60)
    if "error" in box:
        raise box["error"]
    running = Running(box["service"], url, box["stop"], thread, box["loop"])
    running.app = box["app"]
    running.until(lambda: box["service"].state != "loading" and (not searcher or box["service"].searcher), 60)
    return running


@pytest.fixture(scope="session")
def started():
    """`with started(run, slots=2, api_key="k") as server:`"""

    @contextlib.contextmanager
    def start(*arguments, **options):
        server = start_server(*arguments, **options)
        try:
            yield server
        finally:
            server.stop()

    return start


@pytest.fixture(scope="session")
def server(started, chat_run):
    """One server for every test that changes nothing of it."""
    with started(chat_run) as running:
        yield running


class Process:
    """A server in a process of its own."""

    def __init__(self, **options):
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVE, json.dumps({"port": 0, "search": "none", "conversations": "none", **options},
                                                     default=str)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"})
        self.url = self.process.stdout.readline().strip().replace("localhost", "127.0.0.1")
        self.errors = []
        self._reader = threading.Thread(target=lambda: self.errors.extend(self.process.stderr), daemon=True)
        self._reader.start()
        self.http = httpx.Client(base_url=self.url or "http://none", timeout=60)

    def ready(self, seconds=60):
        deadline = time.monotonic() + seconds
        while self.http.get("/health").status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return self

    def signal(self, number=signal.SIGTERM):
        self.process.send_signal(number)

    def end(self, seconds=30):
        """(exit code, what it said)"""
        code = self.process.wait(seconds)
        self._reader.join(5)
        return code, "".join(self.errors)


@pytest.fixture
def process():
    """`process(what=run, ...)`: options as those of `serve`."""
    running = []

    def start(**options):
        running.append(Process(**options))
        return running[-1]

    yield start
    for each in running:
        each.http.close()
        if each.process.poll() is None:
            each.process.kill()
            each.process.wait()


@dataclasses.dataclass(frozen=True)
class Raw:
    """What a server answered to bytes."""

    status: int
    headers: dict
    body: bytes


@pytest.fixture(scope="session")
def raw():
    """`raw(server, b"GET / HTTP/1.1...")`: for requests that no client library would send."""

    def ask(server, data, timeout=10):
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout) as connection:
            connection.sendall(data)
            with connection.makefile("rb") as file:
                status = int(file.readline().split()[1])
                headers = {}
                while line := file.readline().strip():
                    name, _, value = line.decode().partition(":")
                    headers[name.lower()] = value.strip()
                return Raw(status, headers, file.read(int(headers.get("content-length", 0))))

    return ask
