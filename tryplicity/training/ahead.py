"""Rows that the host makes while the device is at work on those before them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from tryplicity.errors import UserError


class Ahead:
    """What a function gives for these arguments, made before it is asked for if they were foreseen. The function
    depends on them alone and changes nothing, so that a wrong guess costs its time and no more."""

    def __init__(self, make: Callable[..., Any]) -> None:
        self.make = make
        self._made: tuple[tuple, Any] | None = None

    def foresee(self, *asked: Any) -> None:
        """They will probably be asked for next. What is wrong with them is for the one to hear who then asks."""
        self._made = None
        with suppress(UserError):
            self._made = asked, self.make(*asked)

    def __call__(self, *asked: Any) -> Any:
        made, self._made = self._made, None
        return made[1] if made is not None and made[0] == asked else self.make(*asked)
