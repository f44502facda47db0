"""Files as no program expects them, to be put in the place of a good one."""

import os
from collections.abc import Callable
from pathlib import Path

HUGE = 5 << 20  # bytes, more than is read


def _clear(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


def _content(content: bytes) -> Callable[[Path], None]:
    def put(path: Path) -> None:
        _clear(path)
        path.write_bytes(content)

    return put


def _directory(path: Path) -> None:
    _clear(path)
    path.mkdir()


def _link(path: Path, target: str) -> None:
    _clear(path)
    path.symlink_to(target)


def _pipe(path: Path) -> None:
    _clear(path)
    os.mkfifo(path)


def _huge(path: Path) -> None:
    _clear(path)
    path.write_bytes(b"")
    os.truncate(path, HUGE)


def _half(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


ODD: dict[str, Callable[[Path], None]] = {
    "absent": _clear,
    "empty": _content(b""),
    "blank": _content(b" \n\n"),
    "binary": _content(bytes(range(256)) * 4),
    "half-written": _half,
    "a directory": _directory,
    "a dangling link": lambda path: _link(path, "/nowhere/at/all"),
    "a link to itself": lambda path: _link(path, path.name),
    "a pipe": _pipe,
    "endless": lambda path: _link(path, "/dev/zero"),
    "huge": _huge,
}


def restore(path: Path, content: bytes) -> None:
    """Put a regular file in place again."""
    _clear(path)
    path.write_bytes(content)
