"""metrics.jsonl to trackio (huggingface.co/docs/trackio), a tracker whose dashboard runs on this machine.

    pip install "tryplicity[trackio]"
    TRYPLICITY_TRACKIO=1 tryplicity train tiny --hw cpu --run runs/first --minutes 2
    trackio show                                                # no network needed

Off unless TRYPLICITY_TRACKIO is set: 1, or the name of a project. Its own variables hold as ever (TRACKIO_DIR, where it
keeps what it was told; TRACKIO_SPACE_ID, ...). Names are those of TensorBoard's scalars. A resumed run goes on as the
same one.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tryplicity import UserError
from tryplicity_plugins.logging.numbers import config, numbers, project

VARIABLE = "TRYPLICITY_TRACKIO"


def wanted() -> bool:
    """Whether it was asked for; imports nothing."""
    return project(VARIABLE) is not None


class Tracker:
    """Writes the metrics of one run. trackio is imported and begun at the first step."""

    name = "trackio"

    def __init__(self, folder: Path, spec: Any) -> None:
        self.folder, self.spec, self._run = folder, spec, None

    def write(self, step: int, metrics: Mapping[str, Any], keep: bool = False) -> None:
        if self._run is None:
            self._run = self._begun()
        if said := numbers(step, metrics):
            self._run.log(said, step=step)

    def _begun(self) -> Any:
        try:
            import trackio
        except ImportError:
            raise UserError('it is not installed: pip install "tryplicity[trackio]"') from None
        with contextlib.redirect_stdout(sys.stderr):
            return trackio.init(project=project(VARIABLE), name=self.folder.name, resume="allow", embed=False,
                                config=config(self.spec), auto_log_gpu=False, auto_log_cpu=False)

    def flush(self) -> None:
        """trackio's own thread writes as it comes."""

    def close(self) -> None:
        if self._run is not None:
            import trackio

            with contextlib.redirect_stdout(sys.stderr):
                trackio.finish()  # the run's own leaves it to be finished again when the process ends
