"""Access to Consul: its address, its TLS, and our token."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from k8s_consul_registrar.rotating import Derived, token_file
from k8s_consul_registrar.tls import Trust

TOKEN_FILE = "CONSUL_HTTP_TOKEN_FILE"  # noqa: S105 - the name of the setting


@dataclass(frozen=True, slots=True)
class ConsulAddress:
    """The address of Consul: `url` (scheme, host, port, path prefix), or a Unix socket's path."""

    url: str
    socket: str = ""

    def __str__(self) -> str:
        return f"unix://{self.socket}" if self.socket else self.url


@dataclass(frozen=True, slots=True)
class ConsulAccess:
    """Everything a connection to Consul needs; `namespace` and `partition` are Consul Enterprise's.

    An https address needs `tls`.
    """

    address: ConsulAddress
    token: str = field(default="", repr=False)
    token_file: str = ""
    tls: Derived[Trust] | None = field(default=None, repr=False)
    tls_server_name: str = ""
    namespace: str = ""
    partition: str = ""


class TokenSource(Protocol):
    """Our ACL token, as each request asks for it."""

    @property
    def version(self) -> int:
        """The number of times that the token was seen to change."""

    async def token(self) -> str:
        """Return the token, empty for none; raises an `AccessError` or a `ConsulError` if it cannot be had."""

    def is_unknown(self, token: str) -> bool:
        """Note that Consul does not know a token; return True if another attempt is worthwhile."""


class ConsulTokenFile:
    """An ACL token in a file, which is read again when the file changes."""

    def __init__(self, path: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._file = token_file(Path(path), TOKEN_FILE, is_lazy=True, clock=clock)
        self._token = ""
        self.version = 0  # how many times the token was seen to change

    def current(self) -> str:
        """Return the token; raises AccessError while the file never held one."""
        token = self._file.current()
        if token != self._token:
            self.version += bool(self._token)
            self._token = token
        return token

    async def token(self) -> str:
        """Return what `current` does."""
        return self.current()

    def is_unknown(self, token: str) -> bool:  # noqa: ARG002 - the file has no other one before it changes
        """Return False."""
        return False
