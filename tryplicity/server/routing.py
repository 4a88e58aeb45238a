"""How routes are added: each under a name of its own, its body unread until the request may be answered."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from sanic import HTTPResponse, Request, Sanic


class ReadBody(Protocol):
    """The JSON object of a request's body. empty: no body counts as {}. Raises ApiError."""

    async def __call__(self, request: Request, empty: bool = False) -> dict[str, Any]: ...


def add(app: Sanic, method: str, path: str, handler: Callable[..., Awaitable[HTTPResponse | None]]) -> None:
    name = "".join(c if c.isalnum() else "_" for c in f"{method}{path}")
    # ignore_body: Sanic would read it before any check
    app.add_route(handler, path, methods=[method], name=name, ignore_body=True)
