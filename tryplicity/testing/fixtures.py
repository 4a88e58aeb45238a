"""What pytest finds by itself where Tryplicity is installed. Loads no torch until a test asks for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture
def conforms() -> Callable[..., None]:
    """Fails with a line for each promise that a component breaks: `conforms(Shift, share=0.3)`.

    Without options it is tried with each of its `trials`. plugins: files to load; ranks: on two ranks too.
    """

    def conforms(component: type, *, plugins: tuple[str, ...] = (), ranks: bool = False, **options: Any) -> None:
        from tryplicity.testing import check

        if broken := check(component, options or None, plugins=plugins, ranks=ranks):
            what = f"{component.family} {component.name} ({component.__module__}.{component.__qualname__})"
            pytest.fail("\n".join([f"{what} breaks {len(broken)} of its promises:", *broken]), pytrace=False)

    return conforms
