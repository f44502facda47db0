"""Takes from the system what the proxy needs before it serves: its port, and enough open files."""

import errno
import resource
import socket
from typing import NamedTuple

from k8s_consul_registrar.errors import SettingsError
from k8s_consul_registrar.proxy.limits import Concurrency

# What the system says where IPv6 is compiled out or switched off.
_NO_IPV6 = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)
# Standard streams, the loop's own, the listening sockets, the API server, the admin endpoints.
OTHER_FILES = 64


def listen(port: int, *, reuse_port: bool = False) -> list[socket.socket]:
    """Return sockets bound to one port on IPv4 and, where the machine has it, IPv6; 0 lets the system choose.

    Raises OSError where the port cannot be had.
    """
    first = _bound(socket.AF_INET, "0.0.0.0", port, reuse_port=reuse_port)  # noqa: S104 - the service is the port
    sockets = [first]
    if socket.has_ipv6:
        try:
            sockets.append(_bound(socket.AF_INET6, "::", first.getsockname()[1], reuse_port=reuse_port))
        except OSError as error:
            if error.errno not in _NO_IPV6:
                first.close()
                raise
    return sockets


def _bound(family: int, host: str, port: int, *, reuse_port: bool) -> socket.socket:
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bound.setblocking(False)  # noqa: FBT003 - the socket's own signature
        bound.bind((host, port))
    except OSError:
        bound.close()
        raise
    return bound


class Fit(NamedTuple):
    """How many connections may be open: of callers, and kept ones to each kind of peer."""

    max_callers: int
    kept_connections: int


def raise_file_limit(
    concurrency: Concurrency, max_callers: int, kept_connections: int, *, kinds: int = 1
) -> Fit:
    """Raise the soft limit of open files to what these numbers need, and return what fits in.

    `kinds` is how many kinds of peers there are, kubelets and perhaps Pods, each with these limits of its own.
    Where the hard limit is too low, callers and kept connections are fewer; raises SettingsError where not
    even the scrapes under way fit in, each with the connection of its caller.
    """
    scrapes = concurrency.overall * kinds
    least = 2 * scrapes + OTHER_FILES
    kept = kept_connections * kinds
    needed = max(least, scrapes + max_callers + kept + OTHER_FILES)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return Fit(max_callers, kept_connections)
    if hard == resource.RLIM_INFINITY or hard >= needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
        return Fit(max_callers, kept_connections)
    if hard < least:
        problem = (
            f"SCRAPE_CONCURRENCY: {concurrency.overall} scrapes at once need {least} open files and the system "
            f"allows {hard}: at most {max(0, hard - OTHER_FILES) // (2 * kinds)} fit in, or raise the limit"
        )
        raise SettingsError([problem])
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    spare = hard - least
    callers = scrapes + spare * max_callers // (max_callers + kept)
    return Fit(min(max_callers, callers), max(1, spare * kept_connections // (max_callers + kept)))
