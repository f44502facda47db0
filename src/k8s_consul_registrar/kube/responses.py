"""Responses: failed requests as our error types, and compressed bodies as they were.

Requests meet a Status under an HTTP status, watches in an ERROR event under a 200.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import quote

import aiohttp
import msgspec

from k8s_consul_registrar.errors import (
    ClusterAhead,
    ClusterBusy,
    ClusterError,
    ClusterExpired,
    ClusterForbidden,
    ClusterRefused,
    ClusterUnauthorized,
    ClusterUnreachable,
)
from k8s_consul_registrar.model import Kind
from k8s_consul_registrar.tls import API_SERVER, Trust, explain

MESSAGE_LENGTH = 300
REFUSAL_LIMIT = 1 << 16
RETRY_AFTER_CAP = 3600.0
ANY_HEAD = 32 + zlib.MAX_WBITS  # that of gzip or of zlib
# What a body may unpack to, in bytes or as a multiple: objects shrink to a thirtieth at best, a bomb to a thousandth.
MOST_UNPACKED, MOST_TIMES = 64 << 20, 100
# Bytes of a body as it is sent. A page has a few MB; as much as this, uncompressed, would be a list of 75,000 Pods.
MOST_SENT = 512 << 20
RESOURCES = {
    Kind.POD: "pods",
    Kind.NODE: "nodes",
    Kind.SERVICE: "services",
    Kind.ENDPOINT: "endpointslices",
    Kind.NAMESPACE: "namespaces",
}
# The API groups of those that are not in the core group.
GROUPS = {Kind.ENDPOINT: "discovery.k8s.io"}


@dataclass(frozen=True, slots=True)
class ApiAction:
    """A request to the API server in RBAC's words; an empty `namespace` is the cluster scope."""

    verb: str
    resource: str
    namespace: str = ""

    def __str__(self) -> str:
        where = f"in namespace {self.namespace}" if self.namespace else "at the cluster scope"
        return f"{self.verb} {self.resource} {where}"


def collection_path(kind: Kind, namespace: str = "") -> str:
    """Return the path of a kind's objects, in one namespace if there is one."""
    root = f"/apis/{GROUPS[kind]}/v1" if kind in GROUPS else "/api/v1"
    scope = f"/namespaces/{quote(namespace, safe='')}" if namespace else ""
    return f"{root}{scope}/{RESOURCES[kind]}"


class _Cause(msgspec.Struct, frozen=True, gc=False):
    reason: str = ""


class _Details(msgspec.Struct, frozen=True, rename="camel"):
    causes: list[_Cause] | None = None
    retry_after_seconds: int = 0


class Status(msgspec.Struct, frozen=True):
    """The `Status` object an API server refuses with."""

    kind: str
    message: str = ""
    reason: str = ""
    code: int = 0
    details: _Details | None = None

    @property
    def is_ahead(self) -> bool:
        """True if the version asked for lies in the server's future.

        Servers before 1.18 say so only in the message.
        """
        causes = (self.details.causes if self.details else None) or ()
        return any(cause.reason == "ResourceVersionTooLarge" for cause in causes) or self.message.startswith(
            "Too large resource version"
        )

    @property
    def is_expired(self) -> bool:
        """True if the version or continue token asked for is gone, whatever the code says."""
        return self.code == 410 or self.reason in ("Expired", "Gone")

    @property
    def is_terminating(self) -> bool:
        """True if nothing can be created because the namespace is going: a 403 that is about no right."""
        causes = (self.details.causes if self.details else None) or ()
        return any(cause.reason == "NamespaceTerminating" for cause in causes)


_STATUS = msgspec.json.Decoder(Status)


def decode_status(body: bytes | msgspec.Raw) -> Status:
    """Decode a refusal's body; one that is no `Status` gives an empty one, so that its text goes nowhere."""
    try:
        status = _STATUS.decode(body)
    except (ValueError, RecursionError):
        return Status(kind="")
    return status if status.kind == "Status" else Status(kind="")


def cluster_error(
    action: ApiAction, code: int, status: Status, *, retry_after: str = "", origin: str = ""
) -> ClusterError:
    """Return the error for a refused action.

    `retry_after` is the header's text, `origin` where our credentials come from.

    Codes and reasons: Kubernetes API conventions, "Response Status Kind"; 410 and "Too large resource
    version": Kubernetes API concepts, "Resource versions".
    """
    said = f"; the server said: {clipped(status.message)}" if status.message else ""
    if code == 401:
        ours = f" ({origin})" if origin else ""
        return ClusterUnauthorized(f"cannot {action}: our credentials are not accepted{ours}{said}")
    if code == 403 and not status.is_terminating:
        return ClusterForbidden(f"cannot {action}: grant {action.verb} on {action.resource}{said}")
    if code == 410 or status.is_expired:
        return ClusterExpired(f"cannot {action}: the version or continue token asked for is gone{said}")
    if status.is_ahead:
        return ClusterAhead(f"cannot {action}: our version lies in the server's future{said}")
    if code == 429 or 500 <= code <= 599:
        return ClusterBusy(
            f"cannot {action}: the API server answered {code}{said}", _wait(status, retry_after)
        )
    return ClusterRefused(f"cannot {action}: the API server answered {code}{said}", code)


def clipped(text: str) -> str:
    """Return a server's text on one line, without control characters, short enough for a log line."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text[: 2 * MESSAGE_LENGTH]).split())
    return line if len(line) <= MESSAGE_LENGTH else line[: MESSAGE_LENGTH - 1] + "…"


def _wait(status: Status, header: str) -> float | None:
    """Return the seconds to wait; an API server sends whole seconds, in the header or in the details."""
    if header.isascii() and header.isdigit():
        return min(float(header[:9]), RETRY_AFTER_CAP)
    named = status.details.retry_after_seconds if status.details else 0
    return float(min(named, RETRY_AFTER_CAP)) if named > 0 else None


def transport_error(error: Exception, action: ApiAction, *, server: str, trust: Trust | None) -> ClusterError:
    """Return the error for a request that brought no whole answer.

    `trust` is what the server was verified by. The texts are built from the parts that hold no URL, because a
    proxy's URL may hold a password.
    """
    if isinstance(error, aiohttp.InvalidURL):
        return ClusterRefused(f"cannot {action}: {server}, or its proxy's URL, cannot be requested")
    if isinstance(error, aiohttp.ClientResponseError) and not isinstance(error, aiohttp.ClientHttpProxyError):
        return ClusterRefused(f"cannot {action}: {server} does not speak HTTP: {clipped(error.message)}")
    if isinstance(error, (aiohttp.ClientError, TimeoutError, OSError)):
        return ClusterUnreachable(f"cannot {action}: {_broken(error, server, trust)}")
    # The URL libraries let exceptions of their own escape for hosts they cannot encode or resolve.
    return ClusterRefused(
        f"cannot {action}: the request to {server} failed: {type(error).__name__}: {_text(error)}"
    )


def _text(error: Exception) -> str:
    """Return an unexpected error's own words, unless they may quote a URL."""
    text = str(error)
    return "…" if "://" in text or "@" in text else clipped(text)


def _broken(error: Exception, server: str, trust: Trust | None) -> str:
    explanation = explain(
        error, API_SERVER, trust.context if trust else None, trusted=trust.source if trust else ""
    )
    if explanation is not None:
        return f"{server}: {explanation}"
    match error:
        case aiohttp.ClientHttpProxyError():
            why = f"the proxy answered {error.status} to CONNECT"
        case aiohttp.ClientProxyConnectionError():
            why = f"no connection to the proxy: {clipped(str(error.os_error))}"
        case aiohttp.ClientConnectorError():
            why = f"no connection to {server}: {clipped(str(error.os_error))}"
        case aiohttp.ConnectionTimeoutError():
            why = f"no connection to {server}: timed out"
        case TimeoutError():
            why = f"{server} took too long to answer"
        case aiohttp.ClientPayloadError():
            why = f"{server} broke off its answer"
        case _:
            why = f"the connection to {server} broke: {clipped(str(error)) or type(error).__name__}"
    return why


async def read_head(stream: aiohttp.StreamReader) -> bytes:
    """Return the beginning of a refusal's body, enough to find its reason."""
    kept = bytearray()
    while len(kept) < REFUSAL_LIMIT and (chunk := await stream.read(REFUSAL_LIMIT)):
        kept += chunk
    return bytes(kept)


async def read_body(response: aiohttp.ClientResponse, action: ApiAction) -> bytes:
    """Read a whole body as it was sent; raises ClusterRefused for one over `MOST_SENT` bytes."""
    pieces: list[bytes] = []
    size = 0
    async for piece in response.content.iter_any():
        pieces.append(piece)
        size += len(piece)
        if size > MOST_SENT:
            raise ClusterRefused(f"cannot {action}: the answer is over {MOST_SENT >> 20} MB", 200)
    return b"".join(pieces)


def unpacker(response: aiohttp.ClientResponse, *, is_part: bool = False) -> Callable[[bytes], bytes]:
    """Return what decompresses a body, or with `is_part` one piece of it after the other; we ask for gzip.

    It raises ClientPayloadError for a body that is broken, not whole, or a bomb.
    """
    if response.headers.get("Content-Encoding", "").lower() not in ("gzip", "deflate"):
        return bytes
    unpacking = zlib.decompressobj(ANY_HEAD)

    def unpack(data: bytes) -> bytes:
        try:
            unpacked = unpacking.decompress(data, max(MOST_UNPACKED, MOST_TIMES * len(data)))
        except zlib.error as error:
            raise aiohttp.ClientPayloadError(f"the compressed body is broken: {error}") from None
        if unpacking.unconsumed_tail:
            raise aiohttp.ClientPayloadError("the compressed body is far larger than any list")
        if not (is_part or unpacking.eof):
            raise aiohttp.ClientPayloadError("the compressed body is not whole")
        return unpacked

    return unpack
