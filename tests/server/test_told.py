"""What a client is told of each kind of exception, and when it may come again."""

import asyncio
import logging
import sqlite3
from types import SimpleNamespace

import pytest
from sanic.exceptions import MethodNotAllowed, NotFound, PayloadTooLarge, RequestTimeout, ServiceUnavailable

from tryplicity.errors import UserError
from tryplicity.server import errors
from tryplicity.server.conversations import Changed, Unknown
from tryplicity.server.errors import ApiError, as_api_error
from tryplicity.server.limits import Gate
from tryplicity.server.streams import EventStream


def sqlite_error(code):
    error = sqlite3.OperationalError("said")
    error.sqlite_errorcode = code
    return error


@pytest.mark.parametrize("exception, status, code, kind, headers", [
    (errors.wrong("m"), 400, None, "invalid_request_error", {}),
    (errors.outside("m"), 422, "out_of_range", "invalid_request_error", {}),
    (UserError("m"), 400, None, "invalid_request_error", {}),
    (errors.no_model(), 503, "no_model", "server_error", {"x-should-retry": "false"}),
    (errors.loading(), 503, "model_loading", "server_error", {"Retry-After": "2"}),
    (errors.draining(), 503, "shutting_down", "server_error", {"Retry-After": "10", "Connection": "close"}),
    (errors.busy(7), 429, "rate_limit_exceeded", "rate_limit_error", {"Retry-After": "7"}),
    (asyncio.CancelledError(), 499, "client_closed", "invalid_request_error", {}),
    (Changed("x"), 409, "conversation_changed", "invalid_request_error", {"x-should-retry": "false"}),
    (Unknown("x"), 404, "not_found", "not_found_error", {}),
    (ApiError(401, "m"), 401, None, "authentication_error", {}),
    (ApiError(403, "m"), 403, None, "permission_error", {}),
    (ApiError(504, "m"), 504, None, "server_error", {}),
    (NotFound("secret"), 404, "not_found", "not_found_error", {}),
    (MethodNotAllowed("secret", "PUT", ["GET"]), 405, "method_not_allowed", "invalid_request_error", {"Allow": "GET"}),
    (PayloadTooLarge("secret"), 413, "body_too_large", "invalid_request_error", {}),
    (RequestTimeout("secret"), 408, "timeout", "invalid_request_error", {}),
    (ServiceUnavailable("secret"), 503, "timeout", "server_error", {}),
    (sqlite_error(sqlite3.SQLITE_BUSY), 503, "database_locked", "server_error", {"Retry-After": "5"}),
    (sqlite_error(sqlite3.SQLITE_LOCKED | 1 << 8), 503, "database_locked", "server_error", {"Retry-After": "5"}),
    (sqlite_error(sqlite3.SQLITE_FULL), 507, "database_full", "server_error", {"x-should-retry": "false"}),
    (sqlite_error(sqlite3.SQLITE_CORRUPT), 503, "database_unusable", "server_error", {"x-should-retry": "false"}),
    (sqlite_error(sqlite3.SQLITE_MISUSE), 500, "internal_error", "server_error", {}),
    (ValueError("secret"), 500, "internal_error", "server_error", {})])
def test_what_a_client_is_told_of_each_exception(exception, status, code, kind, headers):
    told = as_api_error(exception)
    assert (told.status, told.code, told.type, told.headers) == (status, code, kind, headers)
    assert "secret" not in told.message
    assert told.as_dict() == {"error": {"message": told.message, "type": kind, "param": None, "code": code}}


def test_addresses_and_methods_that_are_not_there_have_messages_of_their_own():
    said = [as_api_error(e).message for e in (NotFound(), MethodNotAllowed("m", "PUT", ["GET"]), PayloadTooLarge(),
                                             RequestTimeout())]
    assert len(set(said)) == 4
    for word, message in zip(("address", "method", "too large", "well formed"), said, strict=True):
        assert word in message


def test_a_gate_has_the_places_it_was_given_and_frees_them():
    gate = Gate(2)
    assert gate.retry_after() == 1      # while nothing is known
    with gate.enter(), gate.enter():
        assert gate.taken == 2
        with pytest.raises(ApiError) as told, gate.enter():
            pass
        assert told.value.status == 429
    assert gate.taken == 0
    with pytest.raises(ValueError), gate.enter():
        raise ValueError
    assert gate.taken == 0


@pytest.mark.parametrize("mean, seconds", [(0.01, 1), (1.4, 1), (1.6, 2), (59.4, 59), (60.6, 60), (1e6, 60)])
def test_a_gate_says_when_to_come_again(mean, seconds):
    gate = Gate(0)
    gate.mean_seconds = mean
    with pytest.raises(ApiError) as told, gate.enter():
        pass
    assert told.value.headers == {"Retry-After": str(seconds)} and f"in {seconds} s" in told.value.message


@pytest.mark.parametrize("exception, status, logged", [
    (ValueError("secret"), 500, True), (errors.busy(3), 429, False), (UserError("yours"), 400, False)])
def test_within_a_stream_the_log_hears_of_what_nobody_foresaw_and_of_that_alone(caplog, exception, status, logged):
    stream = EventStream(SimpleNamespace(path="/v1/x"), None)
    with caplog.at_level(logging.ERROR, "tryplicity.server"):
        assert stream.told(exception).status == status
    assert ("secret" in caplog.text) == logged == ("/v1/x" in caplog.text)
