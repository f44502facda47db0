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
    """Proof of our identity in one request; any part may be absent."""

    token: str = field(default="", repr=False)
    basic: str = field(default="", repr=False)
    pair: KeyPair | None = field(default=None, repr=False)

    def headers(self) -> Mapping[str, str]:
        """Return the headers to send."""
        if self.token:
            return {"Authorization": f"Bearer {self.token}"}
        return {"Authorization": f"Basic {self.basic}"} if self.basic else {}


class Credentials(Protocol):
    """Source of the identity of the next request."""

    async def identity(self) -> ClientIdentity:
        """Return the current identity; raises AccessError if there is none."""

    def rejected(self, identity: ClientIdentity) -> None:
        """Note that the server answered 401 to this identity: the next one should be fresh."""

    async def aclose(self) -> None:
        """End what runs to get an identity; a later `identity` begins again."""


class StoredCredentials:
    """An identity that is given, with a token or a certificate in files, each read again as it rotates."""

    def __init__(
        self,
        identity: ClientIdentity | None = None,
        *,
        token: Rotating[str] | None = None,
        pair: Rotating[KeyPair] | None = None,
    ) -> None:
        self._identity = identity or ClientIdentity()
        self._token = token
        self._pair = pair

    async def identity(self) -> ClientIdentity:
        """Return the identity; it is the same object while nothing of it changed."""
        now = self._identity
        token = now.token if self._token is None else self._token.current()
        pair = now.pair if self._pair is None else self._pair.current()
        if token != now.token or pair is not now.pair:
            self._identity = replace(now, token=token, pair=pair)
        return self._identity

    def rejected(self, identity: ClientIdentity) -> None:
        """Have the token's file read again by the next call."""
        if self._token is not None and identity is self._identity:
            self._token.expire()

    async def aclose(self) -> None:
        """Do nothing: nothing runs."""


def rotating_token(
    path: Path, setting: str, *, of: str = "kubeconfig tokenFile", clock: Callable[[], float] = time.monotonic
) -> Rotating[str]:
    """Return the token in a file, read again when it changes, and every minute.

    `of` names the setting in metrics, `setting` the file's origin in error texts; `clock` returns seconds.
    Raises AccessError if the file holds no token.
    """
    return token_file(path, setting, of=of, max_age=REREAD_SECONDS, clock=clock)


def basic_credentials(username: str, password: str) -> str:
    """Return the value of a Basic Authorization header (RFC 7617, UTF-8)."""
    return base64.b64encode(f"{username}:{password}".encode()).decode()
