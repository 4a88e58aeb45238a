"""What `tryplicity serve` can be told. Loads no torch."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from tryplicity.errors import UserError


@dataclass(frozen=True)
class Options:
    """Where the server listens, whom it lets in, and how much one client may ask for.

    Raises UserError for a wide address without a key (unless `allow_public`), and for a malformed origin.
    """

    host: str = "127.0.0.1"
    port: int = 5000
    api_key: str | None = None
    allow_public: bool = False          # bind wider than loopback without a key
    cors: tuple[str, ...] = ()          # origins of other pages that may call, as https://example.org
    hosts: tuple[str, ...] = ()         # names, beside localhost and IP addresses, under which it may be reached
    body_bytes: int = 1 << 20
    import_bytes: int = 64 << 20        # of POST /api/conversations/import
    max_tokens: int = 2048              # most that one request may ask to be written
    choices: int = 128                  # n, times the prompts of one request
    messages: int = 2000                # in one request
    schema_bytes: int = 64 << 10
    active: int = 256                   # requests for text or passages under way at once, waiting ones included
    searches: int = 4                   # at once
    waiting_searches: int = 32
    backlog: int = 1024                 # pieces of text a client may fall behind before it is cut off
    heartbeat: float = 10.0             # seconds without a word after which a stream says that it lives
    body_seconds: float = 30.0          # for a body to arrive
    stall_seconds: float = 60.0         # for a client to take what was sent
    grace_seconds: float = 30.0         # for running requests to end after SIGTERM

    def __post_init__(self) -> None:
        if self.api_key is not None and not self.api_key.strip():
            raise UserError("the API key is empty, and an empty key is no key; give one, or leave out --api-key and "
                            "unset TRYPLICITY_API_KEY")
        if self.api_key is not None and (not self.api_key.isprintable() or self.api_key != self.api_key.strip()):
            raise UserError("the API key has characters that cannot be seen (a space or a line's end around it, a "
                            "zero-width one); give one without them")
        if not self.loopback and self.api_key is None and not self.allow_public:
            raise UserError(f"--host {self.host}: anyone who reaches this machine could use the model and read the "
                            "conversations; set --api-key, or say --allow-public")
        for origin in self.cors:
            if origin.lower() == "null":
                raise UserError("--cors null: any sandboxed page of the web has this origin; open the page over http "
                                "and name that, as http://localhost:8000")
            if not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.\-]*://[A-Za-z0-9.\-\[\]:_]+", origin):
                raise UserError(f"--cors {origin}: an origin is a scheme and a host, as https://example.org, "
                                "app://obsidian.md or chrome-extension://ID; name each one")

    @property
    def loopback(self) -> bool:
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return False
