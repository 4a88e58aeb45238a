"""The run folder: what a training leaves, and what generating and resuming read. Loads no torch.

    spec.yaml  hardware.yaml  build.json  tokenizer.json  data.json  metrics.jsonl  checkpoints/step-N/
    model.safetensors
"""

from __future__ import annotations

import json
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
    data = property(lambda self: self.folder / "data.json")
    metrics = property(lambda self: self.folder / "metrics.jsonl")
    checkpoints = property(lambda self: self.folder / "checkpoints")
    weights = property(lambda self: self.folder / "model.safetensors")
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

    def create(self, *, spec: str, hardware: str, build: dict[str, Any], tokenizer: str, data: dict[str, Any]) -> None:
        """Write what a run starts with; spec.yaml, which marks the folder as a run, last."""
        try:
            write_text(self.hardware, hardware)
            write_text(self.build, json.dumps(build, indent=1))
            write_text(self.tokenizer, tokenizer)
            write_text(self.data, json.dumps(data, indent=1))
            write_text(self.spec, spec)
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be written: {error.strerror}") from None
