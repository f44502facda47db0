"""Values loaded from files that change while we run: certificates, keys, authorities, tokens."""

import hmac
import math
import os
import re
import stat
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from k8s_consul_registrar.errors import AccessError
from k8s_consul_registrar.telemetry import get_logger

# Seconds for which `current` returns a value before it looks at the files again.
LOOK_EVERY = 5.0
# Seconds between two loads of files that cannot be used and look the same as before.
RETRY_EVERY = 1.0
# Seconds after which the beginning of the token before is taken for a token of its own.
SETTLED_AFTER = 60.0
# The most tokens of a list: each is compared with at every request.
MOST_TOKENS = 16
# The longest file that is read: certificates, keys and kubeconfigs are a hundredth of it.
SIZE_LIMIT = 4 << 20  # bytes
PIECE = 1 << 20  # bytes read at once
# A part of a path that may be a token: long and without a dot, or as long as a JWT.
_TOKEN_LIKE = re.compile(r"^(?:[^.]{20,}|.{64,})$", re.DOTALL)

T = TypeVar("T")

log = get_logger("files")


class LoadStatus:
    """Tracks whether something loaded from outside can be used now; logs when a problem begins, changes and ends.

    `of` is a bounded word for logs and metrics: the name of the setting.
    """

    _all: ClassVar["weakref.WeakSet[LoadStatus]"] = weakref.WeakSet()

    def __init__(
        self,
        of: str,
        *,
        failing: str = "changed files cannot be used; those before stay in use",
        working: str = "changed files are in use",
    ) -> None:
        self.of = of
        self.problem = ""
        self._failing = failing
        self._working = working
        if of:
            self._all.add(self)

    def failed(self, problem: str, *, has_value: bool) -> None:
        """Record that the latest load failed; without a value the caller raises the problem itself."""
        if problem == self.problem:
            return
        self.problem = problem
        if has_value:
            log.warning(self._failing, of=self.of, problem=problem)

    def succeeded(self, *, is_new: bool) -> None:
        """Record that the latest load gave a value."""
        if self.of and (is_new or self.problem):
            log.info(self._working, of=self.of)
        self.problem = ""

    def forget(self) -> None:
        """Leave it out of the metric: its owner was never made."""
        self._all.discard(self)

    @classmethod
    def problems(cls) -> Mapping[str, str]:
        """Return the problem of everything that is loaded, by its name; an empty text is no problem."""
        found: dict[str, str] = {}
        for status in list(cls._all):
            found[status.of] = found.get(status.of) or status.problem
        return found


class Rotating(Generic[T]):
    """A value loaded from files, and loaded again when one of them changes.

    Files are replaced one after the other, and a copy may be caught half-way. So the last good value stays
    until another loads, and a load that failed is repeated even if the files look the same: permissions
    and free descriptors do not show in them. Any exception of `load` counts as a failure.

    `current` looks at the files every `look_every` seconds (LOOK_EVERY by default), and loads them again after
    `max_age` seconds even if they look the same.
    """

    def __init__(
        self,
        of: str,
        paths: Iterable[Path],
        load: Callable[[], T],
        *,
        is_lazy: bool = False,
        look_every: float | None = None,
        max_age: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Load the first value; raises AccessError. A lazy one is loaded by the first `current`."""
        self._paths = tuple(paths)
        self._look_every = LOOK_EVERY if look_every is None else look_every
        self._load = load
        self._max_age = max_age
        self._clock = clock
        self._status = LoadStatus(of)
        self._value: T | None = None
        self._has_value = False
        self._is_due = False
        self._seen: object = None
        self._looked_at = self._tried_at = -math.inf
        if not is_lazy:
            try:
                self._load_first()
            except AccessError:
                self._status.forget()
                raise

    @property
    def value(self) -> T:
        """The last good value, without a look at the files; raises AccessError while there is none."""
        if not self._has_value:
            self._load_first()
        return self._value  # type: ignore[return-value]  # it has one

    @property
    def problem(self) -> str:
        """Why the files cannot be used as they are now, empty if they can."""
        return self._status.problem

    def current(self) -> T:
        """Return the value, after a look at the files if it is time for one.

        Raises AccessError while no value was ever loaded.
        """
        if self._has_value:
            now = self._clock()
            is_old = self._max_age is not None and now - self._tried_at >= self._max_age
            if self._is_due or is_old or now - self._looked_at >= self._look_every:
                self.refresh(is_due=is_old)
        return self.value

    def refresh(self, *, is_due: bool = False) -> bool:
        """Load again if a file changed or `is_due`; True if the value is another. Never raises."""
        now = self._looked_at = self._clock()
        seen = stamps(self._paths)
        is_changed = seen != self._seen
        is_retry = bool(self.problem) and now - self._tried_at >= RETRY_EVERY
        if not (is_due or self._is_due or is_changed or is_retry):
            return False
        self._seen, self._tried_at, self._is_due = seen, now, False
        try:
            value = self._contained_load()
        except AccessError as error:
            self._status.failed(str(error), has_value=self._has_value)
            return False
        is_new = not self._has_value or value != self._value
        self._status.succeeded(is_new=is_new)
        if is_new:
            self._value, self._has_value = value, True
        return is_new

    def expire(self) -> None:
        """Have the next `current` or `refresh` load the files again."""
        self._is_due = True

    def _load_first(self) -> None:
        self._looked_at = self._tried_at = self._clock()
        self._seen = stamps(self._paths)
        try:
            self._value = self._contained_load()
        except AccessError as error:
            self._status.failed(str(error), has_value=False)
            raise
        self._has_value = True
        self._status.problem = ""

    def _contained_load(self) -> T:
        with contained(self._status.of):
            return self._load()


def fixed(value: T) -> Rotating[T]:
    """Return a value that comes from no file and never changes."""
    return Rotating("", (), lambda: value)


class Derived(Generic[T]):
    """A value made of rotating ones, again when one of them changes; each part keeps its own last good value."""

    def __init__(self, make: Callable[..., T], *parts: Rotating[Any]) -> None:
        self._make = make
        self._parts = parts
        self._remake()

    def _remake(self) -> None:
        values = [(part, part.value) for part in self._parts]
        self._made = self._make(*(value for _, value in values))
        self._values = values

    @property
    def value(self) -> T:
        """The value, without a look at the files; the last one while another cannot be made."""
        for part, value in self._values:
            if part.value is not value:
                with suppress(AccessError):
                    self._remake()
                break
        return self._made

    def current(self) -> T:
        """Return the value, after a look at the files if it is time for one."""
        for part in self._parts:
            part.current()
        return self.value

    def refresh(self) -> bool:
        """Load again what changed; True if the value is another. Never raises."""
        return any(list(map(Rotating.refresh, self._parts)))

    def expire(self) -> None:
        """Have the next `current` or `refresh` load every part again."""
        for part in self._parts:
            part.expire()

    @property
    def problem(self) -> str:
        """Why a file cannot be used as it is now, empty if all can."""
        return next((part.problem for part in self._parts if part.problem), "")


def stamps(paths: Iterable[Path]) -> tuple[object, ...]:
    """Return a value that differs once a file was replaced or written; None stands for a missing file."""
    seen: list[object] = []
    for path in paths:
        try:
            status = os.stat(path)  # noqa: PTH116 - half the time of Path's, and some look at every request
        except (OSError, ValueError):
            seen.append(None)
        else:
            seen.append((status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size))
    return tuple(seen)


@contextmanager
def contained(setting: str) -> Iterator[None]:
    """Turn any exception of the block into an AccessError that names the setting and quotes no content."""
    try:
        yield
    except (AccessError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001 - no file ends the daemon, whatever it makes a library raise
        raise AccessError(f"{setting} cannot be used: {reason(error)}") from None


def reason(error: Exception) -> str:
    """Return plain words for an exception: no text that may quote a secret."""
    return (isinstance(error, OSError) and error.strerror) or type(error).__name__


def read_file(path: Path, setting: str, *, size_limit: int = SIZE_LIMIT, follows_links: bool = True) -> bytes:
    """Return the content of a regular file; raises AccessError that names the setting and the file.

    A pipe or a device is refused rather than read: either could hold up the event loop, or never end.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
    try:
        descriptor = os.open(path, flags if follows_links else flags | os.O_NOFOLLOW)
        with open(descriptor, "rb", buffering=0) as file:  # noqa: PTH123 - a descriptor is no path
            status = os.fstat(descriptor)
            if stat.S_ISDIR(status.st_mode):
                raise AccessError(f"{setting}: cannot read {path}: Is a directory")
            if not stat.S_ISREG(status.st_mode):
                raise AccessError(f"{setting}: cannot read {path}: not a regular file")
            content = bytearray()
            # Some file systems tell no size, so it is also counted.
            is_long = status.st_size > size_limit
            while not is_long and (piece := file.read(min(PIECE, size_limit + 1 - len(content)))):
                content += piece
                is_long = len(content) > size_limit
    except (OSError, ValueError) as error:
        why = (error.strerror or type(error).__name__) if isinstance(error, OSError) else "not a path"
        raise AccessError(f"{setting}: cannot read {_shown(path)}: {why}") from None
    if is_long:
        raise AccessError(f"{setting}: cannot read {path}: larger than {size_limit >> 20} MiB")
    return bytes(content)


def _shown(path: Path) -> str:
    """Return a path for an error text, without what may be a secret that was given in place of a file's name."""
    there = next((one for one in (path, *path.parents) if os.path.exists(one)), None)  # noqa: PTH110 - Path's may raise
    if there is None or (there != path and not path.is_absolute()):
        return "the file (its name is not shown, it may be the secret itself)"
    return str(there.joinpath(*(_TOKEN_LIKE.sub("…", part) for part in path.relative_to(there).parts)))


def clean_token(content: bytes | str, setting: str) -> str:
    """Return a bearer token without surrounding white space.

    Raises AccessError, never with the token in it, if it is empty or not fit for a header.
    """
    text = content.decode("ascii", errors="replace") if isinstance(content, bytes) else content
    token = text.strip()
    if not token:
        raise AccessError(f"{setting}: the token is empty")
    if any(not "!" <= char <= "~" for char in token):
        raise AccessError(f"{setting}: the token has characters that no token has")
    return token


def refuse_truncated(token: str, before: Iterable[str], path: Path, setting: str) -> None:
    """Raise AccessError if a token is the beginning of one of those before and its file is fresh.

    Such a file is still being written, or was cut off. After a while the token is taken as it is.
    """
    if any(one.startswith(token) and one != token for one in before):
        try:
            age = time.time() - path.stat().st_mtime
        except OSError:
            age = 0.0
        if 0 <= age < SETTLED_AFTER:
            raise AccessError(f"{setting}: the token is only the beginning of the one before")


def token_file(
    path: Path,
    setting: str,
    *,
    of: str = "",
    is_lazy: bool = False,
    max_age: float | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Rotating[str]:
    """Return the token in a file; `of` names the setting in metrics if `setting` says more than its name.

    Raises AccessError, naming `setting`, if the file holds no token.
    """
    last = ""

    def load() -> str:
        nonlocal last
        token = clean_token(read_file(path, setting), f"{setting} {path}")
        refuse_truncated(token, [last], path, f"{setting} {path}")
        last = token
        return token

    return Rotating(of or setting, [path], load, is_lazy=is_lazy, max_age=max_age, clock=clock)


@dataclass(frozen=True, slots=True)
class BearerTokens:
    """Tokens of which clients must send one; with two, one can be replaced while clients send either."""

    accepted: tuple[bytes, ...] = field(repr=False)

    def accepts(self, authorization: bytes | None) -> bool:
        """Return whether an Authorization field holds a token; takes the same time wherever it differs."""
        if authorization is None:
            return False
        scheme, _, credentials = authorization.partition(b" ")
        shown = credentials.strip(b" \t")
        is_known = False
        for token in self.accepted:
            is_known |= hmac.compare_digest(shown, token)
        return scheme.lower() == b"bearer" and is_known


def bearer_tokens(path: Path, setting: str) -> Rotating[BearerTokens]:
    """Return the tokens of a file, one a line; a token that is removed is refused from the next `current` on.

    Raises AccessError, naming `setting`, if the file cannot be read or holds no token.
    """
    last: list[str] = []

    def load() -> BearerTokens:
        origin = f"{setting} {path} holds no token"
        lines = [line for line in read_file(path, setting).splitlines() if line.strip()]
        if not lines:
            raise AccessError(origin)
        if len(lines) > MOST_TOKENS:
            raise AccessError(f"{setting} {path} holds more than {MOST_TOKENS} tokens")
        tokens = [clean_token(line, origin) for line in lines]
        for token in tokens:
            if token not in last:
                refuse_truncated(token, last, path, origin)
        last[:] = tokens
        return BearerTokens(tuple(token.encode() for token in tokens))

    return Rotating(setting, [path], load, look_every=0.0)
