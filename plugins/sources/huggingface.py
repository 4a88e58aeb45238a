"""A data set of the Hugging Face Hub, streamed."""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tryplicity import Conversation, Document, Some, Source, Steps, UserError
from tryplicity_plugins.sources.chat_rows import messages_of

_FIRST_WAIT = 2.0       # seconds before the first retry; doubled each time
_STATE_EVERY = 1000     # rows between two notes of where the stream stands


class HuggingFace(Source):
    """Rows of a data set, streamed through `datasets`; nothing is downloaded but the rows that are read.

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
        retries: Some = 5
        """how often to try again, in a row, after the connection broke"""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.read_share: float | None = 0.0 if config.limit else None

    def fingerprint(self) -> str:
        """From the options, and from the size and time of change of data files on this machine."""
        local = []
        if self.config.data_files and "://" not in self.config.data_files:
            pattern = Path(self.config.data_files).expanduser()
            local = [(str(path), (stat := path.stat()).st_size, stat.st_mtime_ns)
                     for path in sorted(pattern.parent.glob(pattern.name))]
        options = asdict(self.config)
        del options["retries"]
        return hashlib.sha256(json.dumps([self.name, options, local]).encode()).hexdigest()

    def documents(self) -> Iterator[Document]:
        """Raises UserError when the data set cannot be reached or has no such column."""
        key = self.config.text_key
        for number, row in self._numbered_rows():
            text = row.get(key)
            if text is None and key in row:
                continue
            if not isinstance(text, str):
                raise UserError(f"{self._called()}: row {number} has no text in the column {key!r}; its "
                                f"columns are {', '.join(row)}; name the one that holds the text: text_key")
            yield Document(self._id(number), text, self.config.domain, self._url(number))

    def conversations(self) -> Iterator[Conversation]:
        """Each row is one, in OpenAI's form or another common one (see `chat_rows`). Raises UserError when the data
        set cannot be reached or a row is none."""
        for number, row in self._numbered_rows():
            yield Conversation(self._id(number), messages_of(row, f"{self._called()}: row {number}"),
                               self._url(number))

    def _id(self, number: int) -> str:
        return f"{self.config.dataset}/{self.config.name or ''}/{self.config.split}:{number}"

    def _url(self, number: int) -> str:
        page = self.config.data_files or f"https://huggingface.co/datasets/{self.config.dataset}"
        return f"{page}#{self.config.split}-{number}"

    def _numbered_rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, row in enumerate(itertools.islice(self._rows(), self.config.limit)):
            if self.config.limit:
                self.read_share = (number + 1) / self.config.limit
            yield number, row

    def _called(self) -> str:
        return f"huggingface:{self.config.dataset}" + (f" ({self.config.name})" if self.config.name else "")

    def _open(self) -> Any:
        from datasets import load_dataset

        return load_dataset(self.config.dataset, self.config.name, split=self.config.split, streaming=True,
                            data_files=self.config.data_files, revision=self.config.revision)

    def _rows(self) -> Iterator[dict[str, Any]]:
        """The rows in order, going on where it stood after the connection broke."""
        done, kept, state = 0, 0, None     # rows given; the stream's state after the first `kept` of them
        failures, wait = 0, _FIRST_WAIT
        while True:
            try:
                stream = self._open()
                if state is not None:
                    stream.load_state_dict(state)
                for number, row in enumerate(stream, kept):
                    if number < done:
                        continue
                    failures, wait = 0, _FIRST_WAIT
                    yield row
                    done += 1
                    if done - kept >= _STATE_EVERY:
                        kept, state = done, stream.state_dict()
                return
            except Exception as error:
                failures += 1
                if not _may_pass(error) or failures > self.config.retries:
                    raise UserError(self._explained(error)) from error
                time.sleep(wait)
                wait *= 2

    def _explained(self, error: Exception) -> str:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        if "script" in reason.lower():
            remedy = ("it has a loader script, which `datasets` no longer runs; name its data files: "
                      "{type: huggingface, dataset: parquet, data_files: "
                      f"'hf://datasets/{self.config.dataset}/**/*.parquet'}}")
        elif _is_offline(error):
            remedy = ("the Hub cannot be reached; connect this machine, or train without a download: --data "
                      "python-docs, or --data path/to/folder")
        else:
            remedy = "check dataset, name, split, data_files and revision"
        return f"{self._called()}: {reason}: {remedy}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_offline(error: Exception) -> bool:
    names = {base.__name__ for link in _chain(error) for base in type(link).__mro__}
    return bool(names & {"ConnectionError", "ConnectError", "TransportError", "TimeoutError",
                         "TimeoutException", "OfflineModeIsEnabled", "LocalEntryNotFoundError"})


def _may_pass(error: Exception) -> bool:
    """Whether the same may succeed a little later: a broken connection, a busy server; not a wrong name."""
    names = {base.__name__ for link in _chain(error) for base in type(link).__mro__}
    if "OfflineModeIsEnabled" in names or any("OfflineMode" in str(link) for link in _chain(error)):
        return False    # `datasets` keeps only the name of that one
    statuses = {getattr(getattr(link, "response", None), "status_code", None) for link in _chain(error)}
    return _is_offline(error) or bool(statuses & {408, 429, 500, 502, 503, 504})
