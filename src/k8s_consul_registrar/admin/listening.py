"""The listening socket of an admin server, in both address families."""

import errno
import os
import socket

from k8s_consul_registrar.errors import OperationalError


def listen(port: int, setting: str) -> socket.socket:
    """Return a socket that listens on every address of the machine, in both families where it has them.

    Port 0 takes one the system hands out. Raises OperationalError, naming `setting`, when it cannot be had.
    """
    try:
        if socket.has_dualstack_ipv6():
            try:
                return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
            except OSError as error:
                if error.errno != errno.EADDRNOTAVAIL:  # IPv6 compiled in and switched off
                    raise
        return socket.create_server(("", port))
    except OSError as error:
        # The socket module appends the address to strerror; the number alone gives the plain words.
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise OperationalError(f"{setting} {port} cannot be listened on: {reason}") from error
