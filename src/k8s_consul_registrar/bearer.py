"""Who may ask: a bearer token held in a file, re-read when the file changes."""

import hmac
from pathlib import Path

from k8s_consul_registrar.errors import AccessError
from k8s_consul_registrar.telemetry import get_logger

_log = get_logger(__name__)


class BearerFile:
    """The token callers must send; a Secret's volume replaces the file, `refresh` notices.

    Once read, a token stays valid until another can be read: a file caught half-way through its replacement
    must neither open the port nor fail every scrape.
    """

    def __init__(self, path: Path, setting: str) -> None:
        """Read the file; raises AccessError, naming `setting`, where it cannot be read or holds no token."""
        self._path = path
        self._setting = setting
        self._seen: tuple[int, int, int] | None = None
        self._expected = b""
        self._problem = ""
        self._load()

    def accepts(self, authorization: bytes | None) -> bool:
        """Say whether an Authorization field holds the token; takes the same time wherever it differs."""
        if authorization is None:
            return False
        scheme, _, credentials = authorization.partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(credentials.strip(b" \t"), self._expected)

    def refresh(self) -> None:
        """Read the file again where it changed; a problem is logged when it begins."""
        problem = ""
        try:
            self._load()
        except AccessError as error:
            problem = str(error)
            if problem != self._problem:
                _log.warning("the bearer token for callers stays as it was", problem=problem)
        self._problem = problem

    def _load(self) -> None:
        try:
            status = self._path.stat()
            seen = (status.st_ino, status.st_mtime_ns, status.st_size)
            if seen == self._seen:
                return
            token = self._path.read_bytes().strip()
        except OSError as error:
            raise AccessError(f"{self._setting} {self._path} cannot be read: {error.strerror}") from None
        self._seen = seen
        if not token or any(byte < 0x21 or byte > 0x7E for byte in token):
            raise AccessError(f"{self._setting} {self._path} holds no token")
        self._expected = token
