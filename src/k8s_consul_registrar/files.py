"""Values made of files that others replace while we run: certificates, keys, authorities."""

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from k8s_consul_registrar.errors import AccessError
from k8s_consul_registrar.telemetry import get_logger

# How long what was made is used before the files are looked at again, in seconds.
LOOK_EVERY = 5.0

T = TypeVar("T")

log = get_logger("files")


class FromFiles(Generic[T]):
    """What is made of some files, and made again where one of them changed.

    What was made stays while the next cannot be: files are replaced one after the other.
    """

    def __init__(self, paths: Iterable[Path], make: Callable[[], T]) -> None:
        """Make the first; raises what `make` does."""
        self._paths = tuple(paths)
        self._make = make
        self._seen = stamps(self._paths)
        self._problem = ""
        self.value = make()

    def refresh(self, *, is_due: bool = False) -> bool:
        """Make it again where a file changed or `is_due`, and say whether; raises what `make` does.

        What could not be made is tried again each time, since not all that may hinder it shows in the files; of a
        change the same problem is raised once.
        """
        seen = stamps(self._paths)
        is_changed = is_due or seen != self._seen
        if not is_changed and not self._problem:
            return False
        self._seen = seen
        try:
            self.value = self._make()
        except AccessError as error:
            is_known = not is_changed and str(error) == self._problem
            self._problem = str(error)
            if is_known:
                return False
            raise
        self._problem = ""
        return True


class Followed(Generic[T]):
    """What is made of files, for code that cannot do without: a file that cannot be used is told to the log.

    `what` names it there. Those who ask for the `current` one have the files looked at, now and then;
    `clock` returns seconds.
    """

    def __init__(
        self,
        what: str,
        paths: Sequence[Path],
        make: Callable[[], T],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make the first; raises what `make` does."""
        self._what = what
        self._made = FromFiles(paths, make)
        self._clock = clock
        self._looked_at = clock()

    @property
    def value(self) -> T:
        """What was made last; the files are not looked at."""
        return self._made.value

    def current(self) -> T:
        """Return what the files make at this moment, or did a few seconds ago."""
        if self._clock() - self._looked_at >= LOOK_EVERY:
            self.look()
        return self._made.value

    def look(self, *, is_due: bool = False) -> None:
        """Make it again where a file changed, or `is_due`."""
        self._looked_at = self._clock()
        try:
            is_new = self._made.refresh(is_due=is_due)
        except AccessError as error:
            problem = str(error)
            log.warning(
                "changed files cannot be used; those before stay in use", of=self._what, problem=problem
            )
        else:
            if is_new:
                log.info("changed files are in use", of=self._what)


def fixed(value: T) -> Followed[T]:
    """Return what is made of no file and never changes."""
    return Followed("", (), lambda: value)


def stamps(paths: Iterable[Path]) -> tuple[object, ...]:
    """Return what shows that a file was replaced; a file that is not there looks like nothing."""
    seen: list[object] = []
    for path in paths:
        try:
            status = path.stat()
        except OSError:
            seen.append(None)
        else:
            seen.append((status.st_ino, status.st_mtime_ns, status.st_size))
    return tuple(seen)
