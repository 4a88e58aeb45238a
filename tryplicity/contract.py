"""Where `check_layer` was; it is `tryplicity.testing.check_layer` now."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from tryplicity.components import Layer
from tryplicity.testing import check_layer as moved


def check_layer(build: Callable[[], Layer], hidden_size: int) -> list[str]:
    """As `tryplicity.testing.check_layer`. The old name goes with the next release."""
    warnings.warn("tryplicity.contract.check_layer is tryplicity.testing.check_layer; the old name goes with the next "
                  "release", DeprecationWarning, stacklevel=2)
    return moved(build, hidden_size)
