"""Ports for programs that cannot ask the system for one: reserved before they start, until this process ends.

A port that was picked and released may be gone when the program binds it. These lie outside the range from
which the system hands out ports, and each belongs to one process of all tests on the machine: ports are
reserved in blocks, and the abstract socket that stands for a block exists as long as its process, in the
network namespace of its ports.
"""

import contextlib
import itertools
import os
import socket
from collections.abc import Iterator
from pathlib import Path

_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
_LOWEST, _HIGHEST = 10_000, 32_000
_BLOCK = 32  # ports


def reserve_ports(count: int) -> list[int]:
    """Return distinct ports, free for TCP and UDP, that no test is given again while this process runs."""
    return list(itertools.islice(_free, count))


def _ports() -> Iterator[int]:
    """Return ports that are free, a block at a time."""
    blocks = _candidates()
    start = int.from_bytes(os.urandom(4), "big") % len(blocks)
    reservations: list[socket.socket] = []
    for first in (*blocks[start:], *blocks[:start]):
        if (reservation := reserve_block(first)) is not None:
            reservations.append(reservation)
            yield from filter(_is_free, range(first, first + _BLOCK))
    raise AssertionError(f"no free port in {blocks}")


def _candidates() -> range:
    """Return where blocks begin: below the ports that the system hands out, or above where there are more."""
    ports = range(_LOWEST, _HIGHEST)
    with contextlib.suppress(OSError, ValueError):
        first, last = map(int, _EPHEMERAL.read_text().split())
        below, above = range(_LOWEST, min(first, _HIGHEST)), range(last + 1, 65_536)
        if max(len(below), len(above)) >= 100 * _BLOCK:
            ports = max(below, above, key=len)
    return range(ports.start, ports.stop - _BLOCK + 1, _BLOCK)


def reserve_block(first: int) -> socket.socket | None:
    """Return the socket that reserves a block of ports, None where another process has it."""
    reservation = socket.socket(socket.AF_UNIX)
    try:
        reservation.bind(f"\0k8s-consul-registrar/tests/ports/{first}")
    except OSError:
        reservation.close()
        return None
    return reservation


def _is_free(port: int) -> bool:
    """Return whether nothing uses a port, on any address."""
    with (
        socket.socket(socket.AF_INET, socket.SOCK_STREAM) as tcp,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
    ):
        try:
            tcp.bind(("", port))
            udp.bind(("", port))
        except OSError:
            return False
    return True


_free = _ports()
