"""What every route shares: the model and the search as they come up, the conversations, limits, counts."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from tryplicity.errors import UserError
from tryplicity.search.citations import CHECKED_MEANS
from tryplicity.server import errors
from tryplicity.server.conversations import Store
from tryplicity.server.limits import Gate
from tryplicity.server.metrics import Metrics
from tryplicity.server.options import Options

if TYPE_CHECKING:
    from tryplicity.components import Passage
    from tryplicity.inference.engine import Engine

log = logging.getLogger("tryplicity.server")
T = TypeVar("T")
State = Literal["ready", "loading", "none"]


@dataclass(frozen=True)
class Searcher:
    """A retriever, what it is called, and how many passages it has where that is known."""

    retriever: Any
    name: str
    passages: int | None = None
    examples: tuple[str, ...] = ()      # questions that it can answer, for the page to offer


class SearchUnavailable(UserError):
    """The retriever is known and cannot be made ready; the server goes on without it."""


def why_no_kernels() -> str | None:
    from tryplicity import kernels  # loads torch

    return kernels.why_not()


class Service:
    """The server's state. `load_engine` and `load_searcher` run in a background thread, after the socket is open."""

    def __init__(self, options: Options, store: Store, load_engine: Callable[[], Engine] | None = None,
                 load_searcher: Callable[[], Searcher] | None = None) -> None:
        self.options, self.store = options, store
        self.metrics = Metrics()
        self.gate = Gate(options.active)
        self.search_gate = Gate(options.searches + options.waiting_searches)
        self.engine: Engine | None = None
        self.kernels: str | None = None         # why the model has no compiled kernels
        self.searcher: Searcher | None = None
        self.state: State = "loading" if load_engine else "none"
        self.draining = False
        self.started = time.time()
        self.idle = asyncio.Event()     # no request is under way
        self.idle.set()
        self.under_way = 0
        self.fault: BaseException | None = None
        self.searcher_is_loading = load_searcher is not None
        self.no_search = "start the server with --search"
        self.writing: dict[str, tuple[asyncio.Lock, int]] = {}  # conversations being answered; with those who wait
        self._load_engine, self._load_searcher = load_engine, load_searcher
        self._loading: list[threading.Thread] = []
        self._searches = ThreadPoolExecutor(options.searches, thread_name_prefix="search")
        self._work = ThreadPoolExecutor(4, thread_name_prefix="work")

    # --- the model and the search ---

    def start_loading(self, failed: Callable[[], None]) -> None:
        """Load what there is to load. `failed` is called on the event loop when it cannot be; `fault` says why."""
        loop = asyncio.get_running_loop()

        def load_engine() -> None:
            start = time.monotonic()
            self.engine = self._load_engine()
            self.kernels = why_no_kernels()
            self.state = "ready"
            if self.kernels is not None:
                log.warning("%s", self.kernels)
            log.info("model %s is ready after %.1f s", self.engine.card.id, time.monotonic() - start)

        def load_searcher() -> None:
            start = time.monotonic()
            try:
                self.searcher = self._load_searcher()
            except SearchUnavailable as error:
                self.no_search = str(error)
                log.warning("there is no search: %s", error)
                return
            finally:
                self.searcher_is_loading = False
            log.info("search %s is ready after %.1f s", self.searcher.name, time.monotonic() - start)

        def guarded(load: Callable[[], None]) -> None:
            try:
                load()
            except BaseException as error:  # the thread's end is not the server's: the main thread raises it
                self.fault = error
                with contextlib.suppress(RuntimeError):     # the loop may have ended meanwhile
                    loop.call_soon_threadsafe(failed)

        self._loading = [threading.Thread(target=guarded, args=(load,), name="loading", daemon=True) for load, wanted in
                         ((load_engine, self._load_engine), (load_searcher, self._load_searcher)) if wanted is not None]
        for thread in self._loading:
            thread.start()

    @property
    def loading(self) -> bool:
        """Whether something is still being loaded."""
        return any(thread.is_alive() for thread in self._loading)

    def ready_engine(self) -> Engine:
        """Raises ApiError 503 while there is none."""
        if self.state == "loading":
            raise errors.loading()
        if self.engine is None:
            raise errors.no_model()
        return self.engine

    def retry_after(self) -> int:
        """Seconds until a slot is likely to be free, from how long the latest requests took."""
        statistics = self.engine.statistics() if self.engine else {}
        slots = max(1, int(statistics.get("slots") or 1))
        waiting = int(statistics.get("waiting") or 0)
        return max(1, min(60, math.ceil(self.gate.mean_seconds * (waiting + 1) / slots)))

    def describe(self) -> dict[str, Any]:
        """GET /api/model."""
        engine, searcher = self.engine, self.searcher
        seeking = "ready" if searcher else "loading" if self.searcher_is_loading else "none"
        return {"state": self.state, "card": asdict(engine.card) if engine else None,
                "statistics": engine.statistics() if engine else {}, "kernels": self.kernels,
                "search": {"available": searcher is not None, "state": seeking,
                           "name": searcher.name if searcher else None,
                           "passages": searcher and getattr(searcher.retriever, "passages", searcher.passages),
                           "examples": list(searcher.examples) if searcher else [], "checked": CHECKED_MEANS},
                "limits": {"max_tokens": self.options.max_tokens, "body_bytes": self.options.body_bytes}}

    async def search(self, question: str, limit: int) -> tuple[list[Passage], float]:
        """Passages, and the seconds it took. Raises ApiError 503 without a search, 429 with too many waiting."""
        searcher = self.searcher
        if searcher is None and self.searcher_is_loading:
            raise errors.ApiError(503, "the search is still being loaded", code="search_loading",
                                  headers={"Retry-After": "2"})
        if searcher is None:
            raise errors.ApiError(503, f"there is no search: {self.no_search}", code="no_search",
                                  headers={"x-should-retry": "false"})
        with self.search_gate.enter():
            start = time.monotonic()
            try:
                found = await asyncio.get_running_loop().run_in_executor(
                    self._searches, searcher.retriever.search, question, limit)
            except UserError as error:
                raise errors.ApiError(503, f"search: {error}", code="search_failed") from None
            seconds = time.monotonic() - start
            self.metrics.search_seconds.observe(seconds)
            return list(found), seconds

    # --- work off the event loop ---

    async def in_thread(self, function: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._work, function, *args)

    def stored(self, function: Callable[..., T], *args: Any) -> Awaitable[T]:
        """A call of the store, awaited."""
        return asyncio.wrap_future(self.store.call(function, *args))

    # --- the end ---

    def entered(self) -> None:
        self.under_way += 1
        self.idle.clear()

    def left(self) -> None:
        self.under_way -= 1
        if not self.under_way:
            self.idle.set()

    async def drain(self) -> None:
        """Refuse what is new and let what runs end, for the time of grace."""
        self.draining = True
        if await self.until_idle(self.options.grace_seconds):
            return
        log.warning("cutting off %d requests", self.under_way)
        if self.engine is not None:
            await asyncio.get_running_loop().run_in_executor(None, self.engine.close)   # tells every listener
            await self.until_idle(2)

    async def until_idle(self, seconds: float) -> bool:
        """Whether no request was under way at some moment of so many seconds."""
        try:
            async with asyncio.timeout(seconds):
                await self.idle.wait()
        except TimeoutError:
            return False
        return True

    def close(self) -> None:
        """Blocks until the engine's thread has ended and the conversations are on disk."""
        if self.engine is not None:
            self.engine.close(drain=False)
        self._searches.shutdown(wait=False, cancel_futures=True)
        self._work.shutdown(wait=False, cancel_futures=True)
        self.store.close()
