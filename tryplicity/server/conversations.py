"""Conversations in one SQLite file: they survive restarts, and a process that is killed.

Every call runs on the store's own thread, one after another, each in one short transaction. The file is in WAL mode
with full synchronisation: what a call returned from is on disk (https://sqlite.org/wal.html). Times are seconds since
1970.
"""

from __future__ import annotations

import contextlib
import json
import re
import sqlite3
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tryplicity.errors import UserError
from tryplicity.server import wording

FORMAT = 2              # of the file and of what `export` gives; raise when either changes
TITLE_CHARACTERS = 200
BUSY_SECONDS = 5.0      # that a call waits for another process that holds the file, from the moment it is asked for
MOST_WORDS = 50         # of a search; SQLite takes no expression of a thousand
NEW = "New conversation"    # the title until the first question gives one

_SCHEMA = """
CREATE TABLE conversations (
    id TEXT PRIMARY KEY, title TEXT NOT NULL, created REAL NOT NULL, updated REAL NOT NULL) WITHOUT ROWID;
CREATE INDEX by_time ON conversations (updated);
CREATE TABLE messages (
    number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE,
    conversation TEXT NOT NULL REFERENCES conversations (id) ON DELETE CASCADE,
    role TEXT NOT NULL, content TEXT NOT NULL, sources TEXT NOT NULL, supported INTEGER, created REAL NOT NULL,
    finish TEXT, tokens_per_second REAL, settings TEXT NOT NULL, quotation TEXT);
CREATE INDEX by_conversation ON messages (conversation, number);
"""
_STEPS = {1: "ALTER TABLE messages ADD COLUMN quotation TEXT"}     # from a format to the next one
_COLUMNS = ("id", "conversation", "role", "content", "sources", "supported", "created", "finish",
            "tokens_per_second", "settings", "quotation")
_RESERVED = frozenset({"export", "import"})     # are addresses beside those of conversations
MOST_MESSAGES = 200_000     # of one import; each takes far more memory than its bytes


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


Time = Annotated[float, Field(ge=0, le=253_402_300_800)]     # to the year 9999: what a browser can show
Setting = str | bool | Annotated[int, Field(ge=-(1 << 63), lt=1 << 64)] | float | None


class CitedPassage(_Record):
    """A passage that an answer cites as [number], or that was found."""

    number: Annotated[int, Field(ge=1, lt=1 << 31)]
    id: str
    title: str
    url: str
    text: str


class Message(_Record):
    """One message. finish is None for a question, and for an answer that is being written; "none" where no model was
    there to write one. supported False: the sources are the passages found, and the answer rests on none of them;
    quotation: what they say nearest to the question, as Markdown with marks, then."""

    id: str = Field(default_factory=lambda: uuid.uuid4().hex, min_length=1, max_length=100)
    role: Literal["user", "assistant"]
    content: str
    sources: list[CitedPassage] = []
    supported: bool | None = None
    created: Time = Field(default_factory=time.time)
    finish: Literal["stop", "length", "cancelled", "none"] | None = None
    tokens_per_second: float | None = None
    settings: dict[str, Setting] = {}
    quotation: str | None = None


class Conversation(_Record):
    id: str = Field(default_factory=lambda: uuid.uuid4().hex, min_length=1, max_length=100)
    title: str = Field(NEW, min_length=1, max_length=TITLE_CHARACTERS)
    created: Time = Field(default_factory=time.time)
    updated: Time = Field(default_factory=time.time)
    messages: list[Message] = []


class Export(_Record):
    format: Literal[1, 2] = FORMAT      # 1: without quotations
    conversations: list[Conversation]


class Unknown(LookupError):
    """No such conversation or message."""


class Changed(Exception):
    """The conversation's last message is another one."""


class Store:
    """The conversations of one file. `path` None: in memory, gone at the end.

    Every method but `call` and `close` is for the store's own thread: `store.call(store.get, id)` gives a Future.
    """

    def __init__(self, path: Path | None) -> None:
        """Raises UserError when the file cannot be used."""
        self.path = path
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="conversations")
        self._database: sqlite3.Connection = self._thread.submit(self._open).result()
        self.kept: int = self.call(self.count).result()     # conversations, without asking the file

    def call(self, function: Callable[..., Any], *args: Any) -> Future:
        """Run on the store's thread, after everything asked before. Raises sqlite3.Error where the file is full,
        damaged, or held by another process for longer than BUSY_SECONDS; those before it count towards them."""
        asked = time.monotonic()

        def run() -> Any:
            left = BUSY_SECONDS - (time.monotonic() - asked)
            self._database.execute(f"PRAGMA busy_timeout = {max(0, int(1000 * left))}")
            return function(*args)

        return self._thread.submit(run)

    def close(self) -> None:
        self._thread.submit(self._database.close).result()
        self._thread.shutdown()

    def _open(self) -> sqlite3.Connection:
        name = ":memory:" if self.path is None else str(self.path)
        try:
            if self.path is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.path.touch(mode=0o600)     # what is asked is nobody else's
            database = sqlite3.connect(name, timeout=10, isolation_level=None)
            database.create_function("folded", 1, str.casefold, deterministic=True)
            tables = {table for table, in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if tables and not {"conversations", "messages"} <= tables:
                raise UserError(f"{name}: a database of something else; name another file with --conversations")
            database.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; PRAGMA foreign_keys=ON;")
            with _transaction(database):
                [version] = database.execute("PRAGMA user_version").fetchone()
                if version == 0:
                    for statement in _SCHEMA.split(";"):
                        database.execute(statement)
                    database.execute(f"PRAGMA user_version={FORMAT}")
                elif not 1 <= version <= FORMAT:
                    raise UserError(f"{name}: written by another version of Tryplicity (format {version}, this one "
                                    f"knows {FORMAT}); name another file with --conversations")
                else:
                    for older in range(version, FORMAT):
                        database.execute(_STEPS[older])
                        database.execute(f"PRAGMA user_version={older + 1}")
                # an answer without an end was being written when the process was killed
                database.execute("UPDATE messages SET finish='cancelled' WHERE role='assistant' AND finish IS NULL")
        except (sqlite3.Error, OSError) as error:
            raise UserError(f"{name}: cannot be used for conversations: {error}; name another file with "
                            "--conversations") from None
        return database

    # --- reading ---

    def summaries(self, query: str = "") -> list[dict[str, Any]]:
        """Every conversation in whose title or messages each word of `query` occurs, the latest first."""
        words = list(dict.fromkeys(query.casefold().split()))[:MOST_WORDS]
        occurs = ("(instr(folded(c.title), ?) OR EXISTS (SELECT 1 FROM messages m WHERE m.conversation = c.id AND "
                  "instr(folded(m.content), ?)))")
        rows = self._database.execute(
            "SELECT id, title, created, updated, (SELECT count(*) FROM messages WHERE conversation = c.id) "
            f"FROM conversations c {'WHERE' if words else ''} {' AND '.join([occurs] * len(words))} "
            "ORDER BY updated DESC, id", [word for word in words for _ in range(2)])
        return [dict(zip(("id", "title", "created", "updated", "messages"), row, strict=True)) for row in rows]

    def get(self, id: str) -> Conversation:
        """With its messages. Raises Unknown."""
        row = self._database.execute("SELECT id, title, created, updated FROM conversations WHERE id = ?",
                                     (id,)).fetchone()
        if row is None:
            raise Unknown(id)
        messages = self._database.execute(
            f"SELECT {', '.join(_COLUMNS)} FROM messages WHERE conversation = ? ORDER BY number", (id,))
        return Conversation(id=row[0], title=row[1], created=row[2], updated=row[3],
                            messages=[_message(m) for m in messages])

    def export(self) -> Export:
        """All of them, the oldest first."""
        with _transaction(self._database):
            ids = self._database.execute("SELECT id FROM conversations ORDER BY created, id").fetchall()
            return Export(conversations=[self.get(id) for (id,) in ids])

    def count(self) -> int:
        return self._database.execute("SELECT count(*) FROM conversations").fetchone()[0]

    # --- writing ---

    def create(self, title: str = NEW) -> Conversation:
        conversation = Conversation(title=title)
        with _transaction(self._database):
            self._insert(conversation)
        self.kept += 1
        return conversation

    def rename(self, id: str, title: str) -> Conversation:
        """Raises Unknown."""
        with _transaction(self._database):
            self._touch(id, title=title)
            return self.get(id)

    def delete(self, id: str) -> None:
        """Raises Unknown."""
        with _transaction(self._database):
            if not self._database.execute("DELETE FROM conversations WHERE id = ?", (id,)).rowcount:
                raise Unknown(id)
        self.kept -= 1

    def append(self, id: str, *messages: Message, after: str | bool | None = True, last: str | bool | None = True,
               title: str | None = None) -> None:
        """Add messages at the end, in one transaction. after: None drops all that was there, the id of a message
        all behind it, True nothing. last: the id of the message that must be the last one (None: that there is none),
        else Changed is raised; True: any. title: for a conversation that has none yet. Raises Unknown."""
        with _transaction(self._database):
            self._touch(id, first_title=title)
            if last is not True:
                row = self._database.execute("SELECT id FROM messages WHERE conversation = ? ORDER BY number DESC "
                                             "LIMIT 1", (id,)).fetchone()
                if (row[0] if row else None) != last:
                    raise Changed(id)
            if after is not True:
                number = 0
                if after:
                    row = self._database.execute("SELECT number FROM messages WHERE id = ? AND conversation = ?",
                                                 (after, id)).fetchone()
                    if row is None:
                        raise Unknown(after)
                    [number] = row
                self._database.execute("DELETE FROM messages WHERE conversation = ? AND number > ?", (id, number))
            self._insert_messages(id, messages)

    def save(self, id: str, message: Message) -> None:
        """Write a message anew, if it and its conversation are still there."""
        with _transaction(self._database), contextlib.suppress(Unknown):
            assignments = ", ".join(f"{column} = ?" for column in _COLUMNS[3:])
            self._database.execute(f"UPDATE messages SET {assignments} WHERE id = ? AND conversation = ?",
                                   (*_row(id, message)[3:], message.id, id))
            self._touch(id)

    def load(self, export: Export) -> dict[str, int]:
        """Add what `export` gave. A conversation that is here already, word for word, is left; one that differs comes
        under a new id."""
        imported = 0
        with _transaction(self._database):
            for conversation in export.conversations:
                with contextlib.suppress(Unknown):
                    here = self.get(conversation.id)
                    if here.messages == conversation.messages:
                        continue
                    conversation = conversation.model_copy(update={"id": uuid.uuid4().hex})
                seen: set[str] = set()
                new = []
                for message in conversation.messages:
                    if message.id in seen or not self._is_free(message.id):
                        message = message.model_copy(update={"id": uuid.uuid4().hex})
                    seen.add(message.id)
                    new.append(message)
                self._insert(conversation.model_copy(update={"messages": new}))
                imported += 1
        self.kept += imported
        return {"imported": imported, "skipped": len(export.conversations) - imported}

    def _is_free(self, message: str) -> bool:
        return self._database.execute("SELECT 1 FROM messages WHERE id = ?", (message,)).fetchone() is None

    def _insert(self, conversation: Conversation) -> None:
        self._database.execute("INSERT INTO conversations VALUES (?, ?, ?, ?)",
                               (conversation.id, conversation.title, conversation.created, conversation.updated))
        self._insert_messages(conversation.id, conversation.messages)

    def _insert_messages(self, id: str, messages: Any) -> None:
        self._database.executemany(
            f"INSERT INTO messages ({', '.join(_COLUMNS)}) VALUES ({', '.join('?' * len(_COLUMNS))})",
            [_row(id, message) for message in messages])

    def _touch(self, id: str, title: str | None = None, first_title: str | None = None) -> None:
        changed = self._database.execute(
            "UPDATE conversations SET updated = ?, title = coalesce(?, CASE WHEN title = ? THEN ? END, title) "
            "WHERE id = ?", (time.time(), title, NEW, first_title, id))
        if not changed.rowcount:
            raise Unknown(id)


@contextlib.contextmanager
def _transaction(database: sqlite3.Connection) -> Iterator[None]:
    """All or nothing; inside another one, a part of it."""
    if database.in_transaction:
        yield
        return
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
        database.execute("COMMIT")      # which may fail too, and must not leave it open
    except BaseException:
        if database.in_transaction:     # SQLite has ended it itself where the disk was full
            database.execute("ROLLBACK")
        raise


def _row(id: str, message: Message) -> tuple[Any, ...]:
    return (message.id, id, message.role, message.content,
            json.dumps([source.model_dump() for source in message.sources], ensure_ascii=False), message.supported,
            message.created, message.finish, message.tokens_per_second,
            json.dumps(message.settings, ensure_ascii=False), message.quotation)


def _message(row: tuple[Any, ...]) -> Message:
    values = dict(zip(_COLUMNS, row, strict=True))
    del values["conversation"]
    values["sources"] = json.loads(values["sources"])
    values["settings"] = json.loads(values["settings"])
    values["supported"] = None if values["supported"] is None else bool(values["supported"])
    return Message(**values)


def title_of(question: str) -> str:
    """A short title for a conversation that begins with `question`."""
    line = " ".join(question.split())
    if len(line) <= 60:
        return line or NEW
    return line[:60].rpartition(" ")[0].rstrip(",;:. ") + " …" if " " in line[:60] else line[:59] + "…"


def read_export(value: Any) -> Export:
    """What `export` gave, of all conversations or of one. Raises UserError."""
    if isinstance(value, dict) and "conversations" not in value:
        value = {"conversations": [value]}
    listed = value.get("conversations") if isinstance(value, dict) else None
    number = sum(1 + len(messages) if isinstance(messages := each.get("messages"), list) else 1
                 for each in listed if isinstance(each, dict)) if isinstance(listed, list) else 0
    if number > MOST_MESSAGES:
        raise UserError(f"import: more than {MOST_MESSAGES:,} messages; import an export in parts")
    try:
        export = Export.model_validate(value)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        raise UserError(f"{wording.place(problem) or 'import'}: {wording.said(problem)}; import what an export "
                        "gave") from None
    for conversation in export.conversations:
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,100}", conversation.id) or conversation.id in _RESERVED:
            conversation.id = uuid.uuid4().hex      # it is a part of addresses
        for message in conversation.messages:
            if message.role == "assistant" and message.finish is None:
                message.finish = "cancelled"
    return export


def as_markdown(conversation: Conversation) -> str:
    """To read or to keep elsewhere: a heading for each turn, the sources of an answer as a list below it."""
    parts = [f"# {' '.join(conversation.title.split())}"]
    for message in conversation.messages:
        parts.append(f"## {'Question' if message.role == 'user' else 'Answer'}\n\n{message.content.strip()}")
        if message.quotation:
            parts.append(f"From the sources, not written by the model:\n\n{message.quotation}")
        if message.sources:
            found = "Found, but the answer rests on none of them" if message.supported is False else \
                "Found" if message.finish == "none" else "Sources"
            parts.append(f"{found}:\n\n" + "\n".join(f"{s.number}. {_link(s)}" for s in message.sources))
    return "\n\n".join(parts) + "\n"


def _link(source: CitedPassage) -> str:
    title = " ".join(source.title.split()).replace("[", "\\[").replace("]", "\\]")
    return f"[{title}](<{source.url}>)" if source.url and not set(source.url) & set("<>\n\r") else title
