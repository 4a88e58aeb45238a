"""The kit asks without a network: what a component would fetch is not waited for, and libraries do not try again for
minutes."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tryplicity.errors import Unreachable

HERE = {None, "", "localhost", "127.0.0.1", "::1", "0.0.0.0", "::"}


@contextmanager
def without_network() -> Iterator[None]:
    """Inside, this process reaches itself and its neighbours on this machine; asking for any other host raises
    Unreachable, which is no OSError: those are what libraries wait and try again after."""
    look_up, connect = socket.getaddrinfo, socket.socket.connect

    def refuse(host: Any) -> None:
        if (host.decode() if isinstance(host, bytes) else host) not in HERE:
            raise Unreachable(f"it asks {host}, and the kit asks without a network")

    def getaddrinfo(host: Any, *more: Any, **options: Any) -> Any:
        refuse(host)
        return look_up(host, *more, **options)

    def connected(self: socket.socket, address: Any) -> None:
        if isinstance(address, tuple):  # not a path on this machine
            refuse(address[0])
        connect(self, address)

    socket.getaddrinfo, socket.socket.connect = getaddrinfo, connected
    try:
        yield
    finally:
        socket.getaddrinfo, socket.socket.connect = look_up, connect
