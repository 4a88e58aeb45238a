"""metrics.jsonl to Weights & Biases (docs.wandb.ai).

    pip install "tryplicity[wandb]"
    TRYPLICITY_WANDB=1 tryplicity train tiny --hw cpu --run runs/first --minutes 2
    WANDB_MODE=offline TRYPLICITY_WANDB=my-project tryplicity train ...     # no network; `wandb sync` sends it later

Off unless TRYPLICITY_WANDB is set: 1, or the name of a project. Its own variables hold as ever (WANDB_MODE,
WANDB_API_KEY, WANDB_ENTITY, ...). Files lie in RUN/wandb. Names are those of TensorBoard's scalars. A resumed run goes
on as the same one; steps that are trained again stand there once, as first written.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tryplicity import UserError
from tryplicity_plugins.logging.numbers import config, numbers, project

VARIABLE = "TRYPLICITY_WANDB"


def wanted() -> bool:
    """Whether it was asked for; imports nothing."""
    return project(VARIABLE) is not None


class Tracker:
    """Writes the metrics of one run. wandb is imported and begun at the first step."""

    name = "wandb"

    def __init__(self, folder: Path, spec: Any) -> None:
        self.folder, self.spec, self._run = folder, spec, None

    def write(self, step: int, metrics: Mapping[str, Any], keep: bool = False) -> None:
        if self._run is None:
            self._run = self._begun()
        if said := numbers(step, metrics):
            self._run.log(said, step=step)

    def _begun(self) -> Any:
        try:
            import wandb
        except ImportError:
            raise UserError('it is not installed: pip install "tryplicity[wandb]"') from None
        # without a key wandb would ask for it on the terminal, and the training would wait
        online = os.environ.get("WANDB_MODE", "online") == "online"
        if online and not wandb.login(prompt=False, verify=False):
            raise UserError("no API key: `wandb login`, or WANDB_MODE=offline")
        identity = self.folder / "wandb" / "tryplicity-run-id"
        if not identity.is_file():
            identity.parent.mkdir(parents=True, exist_ok=True)
            identity.write_text(secrets.token_hex(4), encoding="utf-8")
        return wandb.init(project=project(VARIABLE), name=self.folder.name, dir=str(self.folder), resume="allow",
                          id=identity.read_text(encoding="utf-8").strip(), config=config(self.spec),
                          settings=wandb.Settings(silent=True, console="off"))

    def flush(self) -> None:
        """wandb's own process writes as it comes."""

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
