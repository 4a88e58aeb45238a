"""A data set of the Hugging Face Hub, streamed."""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote

from pydantic import Field

from tryplicity import Conversation, Document, LeftOut, Reading, Source, Steps, Unreachable, UserError, escaped
from tryplicity_plugins.sources.chat_rows import conversation_of
from tryplicity_plugins.sources.rows import BadRow, BadRows, text_of

_LATER = (408, 429, 500, 502, 503, 504)     # HTTP status codes that pass
VERSION = 2             # raise when the same rows would give other documents


class HuggingFace(Source):
    """Rows of a data set, streamed through `datasets`; nothing is downloaded but the rows that are read. Where the
    connection breaks, `datasets` asks again for what is missing.

    What was read stays in the cache under the options given here: change `revision` to read a newer version.
    """

    name = "huggingface"

    @dataclass(frozen=True)
    class Config:
        dataset: str
        """its name on the Hub (HuggingFaceFW/fineweb-edu), or `json` or `parquet` together with data_files"""
        name: str | None = None
        """the configuration, where it has several (sample-10BT)"""
        split: str = "train"
        """the split to read"""
        text_key: str = "text"
        """the column that holds the text"""
        limit: Steps | None = None
        """read so many rows, the first ones; all without it"""
        data_files: str | None = None
        """files or a pattern to read instead of the data set's default"""
        revision: str | None = None
        """the commit, branch or tag to read"""
        domain: Literal["text", "code", "math"] = "text"
        """what kind of text it is"""
        score_key: str | None = None
        """the column that holds what the data set itself says of a row's quality"""
        least_score: Annotated[float, Field(ge=-1e9, le=1e9)] | None = None
        """with score_key: rows with a lower one are left out"""
        bad_rows: Literal["error", "skip"] = "error"
        """a row that cannot be used: stop and say which, or leave it out and count it"""

    @classmethod
    def check(cls, config: Config, site: Any) -> Iterator[tuple[str, str]]:
        if config.least_score is not None and config.score_key is None:
            yield "least_score", "of which column? give score_key too"

    def __init__(self, config: Config) -> None:
        self.config = config
        self.read_share: float | None = 0.0 if config.limit else None

    def fingerprint(self) -> str:
        """From the options, and from the size and time of change of data files on this machine."""
        patterns = [self.config.data_files] if self.config.data_files and "://" not in self.config.data_files else []
        if (folder := Path(self.config.dataset).expanduser()).is_dir():
            patterns.append(f"{glob.escape(str(folder))}/**")
        local = []
        for path in sorted({path for pattern in patterns
                            for path in glob.glob(os.path.expanduser(pattern), recursive=True)}):
            info = os.stat(path)
            local.append((os.path.realpath(path), info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_ino))
        described = json.dumps([self.name, VERSION, asdict(self.config), local])
        return hashlib.sha256(described.encode()).hexdigest()

    def documents(self) -> Iterator[Document]:
        """Raises UserError when the data set cannot be reached and, unless they are skipped, for a row without text."""
        yield from _Stream(self)

    def reading(self, position: Any = None) -> Reading:
        """The position is `datasets`' own state of the stream: what was read is not asked for again. Where the server
        does not answer this ends at once, since who asks waits, as long as the server wishes, and goes on."""
        from datasets import config

        config.STREAMING_READ_MAX_RETRIES = 1
        for kind in ("", "_SERVER_UNAVAILABLE", "_RATE_LIMIT"):
            setattr(config, f"STREAMING_READ{kind}_RETRY_INTERVAL", 0)
        return _Stream(self, position)

    def read(self, rows: Iterator[tuple[int, dict[str, Any]]]) -> Iterator[Document]:
        """The documents of rows, each with its number."""
        key, scored, least = self.config.text_key, self.config.score_key, self.config.least_score

        def made_of(row: dict[str, Any]) -> tuple[str, float | None] | None:
            text = text_of(row.get(key), key, row)
            return (text, _score(row, scored)) if text and text.strip() else None

        for number, (text, score) in self._used(made_of, rows):
            if least is not None and score < least:
                self.left_out.add(f"with a {scored} under {least:g}", f"row {number}")
            else:
                yield Document(self._id(number), text, self.config.domain, self._url(number), score)

    def conversations(self) -> Iterator[Conversation]:
        """Each row is one, in OpenAI's form or another common one (see `chat_rows`). Raises UserError when the data
        set cannot be reached and, unless they are skipped, for a row that is none."""
        for number, (messages, unused) in self._used(conversation_of, self.numbered_rows(self.open(), 0)):
            for key in unused:
                self.left_out.add(f"fields {key!r} of rows", f"row {number}")
            yield Conversation(self._id(number), messages, self._url(number))

    def _used(self, made_of: Callable[[dict[str, Any]], Any], rows: Iterator[tuple[int, dict[str, Any]]],
              ) -> Iterator[tuple[int, Any]]:
        """The number of each row that can be used, and what `made_of` makes of it."""
        self.left_out = LeftOut("items")
        name = self.config.dataset
        quoted = name if re.fullmatch(r"[\w./-]+", name) else json.dumps(name)
        remedy = f"'{{type: huggingface, dataset: {quoted}, bad_rows: skip}}'"
        bad = BadRows(self.config.bad_rows, self.left_out, remedy)
        for number, row in rows:
            try:
                made = made_of(row)
            except BadRow as odd:
                bad(odd, f"{self._called()}: row {number}", f"row {number}")
                continue
            if made is None:
                bad.empty(f"row {number}")
            else:
                yield number, made

    def _id(self, number: int) -> str:
        config = self.config
        return f"{escaped(config.dataset)}/{escaped(config.name or '')}/{escaped(config.split)}:{number}"

    def _url(self, number: int) -> str:
        page = quote(self.config.data_files or f"https://huggingface.co/datasets/{self.config.dataset}", safe=":/*@")
        return f"{page}#{quote(self.config.split)}-{number}"

    def numbered_rows(self, dataset: Any, first: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """The rows of a data set that was opened, and of which so many are behind us. Raises UserError."""
        try:
            most = self.config.limit and max(0, self.config.limit - first)
            for number, row in enumerate(itertools.islice(dataset, most), first):
                if self.config.limit:
                    self.read_share = (number + 1) / self.config.limit
                yield number, row
        except Exception as error:      # of datasets, huggingface_hub, fsspec, pyarrow and what these use
            raise self.explained(error) from error

    def _called(self) -> str:
        return f"huggingface:{self.config.dataset}" + (f" ({self.config.name})" if self.config.name else "")

    def open(self) -> Any:
        """The data set as `datasets` streams it. Raises UserError."""
        try:
            from datasets import load_dataset

            return load_dataset(self.config.dataset, self.config.name, split=self.config.split, streaming=True,
                                data_files=self.config.data_files, revision=self.config.revision)
        except Exception as error:
            raise self.explained(error) from error

    def ready(self) -> None:
        """Asks the Hub whether this user may read the data set. That it cannot be asked is told when it is read."""
        name = self._on_the_hub()
        if name is None:
            return
        from huggingface_hub import HfApi
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

        page = f"https://huggingface.co/datasets/{name}"
        login = "log in (`hf auth login`, or a token in HF_TOKEN)"
        try:
            HfApi().auth_check(name, repo_type="dataset")
        except GatedRepoError:
            raise UserError(f"{self._called()}: its owner gives it to those who accept its terms; accept them at "
                            f"{page}, and {login}") from None
        except RepositoryNotFoundError:
            raise UserError(f"{self._called()}: there is no such data set, or it is private; look at {page}; for a "
                            f"private one {login}") from None
        except Exception:
            return      # no network, or a Hub of another kind

    def _on_the_hub(self) -> str | None:
        """The name of the data set on the Hub that is read; None for files elsewhere."""
        if self.config.data_files is not None:
            match = re.match(r"hf://datasets/([^/@]+/[^/@]+)", self.config.data_files)
            return match[1] if match else None
        return None if Path(self.config.dataset).expanduser().exists() else self.config.dataset

    def explained(self, error: Exception) -> UserError:
        """What went wrong and what to do; Unreachable where waiting may help."""
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        status, wait = _status_of(error)
        if isinstance(error, FileNotFoundError) and (self.config.data_files or "").startswith(("http://", "https://")):
            status, wait = _status_at(self.config.data_files)       # which `datasets` does not say
        if status in _LATER:
            busy = Unreachable(f"{self._called()}: the server is busy, or down (status {status}); try again later")
            busy.wait = wait
            return busy
        if status in (401, 403):
            return UserError(f"{self._called()}: not without a login, or a licence (status {status}): {reason}")
        if "script" in reason.lower():
            remedy = ("it has a loader script, which `datasets` no longer runs; name its data files: "
                      "{type: huggingface, dataset: parquet, data_files: "
                      f"'hf://datasets/{self.config.dataset}/**/*.parquet'}}")
        elif _is_offline(error):
            remedy = ("the Hub cannot be reached; connect this machine, or train without a download: --data "
                      "python-docs, or --data path/to/folder")
        else:
            remedy = "check dataset, name, split, data_files and revision"
        return (Unreachable if _is_offline(error) else UserError)(f"{self._called()}: {reason}: {remedy}")


class _Stream(Reading):
    """A data set's documents, gone on with from a state of its stream."""

    rereads = False

    def __init__(self, source: HuggingFace, position: Any = None) -> None:
        self.dataset, self.row = source.open(), 0
        if position:
            self.row = position["row"]
            self.dataset.load_state_dict(position["stream"])
        self._documents = source.read(self._counted(source.numbered_rows(self.dataset, self.row)))

    def _counted(self, rows: Iterator[tuple[int, dict[str, Any]]]) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, row in rows:
            self.row = number + 1
            yield number, row

    def __next__(self) -> Document:
        return next(self._documents)

    def position(self) -> Any:
        return {"row": self.row, "stream": self.dataset.state_dict()}


def _score(row: dict[str, Any], key: str | None) -> float | None:
    """What a row says of its quality. Raises BadRow where it should and does not."""
    if key is None:
        return None
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRow(f"no number under the key {key!r}", f"its keys are {', '.join(map(str, row))}; name the key that "
                     "holds the score: score_key")
    return float(value)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status_of(error: BaseException) -> tuple[int | None, float]:
    """The HTTP status that an error is about, and the seconds that the server asks to wait."""
    for link in _chain(error):
        answer = getattr(link, "response", None)
        status = getattr(link, "status", None) or getattr(answer, "status_code", None) or getattr(link, "code", None)
        if isinstance(status, int):
            headers = getattr(link, "headers", None) or getattr(answer, "headers", None) or {}
            return status, _seconds(headers.get("Retry-After"))
    return None, 0.0


def _status_at(url: str) -> tuple[int | None, float]:
    """The same of the answer to a request for the first byte there."""
    import urllib.error
    import urllib.request

    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers={"Range": "bytes=0-0"}), timeout=10) as answer:
            return answer.status, 0.0
    except urllib.error.HTTPError as error:
        return error.code, _seconds(error.headers.get("Retry-After"))
    except OSError:
        return 503, 0.0         # nobody answers


def _seconds(retry_after: str | None) -> float:
    """From a number of seconds, or a date."""
    if not retry_after:
        return 0.0
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except ValueError:
        return 0.0


def _is_offline(error: Exception) -> bool:
    names = {base.__name__ for link in _chain(error) for base in type(link).__mro__}
    return bool(names & {"ConnectionError", "ConnectError", "TransportError", "TimeoutError",
                         "TimeoutException", "OfflineModeIsEnabled", "LocalEntryNotFoundError", "ClientConnectionError",
                         "ClientPayloadError"})
