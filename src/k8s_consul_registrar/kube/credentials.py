"""Who we are to the API server: tokens, passwords and certificates, fixed or re-read as they rotate."""

import base64
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from k8s_consul_registrar.errors import AccessError
from k8s_consul_registrar.files import Followed
from k8s_consul_registrar.kube.tls import KeyPair

# client-go re-reads token files once a minute (transport/token_source.go).
REREAD_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Identity:
    """What proves who we are in one request; any part may be absent."""

    token: str = field(default="", repr=False)
    basic: str = field(default="", repr=False)
    pair: KeyPair | None = field(default=None, repr=False)

    def headers(self) -> Mapping[str, str]:
        """Return the headers to send."""
        if self.token:
            return {"Authorization": f"Bearer {self.token}"}
        return {"Authorization": f"Basic {self.basic}"} if self.basic else {}

    def showing(self, pair: KeyPair) -> "Identity":
        """Return this identity with a certificate; it is the same object where it had that one."""
        return self if pair is self.pair else replace(self, pair=pair)


class Credentials(Protocol):
    """Where the identity of the next request comes from."""

    async def identity(self) -> Identity:
        """Return the current identity; raises AccessError where there is none to be had."""
        ...

    def rejected(self, identity: Identity) -> None:
        """Hear that the server answered 401 to this identity: the next one should be fresh."""
        ...


class FixedCredentials:
    """An identity that never changes, but for a certificate in files that someone rotates."""

    def __init__(self, identity: Identity, pair: Followed[KeyPair] | None = None) -> None:
        self._identity = identity
        self._pair = pair

    async def identity(self) -> Identity:
        """Return the identity."""
        if self._pair is not None:
            self._identity = self._identity.showing(self._pair.current())
        return self._identity

    def rejected(self, identity: Identity) -> None:
        """Do nothing: there is no other."""


class TokenFile:
    """A bearer token in a file that someone rotates, read again every minute and after a 401.

    A file that cannot be read for a while leaves the last token in use, as in client-go. `setting` names the
    file's origin for error texts; `clock` returns seconds.
    """

    def __init__(
        self,
        path: Path,
        setting: str,
        *,
        pair: Followed[KeyPair] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path = path
        self._setting = setting
        self._pair = pair
        self._clock = clock
        self._identity: Identity | None = None
        self._stale_at = 0.0

    async def identity(self) -> Identity:
        """Return the identity with the file's token."""
        if self._identity is None or self._clock() >= self._stale_at:
            self._identity = self._read()
            self._stale_at = self._clock() + REREAD_SECONDS
        if self._pair is not None:
            self._identity = self._identity.showing(self._pair.current())
        return self._identity

    def rejected(self, identity: Identity) -> None:
        """Have the file read again by the next call."""
        if identity is self._identity:
            self._stale_at = 0.0

    def _read(self) -> Identity:
        try:
            token = clean_token(read_bytes(self._path, self._setting), f"{self._setting} {self._path}")
        except AccessError:
            if self._identity is None:
                raise
            return self._identity
        return Identity(token=token)


def read_bytes(path: Path, setting: str) -> bytes:
    """Return a file's content; raises AccessError that names the setting and the file."""
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "not a path"
        raise AccessError(f"{setting}: cannot read {path}: {why}") from None


def clean_token(content: bytes | str, setting: str) -> str:
    """Return a bearer token without surrounding white space.

    Raises AccessError, never with the token in it, where it is empty or not fit for a header.
    """
    text = content.decode("ascii", errors="replace") if isinstance(content, bytes) else content
    token = text.strip()
    if not token:
        raise AccessError(f"{setting}: the token is empty")
    if not token.isascii() or not token.isprintable() or " " in token:
        raise AccessError(f"{setting}: the token has characters that no token has")
    return token


def basic_credentials(username: str, password: str) -> str:
    """Return the value of a Basic Authorization header (RFC 7617, UTF-8)."""
    return base64.b64encode(f"{username}:{password}".encode()).decode()
