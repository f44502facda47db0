"""Bearer tokens that clients must send, in a file that is read again when it changes."""

import hmac
from dataclasses import dataclass, field
from pathlib import Path

from k8s_consul_registrar.errors import AccessError
from k8s_consul_registrar.rotating import Rotating, clean_token, read_file, refuse_truncated

# Each is compared with at every request.
MOST_TOKENS = 16


@dataclass(frozen=True, slots=True)
class _Tokens:
    """The tokens of a file, and its content."""

    accepted: tuple[str, ...] = field(default=(), repr=False)
    content: bytes = field(default=b"", repr=False, compare=False)


class BearerFile:
    """The tokens of a file, one a line, each of which is accepted.

    With two tokens one can be replaced without a moment in which clients that still send the old one, or
    send the new one already, are denied. A file caught half-way through its replacement neither opens the
    port nor fails every scrape: the last good tokens stay.
    """

    def __init__(self, path: Path, setting: str) -> None:
        """Read the file; raises AccessError, naming `setting`, if it cannot be read or holds no token."""
        self._path = path
        self._setting = setting
        self._last = _Tokens()
        self._tokens = Rotating(setting, [path], self._load)

    def accepts(self, authorization: bytes | None) -> bool:
        """Return whether an Authorization field holds a token; takes the same time wherever it differs."""
        if authorization is None:
            return False
        scheme, _, credentials = authorization.partition(b" ")
        shown = credentials.strip(b" \t")
        is_known = False
        for token in self._tokens.value.accepted:
            is_known |= hmac.compare_digest(shown, token.encode())
        return scheme.lower() == b"bearer" and is_known

    @property
    def content(self) -> bytes:
        """The file as it was when it could last be used."""
        return self._tokens.value.content

    def refresh(self) -> None:
        """Read the file again if it changed."""
        self._tokens.refresh()

    def _load(self) -> _Tokens:
        content = read_file(self._path, self._setting)
        origin = f"{self._setting} {self._path} holds no token"
        lines = [line for line in content.splitlines() if line.strip()]
        if not lines:
            raise AccessError(origin)
        if len(lines) > MOST_TOKENS:
            raise AccessError(f"{self._setting} {self._path} holds more than {MOST_TOKENS} tokens")
        tokens = tuple(clean_token(line, origin) for line in lines)
        for token in tokens:
            if token not in self._last.accepted:
                refuse_truncated(token, self._last.accepted, self._path, origin)
        self._last = _Tokens(tokens, content)
        return self._last
