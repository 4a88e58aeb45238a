"""How much one request may bring, and how many may be under way: bodies, JSON, values, places."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from sanic.exceptions import PayloadTooLarge

from tryplicity.errors import did_you_mean
from tryplicity.server import wording
from tryplicity.server.errors import ApiError, busy, outside, wrong

if TYPE_CHECKING:
    from sanic import Request

#: bytes of a body that is too large which are still read, so that its sender gets to read the answer
LINGER = 16 << 20

#: what pydantic calls a value of the right type outside its range
_OUTSIDE = re.compile(r"(greater|less)_than|too_(long|short|big|small)|multiple_of|finite_number")

B = TypeVar("B", bound="Body")


class Body(BaseModel):
    """A request's body: every key known, every value of its type, nothing converted."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


async def read_body(request: Request, limit: int, seconds: float) -> bytes:
    """The body, once the request may be answered. Raises ApiError 413 and 408."""
    stream = request.stream
    stream.request_max_size = limit
    try:
        async with asyncio.timeout(seconds):
            if (stream.request_bytes or 0) > limit:
                if stream.expecting_continue:   # who asks first is told before sending
                    stream.expecting_continue = False
                    raise PayloadTooLarge("")
                stream.request_max_size = limit + LINGER
                async for _ in stream:
                    pass
                raise PayloadTooLarge("")
            await request.receive_body()
    except TimeoutError:
        stream.keep_alive = False
        raise ApiError(408, f"the body did not arrive within {seconds:g} s", code="timeout") from None
    except PayloadTooLarge:
        stream.keep_alive = False
        raise ApiError(413, f"the body is larger than {limit:,} bytes", code="body_too_large") from None
    return request.body


def read_json(body: bytes) -> dict[str, Any]:
    """A JSON object whose strings are all Unicode text. Raises ApiError 400."""
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_no_constant)
        json.dumps(value, ensure_ascii=False).encode("utf-8")   # half a surrogate pair is no character
    except UnicodeError:
        raise wrong("the body is not UTF-8 text", code="invalid_json") from None
    except RecursionError:
        raise wrong("the body is nested too deeply", code="invalid_json") from None
    except ValueError as error:
        raise wrong(f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise wrong("the body must be a JSON object", code="invalid_json")
    return value


def parse(model: type[B], body: Mapping[str, Any], unsupported: Mapping[str, tuple[Any, ...]] | None = None,
          idle: Collection[str] = (), why: Mapping[str, str] | None = None) -> B:
    """The body as `model`; null stands for a value left out. Raises ApiError 400 and 422 naming the parameter.

    unsupported: parameters that are known and cannot be had here, with the values that ask for nothing; why: what is
    said of them beyond that. idle: parameters that can be anything, since nothing here depends on them.
    """
    body = {key: value for key, value in body.items() if value is not None and key not in idle}
    for name, neutral in (unsupported or {}).items():
        if name in body and not any(body[name] == n and type(body[name]) is type(n) for n in neutral):
            reason = (why or {}).get(name, "leave it out")
            raise wrong(f"{name} is not supported by this server; {reason}", name, "unsupported_parameter")
        body.pop(name, None)
    try:
        return model.model_validate(body)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
    param = wording.place(problem) or None
    if problem["type"] == "extra_forbidden":
        name, within = str(problem["loc"][-1])[:80], problem["loc"][:-1]
        hint = "" if within else _hint(name, model)
        raise wrong(f"unknown parameter {name!r}{hint}", ".".join(map(str, (*within, name))), "unknown_parameter")
    kind = outside if _OUTSIDE.search(problem["type"]) else wrong
    message = f"{param or 'the body'}: {wording.said(problem)}"
    if kind is outside:
        raise outside(message, param)
    raise wrong(message, param, "missing_parameter" if problem["type"] == "missing" else "invalid_type")


def _hint(name: str, model: type[BaseModel]) -> str:
    hint = did_you_mean(name, model.model_fields)
    return hint if hint.startswith(" (did") else ""


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


class Gate:
    """Counts what is under way, and refuses what is more than `places`."""

    def __init__(self, places: int) -> None:
        self.places, self.taken = places, 0
        self.mean_seconds = 1.0     # of the latest ones, for Retry-After

    @contextmanager
    def enter(self) -> Iterator[None]:
        """Raises ApiError 429."""
        if self.taken >= self.places:
            raise busy(self.retry_after(), "too many requests are under way")
        self.taken += 1
        start = time.monotonic()
        try:
            yield
        finally:
            self.taken -= 1
            self.mean_seconds += 0.2 * (time.monotonic() - start - self.mean_seconds)

    def retry_after(self) -> int:
        """Seconds until a place is likely to be free."""
        return max(1, min(60, round(self.mean_seconds)))
