"""A corpus that `tryplicity data` made."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tryplicity import Document, LeftOut, Source, UserError, read_shard


class Corpus(Source):
    """The filtered documents of a corpus folder, in its order, with the domains and ids they were downloaded with."""

    name = "corpus"

    @dataclass(frozen=True)
    class Config:
        path: str
        """the folder that `tryplicity data download` and `filter` filled"""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.read_share = 0.0

    @property
    def cache(self) -> Path | None:
        """The folder that `tryplicity data prepare` keeps the tokens in, if it was there."""
        prepared = Path(self.config.path).expanduser() / "prepared"
        return prepared if prepared.is_dir() else None

    @property
    def _folder(self) -> Path:
        return Path(self.config.path).expanduser() / "filtered"

    def _manifest(self) -> dict:
        path = self._folder / "manifest.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except OSError:
            raise UserError(f"{self.config.path}: no corpus that is filtered to the end ({path} is missing); run "
                            f"tryplicity data filter {self.config.path}") from None
        except ValueError as error:
            raise UserError(f"{path}: damaged ({error}); remove it and run tryplicity data filter "
                            f"{self.config.path}") from None

    def fingerprint(self) -> str:
        """From the hashes of its files."""
        described = json.dumps([self.name, 1, self._manifest()["files"]], sort_keys=True)
        return hashlib.sha256(described.encode()).hexdigest()

    def documents(self) -> Iterator[Document]:
        """Raises UserError for a folder that is no filtered corpus, and for a damaged shard."""
        self.left_out = LeftOut("items")
        files = sorted(self._manifest()["files"])
        for number, name in enumerate(files):
            for document, _ in read_shard(self._folder / name):
                yield document
            self.read_share = (number + 1) / len(files)
