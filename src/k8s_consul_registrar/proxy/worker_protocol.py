"""Messages between the processes of one proxy, over a socket that only the two of them have.

A frame is its length in four bytes and a message in msgpack. Credentials travel only this way: never as an
argument, in the environment or in a file on a disk.
"""

import asyncio

import msgspec

from k8s_consul_registrar.proxy.config import ProxyConfig
from k8s_consul_registrar.proxy.nodes import Endpoint, NodeTable
from k8s_consul_registrar.proxy.routes import ProxiedPod
from k8s_consul_registrar.proxy.stats import Failure, LastScrape, ProxyStats
from k8s_consul_registrar.rotating import BearerTokens
from k8s_consul_registrar.tls import ServerCertificate, Trust

# Five thousand Nodes are about a megabyte; a greater length is no frame.
MAX_LENGTH = 1 << 28


class Begin(msgspec.Struct, frozen=True, tag=True):
    """To a worker, the first message: everything that never changes."""

    port: int
    config: ProxyConfig
    log_level: str
    log_format: str


class WorkerCredentials(msgspec.Struct, frozen=True, tag=True):
    """To a worker: everything secret, as it is now; nothing in it is unusable.

    `problem` says why there is no token. Clients are checked by `bearer` and `tls`, unless None.
    """

    token: str
    problem: str
    kubelets: Trust
    pods: Trust | None = None
    bearer: BearerTokens | None = None
    tls: ServerCertificate | None = None

    def __repr__(self) -> str:
        return "Credentials(…)"


class Table(msgspec.Struct, frozen=True, tag=True):
    """To a worker: the current kubelets."""

    table: NodeTable
    known: bool


class PodPut(msgspec.Struct, frozen=True, tag=True):
    """To a worker: one Pod as it is now, None if it may not be scraped or is gone."""

    namespace: str
    name: str
    pod: ProxiedPod | None


class PodsKnown(msgspec.Struct, frozen=True, tag=True):
    """To a worker: True if the Pods sent so far may be served."""

    known: bool


class Ending(msgspec.Struct, frozen=True, tag=True):
    """To a worker: close each connection after its next answer."""


class Drain(msgspec.Struct, frozen=True, tag=True):
    """To a worker: accept no more, and end once the scrapes under way are done or `grace` seconds have passed."""

    grace: float


class Serving(msgspec.Struct, frozen=True, tag=True):
    """From a worker, once: it accepts clients."""


class WorkerFigures(msgspec.Struct, frozen=True, tag=True):
    """From a worker, every second and at its end: its counts since it began, and what is new since the last message."""

    stats: ProxyStats
    failures: list[Failure]
    last_scrapes: list[tuple[Endpoint, LastScrape]] = []


ToWorker = Begin | WorkerCredentials | Table | PodPut | PodsKnown | Ending | Drain
FromWorker = Serving | WorkerFigures

_encode = msgspec.msgpack.Encoder().encode
_to_worker = msgspec.msgpack.Decoder(ToWorker)
_from_worker = msgspec.msgpack.Decoder(FromWorker)


def frame(message: ToWorker | FromWorker) -> bytes:
    """Return a message as it is sent."""
    body = _encode(message)
    return len(body).to_bytes(4, "big") + body


async def read_to_worker(reader: asyncio.StreamReader) -> ToWorker | None:
    """Return the next message to a worker, None if the proxy is gone."""
    body = await _body(reader)
    return None if body is None else _to_worker.decode(body)


async def read_from_worker(reader: asyncio.StreamReader) -> FromWorker | None:
    """Return the next message of a worker, None if it is gone."""
    body = await _body(reader)
    return None if body is None else _from_worker.decode(body)


async def _body(reader: asyncio.StreamReader) -> bytes | None:
    try:
        length = int.from_bytes(await reader.readexactly(4), "big")
        if length > MAX_LENGTH:
            return None
        return await reader.readexactly(length)
    except (asyncio.IncompleteReadError, OSError):
        return None
