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
from typing import Any

from tryplicity import UserError
from tryplicity_plugins.logging.numbers import Tracker, config, project

VARIABLE = "TRYPLICITY_WANDB"


def wanted() -> bool:
    """Whether it was asked for; imports nothing."""
    return project(VARIABLE) is not None


class WeightsAndBiases(Tracker):
    name = "wandb"

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

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
