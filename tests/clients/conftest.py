"""The server of tests/server, for programs that are not ours."""

from tests.server.conftest import chat_run, server, started  # noqa: F401
