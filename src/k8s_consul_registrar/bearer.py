"""Who may ask: a bearer token held in a file, re-read when the file changes."""

import hmac
from pathlib import Path

from k8s_consul_registrar.errors import AccessError
from k8s_consul_registrar.telemetry import get_logger

# Each is compared with at every request.
MOST_TOKENS = 16

_log = get_logger(__name__)


class BearerFile:
    """The token callers must send; a Secret's volume replaces the file, `refresh` notices.

    Of several tokens, one a line, each is good: so one is replaced without a moment in which callers that
    still have the old one, or have the new one already, are turned away.
    Once read, a token stays valid until another can be read: a file caught half-way through its replacement
    must neither open the port nor fail every scrape. `problem` is why the file as it is now cannot be used.
    """

    def __init__(self, path: Path, setting: str) -> None:
        """Read the file; raises AccessError, naming `setting`, where it cannot be read or holds no token."""
        self._path = path
        self._setting = setting
        self._seen: tuple[int, int, int] | None = None
        self._expected: tuple[bytes, ...] = ()
        self.problem = ""
        self._load()

    def accepts(self, authorization: bytes | None) -> bool:
        """Say whether an Authorization field holds the token; takes the same time wherever it differs."""
        if authorization is None:
            return False
        scheme, _, credentials = authorization.partition(b" ")
        shown = credentials.strip(b" \t")
        is_known = False
        for token in self._expected:
            is_known |= hmac.compare_digest(shown, token)
        return scheme.lower() == b"bearer" and is_known

    def refresh(self) -> None:
        """Read the file again where it changed; a problem is logged when it begins."""
        problem = ""
        try:
            self._load()
        except AccessError as error:
            problem = str(error)
            if problem != self.problem:
                _log.warning("the bearer token for callers stays as it was", problem=problem)
        self.problem = problem

    def _load(self) -> None:
        try:
            status = self._path.stat()
            seen = (status.st_ino, status.st_mtime_ns, status.st_size)
            if seen == self._seen:
                return
            lines = self._path.read_bytes().splitlines()
        except OSError as error:
            raise AccessError(f"{self._setting} {self._path} cannot be read: {error.strerror}") from None
        self._seen = seen
        tokens = tuple(token for line in lines if (token := line.strip()))
        if not tokens or any(byte < 0x21 or byte > 0x7E for token in tokens for byte in token):
            raise AccessError(f"{self._setting} {self._path} holds no token")
        if len(tokens) > MOST_TOKENS:
            raise AccessError(f"{self._setting} {self._path} holds more than {MOST_TOKENS} tokens")
        self._expected = tokens
