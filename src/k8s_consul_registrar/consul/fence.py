"""Keeps a replica's writes within its lead, also those that are in the system's hands already."""

import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass

from aiohttp import AddrInfoType

# SO_LINGER on, for 0 seconds: closing discards what was not sent yet (Linux, socket(7)).
_DISCARD_ON_CLOSE = struct.pack("ii", 1, 0)
# Twice the largest body, in bytes: the system takes a request at once and nothing of it waits in our memory.
_SEND_BUFFER = 1024 * 1024
# A connection outlives one lost packet, whatever the grace, in seconds.
_LEAST_PATIENCE = 1.0


@dataclass(frozen=True, slots=True)
class Fence:
    """Says for how long writes may be made.

    `left` tells the seconds until no write of ours may be under way, 0 or less where none may start.
    `grace` is how many seconds lie between that moment and the first in which another may write.
    """

    left: Callable[[], float]
    grace: float

    def socket(self, address: AddrInfoType) -> socket.socket:
        """Return a socket whose unsent data end with it, and with a process that was stopped.

        By default a system goes on sending what a closed connection left, and what a stopped process wrote,
        for minutes: long enough for a write to reach Consul when another leads. TCP_USER_TIMEOUT (Linux, RFC
        5482) has it give up the connection when data stay unacknowledged for so long.
        """
        family, kind, protocol, _, _ = address
        made = socket.socket(family, kind, protocol)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _DISCARD_ON_CLOSE)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                patience = round(1000 * max(_LEAST_PATIENCE, self.grace))
                made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, patience)
        except OSError:
            made.close()
            raise
        return made
