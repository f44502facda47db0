"""Credentials for the API server: tokens, passwords and certificates, fixed or read again as they rotate."""

import base64
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from k8s_consul_registrar.rotating import Rotating, token_file
from k8s_consul_registrar.tls import KeyPair

# client-go re-reads token files once a minute (transport/token_source.go).
REREAD_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class ClientIdentity:
    """What proves who we are in one request; any part may be absent."""

    token: str = field(default="", repr=False)
    basic: str = field(default="", repr=False)
    pair: KeyPair | None = field(default=None, repr=False)

    def headers(self) -> Mapping[str, str]:
        """Return the headers to send."""
        if self.token:
            return {"Authorization": f"Bearer {self.token}"}
        return {"Authorization": f"Basic {self.basic}"} if self.basic else {}

    def showing(self, pair: KeyPair) -> "ClientIdentity":
        """Return this identity with a certificate; it is the same object where it had that one."""
        return self if pair is self.pair else replace(self, pair=pair)


class Credentials(Protocol):
    """Source of the identity of the next request."""

    async def identity(self) -> ClientIdentity:
        """Return the current identity; raises AccessError if there is none."""
        ...

    def rejected(self, identity: ClientIdentity) -> None:
        """Note that the server answered 401 to this identity: the next one should be fresh."""
        ...

    async def aclose(self) -> None:
        """End what runs to get an identity; a later `identity` begins again."""
        ...


class FixedCredentials:
    """An identity that never changes, apart from a certificate in files that rotate."""

    def __init__(self, identity: ClientIdentity, pair: Rotating[KeyPair] | None = None) -> None:
        self._identity = identity
        self._pair = pair

    async def identity(self) -> ClientIdentity:
        """Return the identity."""
        if self._pair is not None:
            self._identity = self._identity.showing(self._pair.current())
        return self._identity

    def rejected(self, identity: ClientIdentity) -> None:
        """Do nothing: there is no other."""

    async def aclose(self) -> None:
        """Do nothing: nothing runs."""


class TokenFile:
    """A bearer token in a file that rotates, read again when it changes, every minute, and after a 401.

    `of` names the setting in metrics, `setting` the file's origin in error texts; `clock` returns seconds.
    """

    def __init__(
        self,
        path: Path,
        setting: str,
        *,
        of: str = "kubeconfig tokenFile",
        pair: Rotating[KeyPair] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Read the file; raises AccessError if it holds no token."""
        self._pair = pair
        self._identity = ClientIdentity()
        self._token = token_file(path, setting, of=of, max_age=REREAD_SECONDS, clock=clock)

    async def identity(self) -> ClientIdentity:
        """Return the identity with the file's token."""
        token = self._token.current()
        if token != self._identity.token:
            self._identity = replace(self._identity, token=token)
        if self._pair is not None:
            self._identity = self._identity.showing(self._pair.current())
        return self._identity

    def rejected(self, identity: ClientIdentity) -> None:
        """Have the file read again by the next call."""
        if identity is self._identity:
            self._token.expire()

    async def aclose(self) -> None:
        """Do nothing: nothing runs."""


def basic_credentials(username: str, password: str) -> str:
    """Return the value of a Basic Authorization header (RFC 7617, UTF-8)."""
    return base64.b64encode(f"{username}:{password}".encode()).decode()
