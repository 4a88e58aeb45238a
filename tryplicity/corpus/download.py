"""Sources to shards on the disk: each to its budget of bytes, several at once, gone on with from where each stood.

    corpus/recipe.yaml                      what is downloaded
    corpus/raw/NAME/part-00000.parquet      shards of a source
    corpus/raw/NAME/state.json              how far it is: what counts; a shard beyond it is written anew
"""

from __future__ import annotations

import concurrent.futures
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tryplicity.corpus import shards
from tryplicity.corpus.recipe import Portion, Recipe
from tryplicity.errors import Unreachable, UserError
from tryplicity.files import locked, write_text
from tryplicity.leftout import LeftOut
from tryplicity.progress import Progress
from tryplicity.spec import dump_yaml, parse_yaml

if TYPE_CHECKING:
    from tryplicity.components import Document

AT_ONCE = 4  # sources
AFTERWARDS = {"vocab_size", "train"}  # keys of a recipe that say what becomes of a corpus
WAITS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0, 60.0)  # seconds before one more try, the tenth the last
LONGEST_WAIT = 3600.0  # seconds, whatever a server asks for



@dataclass
class State:
    """How far one source is."""

    shards: int = 0
    documents: int = 0
    bytes: int = 0  # of text
    done: bool = False  # its budget is met, or it has no more
    position: Any = None  # where its reading goes on
    left_out: dict[str, int] = field(default_factory=dict)
    first_places: dict[str, list[str]] = field(default_factory=dict)  # of what was left out, by reason

    @classmethod
    def of(cls, folder: Path) -> State:
        path = folder / "state.json"
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else cls()
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}: damaged ({error}); remove {folder} to download this source anew") from None


@dataclass(frozen=True)
class Downloaded:
    """What a download left on the disk, by the name of each source."""

    folder: Path
    states: dict[str, State]
    interrupted: bool

    def as_dict(self) -> dict[str, Any]:
        sources = {name: {key: value for key, value in asdict(state).items() if key != "position"}
                   for name, state in self.states.items()}
        return {"folder": str(self.folder), "interrupted": self.interrupted, "sources": sources}


def download(recipe: Recipe, folder: Path, progress: Progress, stopping: Callable[[], bool] = lambda: False,
             waits: tuple[float, ...] = WAITS, say: Callable[[str], None] = lambda text: None) -> Downloaded:
    """Fill `folder` as the recipe says, or go on with it. Where `stopping` says so, each source ends after the document
    at hand; what has not filled a shard is read again by the next call.

    Raises UserError when the folder is another recipe's, another process works there, or a source cannot be read.
    """
    with locked(folder / ".lock") as other:
        if other is not None:
            raise UserError(f"{folder}: a download is at work there ({other}); wait until it ends")
        _claim(recipe, folder)
        if reasons := not_ready(recipe, folder):
            raise UserError("\n".join(f"{name}: {reason}" for name, reason in reasons.items()))
        states, lock, failed = {}, threading.Lock(), threading.Event()

        def fetch(name: str, portion: Portion, budget: int) -> None:
            def here(state: State) -> None:
                with lock:
                    progress(name, min(state.bytes, budget), budget)

            try:
                states[name] = _fetch(portion, folder / "raw" / name, name, budget, recipe.shard_mb * 1e6, here,
                                      lambda: stopping() or failed.is_set(), waits, say)
            except BaseException:
                failed.set()  # the others save and end
                raise

        with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
            tasks = [pool.submit(fetch, *each) for each in
                     zip(recipe.names(), recipe.sources, recipe.budgets(), strict=True)]
            for task in tasks:
                task.result()
    return Downloaded(folder, {name: states[name] for name in recipe.names()}, stopping())


def not_ready(recipe: Recipe, folder: Path) -> dict[str, str]:
    """What must be done before sources that are not there yet can be read, by their names."""
    found = {}
    for name, portion in zip(recipe.names(), recipe.sources, strict=True):
        try:
            if not State.of(folder / "raw" / name).done:
                portion.source.build().ready()
        except UserError as error:
            found[name] = str(error)
    return found


def _claim(recipe: Recipe, folder: Path) -> None:
    """Raises UserError where something else is in the folder. What becomes of a corpus may change; what it is may
    not."""
    path, text = folder / "recipe.yaml", dump_yaml(recipe.as_dict())
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    if before and before != text:
        there, wanted = (parse_yaml(each, str(path)).data for each in (before, text))
        if any((there.get(key) or None) != (wanted.get(key) or None) for key in {*there, *wanted} - AFTERWARDS):
            raise UserError(f"{path}: this folder is of another recipe (or of other settings); give another --out, or "
                            "the recipe it was begun with")
    if before != text:
        write_text(path, text)


def _fetch(portion: Portion, folder: Path, name: str, budget: int, shard_bytes: float,
           progress: Callable[[State], None], stopping: Callable[[], bool], waits: tuple[float, ...],
           say: Callable[[str], None]) -> State:
    folder.mkdir(parents=True, exist_ok=True)
    state = State.of(folder)
    for path in shards.shards(folder)[state.shards:]:
        path.unlink()  # written, and not yet counted when the process was killed
    progress(state)
    if state.done or stopping():
        return state

    def wait(error: Unreachable, failures: int) -> None:
        if failures > len(waits):
            raise UserError(f"{error} (tried {failures} times; what is there is kept: run the same command again "
                            "to go on)") from error
        seconds = max(waits[failures - 1], min(error.wait, LONGEST_WAIT))
        say(f"{name}: {error}; trying again in {seconds:g} s")
        until = time.monotonic() + seconds
        while time.monotonic() < until and not stopping():
            time.sleep(min(0.1, seconds))

    for part in _parts(_Patient(portion.source.build(), state, wait, stopping), state, budget, shard_bytes):
        shards.write(shards.path_of(folder, part.state.shards - 1), part.documents, name)
        state = part.state
        write_text(folder / "state.json", json.dumps(asdict(state), indent=1, sort_keys=True))
        progress(state)
    return state


class _Patient:
    """A source's documents from a state on. Where it cannot be reached for a while it is read on from where it stood,
    and what was read before is kept."""

    def __init__(self, source: Any, state: State, wait: Callable[[Unreachable, int], None],
                 stopping: Callable[[], bool]) -> None:
        self.source, self.wait, self.stopping = source, wait, stopping
        self.reading: Any = None
        self.stopped = False
        self.position = state.position  # where reading goes on, while there is no `reading`
        self.earlier = LeftOut.of("items", state.left_out, state.first_places)

    def next(self) -> Document | None:
        """None at the end, and where it is to stop."""
        failures = 0
        while True:
            if self.stopping():
                self.stopped = True
                return None
            try:
                if self.reading is None:
                    self.reading = self.source.reading(self.position)
                return next(self.reading, None)
            except Unreachable as error:
                if self.reading is not None:
                    self.position, self.earlier = self.reading.position(), self.left_out()
                    self.reading = None
                failures += 1
                self.wait(error, failures)

    def left_out(self) -> LeftOut:
        """All that the source passed over up to here."""
        whole = LeftOut("items")
        if not self.reading.rereads:
            whole.update(self.earlier)
        whole.update(self.source.left_out)
        return whole


@dataclass(frozen=True)
class _Part:
    documents: list[Document]
    state: State  # after them


def _parts(patient: _Patient, state: State, budget: int, shard_bytes: float) -> Iterator[_Part]:
    """Documents enough for a shard each, and at the end what is left; where each begins depends on nothing but the
    documents."""
    held: list[Document] = []
    size, total, number = 0, state.bytes, state.documents
    ended = False

    def part(done: bool) -> _Part:
        left_out = patient.left_out()
        return _Part(held, State(state.shards + parts, number, total, done, patient.reading.position(),
                                 left_out.as_dict(), left_out.examples))

    parts = 0
    while not ended:
        document = patient.next()
        if patient.stopped:
            return
        if document is None or total >= budget:
            ended = True
        else:
            length = len(document.text.encode("utf-8", "replace"))
            held.append(document)
            size, total, number = size + length, total + length, number + 1
        if held and (ended or size >= shard_bytes or total >= budget):
            ended = ended or total >= budget
            parts += 1
            yield part(ended)
            held, size = [], 0
        elif ended:
            if state.shards + parts == 0:
                raise UserError(f"source {patient.source.name}: it has no document with any text in it")
            parts += 1  # the last shard was full exactly where the source ended
            held = []
            yield part(True)


def forecast(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """What a download fetches and needs, before it begins: bytes of text by source, and of disk (Parquet holds prose in
    about half its size), hours at ten megabytes of text a second, and what must be done before some sources can be
    read."""
    budgets = dict(zip(recipe.names(), recipe.budgets(), strict=True))
    return {"name": recipe.name, "bytes": sum(budgets.values()), "disk_bytes": round(0.5 * sum(budgets.values())),
            "hours_at_10_mb_per_s": round(sum(budgets.values()) / 10e6 / 3600, 2), "sources": budgets,
            "not_ready": not_ready(recipe, folder)}


def forecast_page(recipe: Recipe, folder: Path) -> str:
    """The same for a person, and what there is room for."""
    said = forecast(recipe, folder)
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    lines = [f"{said['name']}: {said['bytes'] / 1e9:,.2f} GB of text, about {said['disk_bytes'] / 1e9:,.2f} GB on the "
             f"disk (and as much again when it is filtered; {free / 1e9:,.1f} GB are free), "
             f"{said['hours_at_10_mb_per_s']:g} hours at 10 MB of text a second"]
    lines += [f"  {name:<24}{size / 1e6:>12,.1f} MB" for name, size in said["sources"].items()]
    lines += [f"first, for {name}: {reason}" for name, reason in said["not_ready"].items()]
    return "\n".join(lines)


def page(done: Downloaded) -> str:
    """What is on the disk, for a person."""
    lines = []
    for name, state in done.states.items():
        passed = LeftOut.of("items", state.left_out, state.first_places)
        lines.append(f"{name:<24}{state.documents:>10,} documents {state.bytes / 1e6:>10,.1f} MB in {state.shards} "
                     f"files{'' if state.done else '; not done'}{f'; {passed}' if passed else ''}")
    after = (f"interrupted; go on with the same command: what is in {done.folder} is kept" if done.interrupted else
             f"next: tryplicity data filter {done.folder}")
    return "\n".join([*lines, after])
