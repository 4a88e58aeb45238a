"""Errors as OpenAI's API writes them: {"error": {"message", "type", "param", "code"}}.

    400  the body is no JSON, or a value is missing, of the wrong type, unknown or not supported here
    422  of the right type, but outside what is allowed here (temperature 7, more tokens than the limit)
    401 403 404 405 408 409 413 429 503 507  as in HTTP; 429 and 503 say when to try again (Retry-After); 507 where
         there is no room to keep what was said

OpenAI's clients raise BadRequestError for 400, UnprocessableEntityError for 422, and try 408, 409, 429 and 503 again
by themselves unless the answer says `x-should-retry: false`
(https://platform.openai.com/docs/guides/error-codes).
"""

from __future__ import annotations

import sqlite3
from asyncio import CancelledError
from collections.abc import Mapping
from typing import Any

from sanic.exceptions import SanicException

from tryplicity.errors import UserError
from tryplicity.server.conversations import Changed, Unknown

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error",
          500: "server_error", 503: "server_error", 504: "server_error", 507: "server_error"}


class ApiError(Exception):
    """What a client is told. `headers` go with the answer."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None,
                 type: str | None = None, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.type = type or _TYPES.get(status, "invalid_request_error")
        self.headers = dict(headers or {})

    def as_dict(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def wrong(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400: malformed, unknown or not supported."""
    return ApiError(400, message, param=param, code=code)


def outside(message: str, param: str | None = None, code: str | None = "out_of_range") -> ApiError:
    """422: understood, but outside what is allowed."""
    return ApiError(422, message, param=param, code=code)


def no_model() -> ApiError:
    return ApiError(503, "no model is loaded; start the server with one: tryplicity serve RUN", code="no_model",
                    headers={"x-should-retry": "false"})


def loading() -> ApiError:
    return ApiError(503, "the model is still being loaded", code="model_loading", headers={"Retry-After": "2"})


def draining() -> ApiError:
    return ApiError(503, "the server is shutting down", code="shutting_down",
                    headers={"Retry-After": "10", "Connection": "close"})


def busy(seconds: int, message: str = "every slot is taken and the queue is full") -> ApiError:
    return ApiError(429, f"{message}; try again in {seconds} s", code="rate_limit_exceeded",
                    headers={"Retry-After": str(seconds)})


def database(error: sqlite3.Error) -> ApiError | None:
    """What is told where the conversations' file cannot be read or written; None where the fault is ours
    (https://sqlite.org/rescode.html)."""
    code = getattr(error, "sqlite_errorcode", None)
    primary = None if code is None else code & 0xFF
    if primary in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return ApiError(503, "another process holds the conversations' file; try again", code="database_locked",
                        headers={"Retry-After": "5"})
    if primary in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):  # a quota or a limit of sizes comes as the second
        return ApiError(507, "the conversations cannot be kept: the disk is full, or failing", code="database_full",
                        headers={"x-should-retry": "false"})
    if primary in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM, sqlite3.SQLITE_CORRUPT,
                   sqlite3.SQLITE_NOTADB):
        return ApiError(503, f"the conversations' file cannot be used: {error}", code="database_unusable",
                        headers={"x-should-retry": "false"})
    return None


def changed() -> ApiError:
    return ApiError(409, "this conversation was gone on with elsewhere, and nothing was changed; read it again, then "
                         "decide", code="conversation_changed", headers={"x-should-retry": "false"})


def internal() -> ApiError:
    return ApiError(500, "the server made a mistake; its log says more", code="internal_error")


def as_api_error(exception: BaseException) -> ApiError:
    """What a client is told of any exception: 500, and no more, for one that nobody foresaw."""
    if isinstance(exception, ApiError):
        return exception
    if isinstance(exception, CancelledError):
        return ApiError(499, "the client has gone", code="client_closed")
    if isinstance(exception, UserError):
        return wrong(str(exception))
    if isinstance(exception, Changed):
        return changed()
    if isinstance(exception, Unknown):
        return ApiError(404, "there is no such conversation or message", code="not_found")
    if isinstance(exception, sqlite3.Error) and (told := database(exception)):
        return told
    if isinstance(exception, SanicException) and exception.status_code < 500:
        status = exception.status_code
        text = {404: "there is nothing at this address", 405: "this address does not take this method",
                413: "the request is too large"}.get(status, "the request is not well formed")
        return ApiError(status, text, code={404: "not_found", 405: "method_not_allowed", 413: "body_too_large",
                                            408: "timeout"}.get(status, "bad_request"),
                        headers={k: v for k, v in (exception.headers or {}).items() if k.lower() == "allow"})
    if isinstance(exception, SanicException) and exception.status_code == 503:
        return ApiError(503, "the answer took too long", code="timeout")
    return internal()
