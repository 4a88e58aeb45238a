"""One training of the ablation table: its key, its folder and its result. Loads no torch."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tryplicity.ablation.modules import Comparison, Variant
from tryplicity.files import write_text
from tryplicity.hardware import Hardware
from tryplicity.run import Run

NEVER = 10**9  # steps between two validations while a cell trains
CHECKPOINT_EVERY = 50  # steps, at most: what a killed cell loses

#: of the profile, what decides how a step computes
HARDWARE_KEYS = ("device", "count", "precision", "batch", "accumulation")


@dataclass(frozen=True)
class Setting:
    """What all cells of one table have in common."""

    tokens: int
    rows: int  # held-out rows scored; 0: all
    data: str  # the source, as --data says it
    data_identity: str
    hardware: Hardware
    plugin_files: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cell:
    """A spec, a seed and the rest of what decides how a training comes out."""

    label: str
    seed: int
    spec: dict[str, Any] = field(repr=False)  # YAML data, with the seed in it
    setting: Setting = field(repr=False)

    @property
    def key(self) -> str:
        """The same for the same training, whatever it is called and wherever it stands."""
        setting = self.setting
        what = {"spec": {k: v for k, v in self.spec.items() if k != "name"}, "tokens": setting.tokens,
                "rows": setting.rows, "data": setting.data_identity,
                "hardware": {k: v for k, v in asdict(setting.hardware).items() if k in HARDWARE_KEYS}}
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()

    def folder(self, out: Path) -> Path:
        """Where the cell is or will be: an equal one of another label is found."""
        name = re.sub(r"[^\w.-]", "_", self.label)
        there = sorted((out / "cells").glob(f"*-{self.key[:8]}"))
        return there[0] if there else out / "cells" / f"{name}-seed{self.seed}-{self.key[:8]}"

    def create(self, out: Path, build: dict[str, Any], tokenizer: str) -> Path:
        """Make its run folder, if there is none, ready to be trained in."""
        from tryplicity.spec import dump_yaml

        folder, setting = self.folder(out), self.setting
        write_text(folder / "cell.json", json.dumps({
            "key": self.key, "label": self.label, "seed": self.seed, "tokens": setting.tokens, "rows": setting.rows,
            "data": setting.data, "data_identity": setting.data_identity,
            "plugin_files": [str(Path(file).resolve()) for file in setting.plugin_files]}, indent=1))
        if not Run(folder).exists():
            Run(folder).create(spec=dump_yaml(self.spec), hardware=dump_yaml(asdict(setting.hardware)), build=build,
                               tokenizer=tokenizer, data={"source": setting.data, "fingerprint": setting.data_identity})
        return folder


def cell(variant: Variant, seed: int, setting: Setting) -> Cell:
    """A variant's training from one seed: no validation on the way, checkpoints often enough."""
    data = copy.deepcopy(variant.data)
    training = data.setdefault("training", {})
    spec = variant.spec.training
    training.update(seed=spec.seed + seed, validate_every=NEVER,
                    checkpoint_every=min(spec.checkpoint_every, CHECKPOINT_EVERY))
    return Cell(variant.label, seed, data, setting)


def table(rows: list[Comparison], seeds: int, setting: Setting) -> list[Cell]:
    """Every cell once, seed by seed, so that what is finished early is a table too."""
    cells: dict[str, Cell] = {}
    for seed in range(seeds):
        for row in rows:
            for variant in (row.with_it, row.without_it):
                one = cell(variant, seed, setting)
                cells.setdefault(one.key, one)
    return list(cells.values())


def result(folder: Path) -> dict[str, Any] | None:
    """A finished cell's result.json; None when it is not finished."""
    try:
        return json.loads((folder / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
