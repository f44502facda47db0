"""Files that are replaced as a whole, off the event loop."""

import asyncio
import contextlib
import errno
import glob
import os
import stat
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO, TypeVar, cast

from k8s_consul_registrar.errors import AccessError
from k8s_consul_registrar.rotating import reason

# Seconds after which blocking work that is to end is left to itself.
HUNG_AFTER = 5.0
# Seconds after which a file system does not answer.
HUNG_WITHIN = 30.0
_SPACE, _RIGHT = "free some space there", "let user {user} write in {folder}"
_REMEDIES = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.EACCES: _RIGHT,
    errno.EPERM: _RIGHT,
    errno.EROFS: "mount {folder} for writing",
    errno.ENOENT: "make {folder}, or mount it again",
    errno.ENOTDIR: "make {folder} a folder",
    errno.ESTALE: "mount {folder} again",
}
# Seconds after which a temporary file belongs to a process that was killed.
LEFT_AFTER = 900.0

T = TypeVar("T")


def check_folder(path: Path, setting: str) -> None:
    """Raise an AccessError, naming the setting, if no file can be made in the file's folder."""
    try:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=_prefix(path))
        os.close(descriptor)
        Path(name).unlink()
    except (OSError, ValueError) as error:
        raise AccessError(f"{setting}: cannot write in {path.parent}: {reason(error)}") from None


class Replacement:
    """A file that takes another's place once it is complete; what its methods do blocks."""

    def __init__(self, path: Path, mode: int = 0o600) -> None:
        self._path = path
        self._mode = mode
        self._file: IO[bytes] | None = None
        self._temporary: Path | None = None

    def open(self) -> None:
        """Make a temporary file beside the other, readable by its owner only.

        Its name is its own, since a second replica may write in the same folder.
        """
        descriptor, name = tempfile.mkstemp(dir=self._path.parent, prefix=_prefix(self._path))
        self._temporary, self._file = Path(name), os.fdopen(descriptor, "wb")

    def writer(self, piece: bytes) -> Callable[[], object]:
        """Return a function that writes a piece."""
        assert self._file is not None
        return partial(self._file.write, piece)

    def write(self, piece: bytes) -> None:
        """Write a piece."""
        assert self._file is not None
        self._file.write(piece)

    def commit(self) -> None:
        """Put the file in the place of the other; raises ValueError for one that is no regular file, and OSError."""
        assert self._file is not None
        assert self._temporary is not None
        self._file.flush()
        os.fchmod(self._file.fileno(), self._mode)
        os.fsync(self._file.fileno())
        self._file.close()
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISREG(self._path.lstat().st_mode):
                raise ValueError("it is not a regular file")
        self._temporary.replace(self._path)
        self._temporary = None
        _sync_folder(self._path.parent)

    def discard(self) -> None:
        """Remove what was not committed."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
        if self._temporary is not None:
            with contextlib.suppress(OSError):
                self._temporary.unlink()


def _sync_folder(folder: Path) -> None:
    """Make a rename last; some file systems cannot, and need not."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


async def in_thread(work: Callable[[], T]) -> T:
    """Do blocking work off the loop; a cancellation waits for its end, but not for longer than HUNG_AFTER.

    The thread is a daemon, unlike those of the loop's executor: one that hangs in a network file system
    does not keep the process from ending.
    """
    loop = asyncio.get_running_loop()
    doing: asyncio.Future[T] = loop.create_future()

    def report(result: T | None, error: Exception | None) -> None:
        if error is not None:
            doing.set_exception(error)
        else:
            doing.set_result(cast("T", result))

    def run() -> None:
        result, problem = None, None
        try:
            result = work()
        except Exception as error:  # noqa: BLE001 - raised where it is awaited
            problem = error
        with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
            loop.call_soon_threadsafe(report, result, problem)

    threading.Thread(target=run, name="files", daemon=True).start()
    try:
        return await asyncio.shield(doing)
    except asyncio.CancelledError:
        await asyncio.wait({doing}, timeout=HUNG_AFTER)
        raise


class Blocking:
    """Blocking work on a file system that may hang: one piece at a time, given up after `HUNG_WITHIN`."""

    def __init__(self) -> None:
        self._turn = threading.Lock()

    async def do(self, work: Callable[[], T]) -> T:
        """Do the work off the loop; raises TimeoutError if it, or the one before, does not end."""

        def in_turn() -> T:
            if not self._turn.acquire(blocking=False):
                raise TimeoutError
            try:
                return work()
            finally:
                self._turn.release()

        async with asyncio.timeout(HUNG_WITHIN):
            return await in_thread(in_turn)


def write_problem(path: Path, error: Exception) -> str:
    """Say why a file cannot be replaced, and what repairs it."""
    if isinstance(error, TimeoutError):
        return f"cannot write {path}: its file system does not answer"
    why = reason(error) if isinstance(error, OSError) else str(error)
    number = error.errno if isinstance(error, OSError) else None
    remedy = _REMEDIES.get(number or 0, "")
    return f"cannot write {path}: {why}" + (
        f"; {remedy.format(folder=path.parent, user=os.geteuid())}" if remedy else ""
    )


def remove_leftovers(path: Path) -> None:
    """Remove what processes that were killed while they wrote have left; others may be writing now."""
    with contextlib.suppress(OSError):
        for leftover in path.parent.glob(f"{glob.escape(_prefix(path))}*"):
            with contextlib.suppress(OSError):
                if time.time() - leftover.lstat().st_mtime > LEFT_AFTER:
                    leftover.unlink()


def _prefix(path: Path) -> str:
    return f".{path.name}.tmp-"
