"""An index of passages in one SQLite file, searched by BM25 (FTS5).

    BM25 as FTS5 computes it: Robertson and Zaragoza, "The Probabilistic Relevance Framework" (2009), with k1 = 1.2 and
    b = 0.75, the words of a column counted as often as its weight says; https://sqlite.org/fts5.html

The file holds the table `passages`, the full-text index `words` of what `words.words` makes of them (FTS5 parts that at
spaces and stems it, nothing else; it keeps no text of its own) and the table `meta`. It is written under another name
and renamed when whole (`building`), and never changed afterwards, so that any number of threads and processes may read
it.
"""

from __future__ import annotations

import json
import math
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tryplicity.errors import UserError
from tryplicity.leftout import LeftOut
from tryplicity.search.query import Term, terms
from tryplicity.search.words import DOTTED, content_words, folded, joined, stem, words

if TYPE_CHECKING:
    from tryplicity.components import Passage

FORMAT = 2                      # raise when the same documents would give another file
APPLICATION = 0x54727970        # "Tryp", in the header of the file
# The constants below were chosen on the questions for tuning (tests/search/), and tests say what each one does.
_LEAD = 2.0                     # a word of a passage's first paragraph counts so often again
_HOME = 2.0                     # a passage whose origin comes first counts so much more: see `_home`
_ROWS = 12_000                  # matching passages whose score is computed for one question, about: bounds its time
_REORDERED = 40                 # the order of so many, the best by BM25, is reconsidered: see `_reordered`
_PER_PART = 0.85                # of the score is left for each further part of a dotted name
_AGAIN = 0.8                    # of the score is left for each better passage of the same page


class PassageIndex:
    """An index file, opened for reading. `search` and the other methods may be called from several threads at once.

    The object is one generation of the file: where another is put in its place it goes on with what it opened, and
    `replaced` says so.

    Raises UserError, saying what to do, when the file is not there, is no index of this version, or is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self._frequencies: dict[str, int] = {}      # of words and phrases asked for before
        if self.path.exists() and not self.path.is_file():
            raise UserError(f"{self.path}: not a search index but a folder or the like; give the file")
        self._idle = threading.Condition()
        self._connections: list[sqlite3.Connection] = []    # those that no thread is using
        meta = self._meta()
        self.passages = int(meta.get("passages", 0))
        self.source, self.fingerprint = meta.get("source", ""), meta.get("fingerprint", "")
        self._origins: dict[str, tuple[int, int]] = json.loads(meta.get("origins", "{}"))  # the one put first is first
        #: what of the source is not in the index, by kind
        self.left_out = [LeftOut(**counted) for counted in json.loads(meta.get("left_out", "[]"))]
        self.identity = meta.get("identity", "")            # changes when a passage does

    def __len__(self) -> int:
        return self.passages

    def examples(self, limit: int) -> list[str]:
        """At most `limit` questions that the passages can answer: their titles, spread over the whole index."""
        titles: dict[str, None] = {}
        for step in range(limit):
            first = 1 + step * self.passages // limit
            rows = self._run("SELECT title FROM passages WHERE number >= ? AND length(title) BETWEEN 4 AND 60 "
                             "ORDER BY number LIMIT 1", first)
            titles |= dict.fromkeys(" ".join(title.split()) for title, in rows)
        return [f"What is {title}?" if " " not in title else title for title in titles]

    def search(self, question: str, limit: int = 5) -> list[Passage]:
        """At most `limit` passages, best first, none with the text of one before it. [] where nothing is found."""
        return self.passages_at(self.rank(question, 3 * limit + 10))[:max(limit, 0)]

    def rank(self, question: str, limit: int) -> list[tuple[int, float]]:
        """(number, score) of the best passages, best first; numbers count from 1 in the order of the documents.

        All passages with any of the question's terms are scored by BM25, as long as these are about 12,000 at most.
        Beyond that its rarest terms decide alone; where even the rarest is that frequent, passages with all of the
        terms, and failing these, passages that have it in their title. Then the best are put in order: `_reordered`.
        """
        known = sorted((count, term) for term in terms(question) if (count := self._frequency(term)))
        if not known or limit < 1:
            return []
        return self._reordered(self._candidates(known, max(limit, _REORDERED)), known)[:limit]

    def _home(self, known: list[tuple[int, Term]]) -> list[tuple[int, int]]:
        """The numbers of the passages that come first: those of the origins that a question names (`numpy`), else of
        the one that its source puts first. None where the source puts none first."""
        named = {form[0] for _, term in known for form in term.forms} & self._origins.keys()
        return [self._origins[name] for name in sorted(named)] or list(self._origins.values())[:1]

    def _candidates(self, known: list[tuple[int, Term]], limit: int) -> list[tuple[int, float]]:
        """By BM25 and origin. known: the question's terms and in how many passages each is, rarest first."""
        chosen, rows = [], 0
        for count, term in known:
            rows += count
            if rows > _ROWS:
                break
            chosen.append(term.quoted)
        if chosen:
            return self._matches(" OR ".join(chosen), limit, home=self._home(known))
        every = [term.quoted for _, term in known]
        found = self._matches(" AND ".join(every), limit) if len(every) > 1 else []
        if len(found) < limit:
            before = {number for number, _ in found}
            titled = self._matches(f"title : {every[0]}", limit) or self._matches(every[0], limit, first=_ROWS)
            found += [(number, score) for number, score in titled if number not in before]
        return found[:limit]

    def _reordered(self, found: list[tuple[int, float]], known: list[tuple[int, Term]]) -> list[tuple[int, float]]:
        """The best candidates with their score raised by the share of the question that they cover (each term as its
        rarity says) and the share of their title that the question covers, and lowered for each part of a dotted
        name (what is asked for by common words is rarely deep inside a package) and for each better one of the same
        page."""
        rarity = [(term.stems, math.log(1 + self.passages / count)) for count, term in known]
        whole = sum(weight for _, weight in rarity)
        asked = frozenset().union(*(form for forms, _ in rarity for form in forms))
        begins = tuple(word[:-1] if len(word) > 2 else word[:1] for word in asked)
        scored = []
        best = dict(found[:_REORDERED])
        for number, title, text, names in self._run(
                f"SELECT number, title, text, names FROM passages WHERE number IN ({', '.join(map(str, best))})"):
            score = best[number]
            of_title = content_words(title)
            # a word begins as its stem does, but for the last letter: others need not be stemmed
            held = {*of_title, *(stem(word) for word in {*words(text), *names.split()} if word.startswith(begins))}
            covered = sum(weight for forms, weight in rarity if any(form <= held for form in forms))
            share = sum(word in asked for word in of_title) / max(len(of_title), 1)
            names = DOTTED.findall(folded(title))
            named = any(form in asked for name in names for form in joined(name))   # the name itself was asked for
            parts = 0 if named else max((name.count(".") for name in names), default=0)
            scored.append((score * _PER_PART ** parts * (1 + share + named + covered / whole),
                           number, title.partition(": ")[0]))
        before: Counter[str] = Counter()
        scored.sort(key=lambda found: (-found[0], found[1]))
        for at, (score, number, title) in enumerate(scored):
            scored[at] = score * _AGAIN ** before[title], number, title
            before[title] += 1
        scored = sorted(((number, score) for score, number, _ in scored), key=lambda found: (-found[1], found[0]))
        least = scored[-1][1] if scored else 0.0
        rest = found[_REORDERED:]       # behind them, their scores kept below
        return scored + [(number, least * score / max(rest[0][1], 1e-9)) for number, score in rest]

    def passages_at(self, ranked: Iterable[tuple[int, float]]) -> list[Passage]:
        """The passages of such numbers and scores, in this order, without those whose text was there before."""
        from tryplicity.components import Passage

        ranked = list(ranked)
        rows: dict[int, tuple[Any, ...]] = {}
        for start in range(0, len(ranked), 500):
            numbers = ", ".join(str(int(number)) for number, _ in ranked[start:start + 500])
            rows |= {row[0]: row[1:] for row in self._run(
                f"SELECT number, id, title, url, text FROM passages WHERE number IN ({numbers})")}
        found, seen = [], set()
        for number, score in ranked:
            if number in rows and (text := " ".join(rows[number][3].split())) not in seen:
                seen.add(text)
                found.append(Passage(*rows[number], score))
        return found

    def texts(self) -> Iterable[tuple[str, str]]:
        """(title, text) of all passages, in order."""
        return self._run("SELECT title, text FROM passages ORDER BY number")

    def _frequency(self, term: Term) -> int:
        """How many passages have it."""
        quoted = term.quoted
        if quoted not in self._frequencies:
            if len(self._frequencies) > 100_000:
                self._frequencies.clear()
            self._frequencies[quoted] = self._run("SELECT count(*) FROM words WHERE words MATCH ?", quoted)[0][0]
        return self._frequencies[quoted]

    def _matches(self, query: str, limit: int, first: int | None = None,
                 home: Sequence[tuple[int, int]] = ()) -> list[tuple[int, float]]:
        """first: only passages up to this number are looked at. home: (first, last) of passages that count more."""
        within = f"AND rowid <= {first}" if first else ""
        at_home = " OR ".join(f"rowid BETWEEN {begin} AND {end}" for begin, end in home) or "FALSE"
        rows = self._run(f"SELECT rowid, bm25(words, 1.0, {_LEAD}, 1.0, 1.0) * iif({at_home}, {_HOME}, 1.0) AS score "
                         f"FROM words WHERE words MATCH ? {within} ORDER BY score, rowid LIMIT ?", query, limit)
        return [(number, -score) for number, score in rows]

    @property
    def replaced(self) -> bool:
        """Whether another file is in its place now."""
        now = _generation(self.path)
        return now is not None and now != self._generation

    def _run(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        try:
            with self._connection() as connection:
                return connection.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise UserError(f"{self.path}: the index is damaged ({error}); build it again: tryplicity search index "
                            f"SOURCE --out {self.path}") from error

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """One that no other thread uses meanwhile. All are to the file that was opened first: when that is no longer
        there, no more are made, and who finds none waits for one."""
        with self._idle:
            while not self._connections:
                if (made := self._connected()) is not None:
                    self._connections.append(made)
                else:
                    self._idle.wait()
            connection = self._connections.pop()
        try:
            yield connection
        finally:
            with self._idle:
                self._connections.append(connection)
                self._idle.notify()

    def _connected(self) -> sqlite3.Connection | None:
        """A further connection; None where another file has taken the place of the one that was opened."""
        if _generation(self.path) != self._generation:
            return None
        uri = f"{self.path.resolve().as_uri()}?mode=ro&immutable=1"
        connection = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)
        connection.execute("PRAGMA mmap_size = 1073741824")
        if _generation(self.path) != self._generation:
            connection.close()
            return None
        return connection

    def _meta(self) -> dict[str, str]:
        """Of the file that is there now, whole: where it is replaced meanwhile, of the one after."""
        while (now := _generation(self.path)) is not None:
            self._generation = now
            try:
                opened = self._connected()
            except sqlite3.Error as error:
                raise UserError(f"{self.path}: the index cannot be read ({error})") from error
            if opened is not None:
                self._connections = [opened]
                return self._checked(opened)
        raise UserError(f"{self.path}: no such index; make it: tryplicity search index FOLDER --out {self.path}")

    def _checked(self, opened: sqlite3.Connection) -> dict[str, str]:
        again = f"build it again: tryplicity search index SOURCE --out {self.path}"
        foreign = UserError(f"{self.path}: not a search index; make one: tryplicity search index SOURCE --out FILE")

        def pragma(name: str) -> int:
            return opened.execute(f"PRAGMA {name}").fetchone()[0]

        try:
            if pragma("application_id") != APPLICATION:
                raise foreign
            if (version := pragma("user_version")) != FORMAT:
                raise UserError(f"{self.path}: an index of format {version}, and this program reads format {FORMAT}; "
                                f"{again}")
            if self._generation.size < pragma("page_count") * pragma("page_size"):
                raise UserError(f"{self.path}: the index was cut short; {again}")
            return dict(self._run("SELECT key, value FROM meta"))
        except (sqlite3.Error, OSError) as error:
            if "not a database" in str(error):
                raise foreign from error
            raise UserError(f"{self.path}: the index cannot be read ({error}); {again}") from error


class _Generation(NamedTuple):
    """What tells a file from one that is put in its place."""

    device: int
    inode: int
    size: int
    changed: int


def _generation(path: Path) -> _Generation | None:
    """None where there is no file."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return _Generation(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
