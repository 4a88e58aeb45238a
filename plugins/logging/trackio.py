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
from typing import Any

from tryplicity import UserError
from tryplicity_plugins.logging.numbers import Tracker, config, project

VARIABLE = "TRYPLICITY_TRACKIO"


def wanted() -> bool:
    """Whether it was asked for; imports nothing."""
    return project(VARIABLE) is not None


class Trackio(Tracker):
    name = "trackio"

    def _begun(self) -> Any:
        try:
            import trackio
        except ImportError:
            raise UserError('it is not installed: pip install "tryplicity[trackio]"') from None
        with contextlib.redirect_stdout(sys.stderr):
            return trackio.init(project=project(VARIABLE), name=self.folder.name, resume="allow", embed=False,
                                config=config(self.spec), auto_log_gpu=False, auto_log_cpu=False)

    def close(self) -> None:
        if self._run is not None:
            import trackio

            with contextlib.redirect_stdout(sys.stderr):
                trackio.finish()  # the run's own leaves it to be finished again when the process ends
