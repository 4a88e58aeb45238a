"""The run folder: what a training leaves, and what generating and resuming read. Loads no torch.

    spec.yaml  hardware.yaml  build.json  tokenizer.json  data.json  plugins.json  metrics.jsonl
    checkpoints/step-N/  model.safetensors
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tryplicity.errors import UserError
from tryplicity.files import write_text


@dataclass(frozen=True)
class Run:
    """A run folder."""

    folder: Path

    spec = property(lambda self: self.folder / "spec.yaml")
    hardware = property(lambda self: self.folder / "hardware.yaml")
    build = property(lambda self: self.folder / "build.json")
    tokenizer = property(lambda self: self.folder / "tokenizer.json")
    #: beside the tokenizer of a published model: what its special tokens are, and how it writes conversations
    tokenizer_config = property(lambda self: self.folder / "tokenizer_config.json")
    data = property(lambda self: self.folder / "data.json")
    plugins = property(lambda self: self.folder / "plugins.json")
    metrics = property(lambda self: self.folder / "metrics.jsonl")
    checkpoints = property(lambda self: self.folder / "checkpoints")
    weights = property(lambda self: self.folder / "model.safetensors")
    origin = property(lambda self: self.folder / "origin.json")  # of an imported model: its own config
    lock = property(lambda self: self.folder / "lock")  # while a training is at work

    def exists(self) -> bool:
        return self.spec.is_file()

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """An existing run. Raises UserError when the folder is none."""
        run = cls(Path(folder))
        if not run.folder.exists():
            raise UserError(f"{folder}: there is no such run folder; `tryplicity train ... --run {folder}` makes one")
        if not run.exists():
            raise UserError(f"{folder}: not a run folder (it has no spec.yaml)")
        return run

    def create(self, *, spec: str, hardware: str, build: dict[str, Any], tokenizer: str, data: dict[str, Any],
               tokenizer_config: str | None = None) -> None:
        """Write what a run starts with; spec.yaml, which marks the folder as a run, last."""
        try:
            write_text(self.hardware, hardware)
            write_text(self.build, json.dumps(build, indent=1))
            if tokenizer_config is not None:
                write_text(self.tokenizer_config, tokenizer_config)
            write_text(self.tokenizer, tokenizer)
            write_text(self.data, json.dumps(data, indent=1))
            write_text(self.spec, spec)
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be written: {error.strerror}") from None

    def remember(self, files: Iterable[str]) -> None:
        """Add plugin files to those the run was made with, as they are now."""
        known = {str(path): digest for path, digest in self.plugin_files()}
        now = {str(Path(file).resolve()): file_digest(Path(file)) for file in files if Path(file).is_file()}
        if now:
            said = [{"file": file, "sha256": digest} for file, digest in (known | now).items()]
            write_text(self.plugins, json.dumps(said, indent=1))

    def plugin_files(self) -> list[tuple[Path, str]]:
        """The plugin files the run was made with, and the SHA-256 of each as it was then. Paths on this machine, never
        in the folder itself: a folder that somebody sent must not bring code along."""
        try:
            said = json.loads(self.plugins.read_text(encoding="utf-8"))
            files = [(Path(one["file"]), str(one["sha256"])) for one in said]
        except OSError:
            return []
        except (ValueError, TypeError, KeyError, RecursionError):
            raise UserError(f"{self.plugins}: not a list of plugin files; remove it, and use --plugin") from None
        folder = self.folder.resolve()
        return [(path, digest) for path, digest in files
                if path.is_absolute() and folder not in path.resolve().parents]


def file_digest(path: Path) -> str:
    """Raises OSError when the file cannot be read."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
