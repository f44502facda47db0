"""Heads of messages to both sides, and the header fields that are passed on."""

import re
from collections.abc import Mapping
from functools import lru_cache
from http import HTTPStatus

from k8s_consul_registrar import __version__
from k8s_consul_registrar.proxy.refusals import Outcome, Refusal
from k8s_consul_registrar.proxy.routes import Route

# Field names in lower case; a field that comes twice is one, its values joined by ", " (RFC 9110, 5.3).
Fields = Mapping[bytes, bytes]

REQUEST_FIELDS = frozenset(
    {
        b"accept",
        b"accept-encoding",
        b"authorization",
        b"connection",
        b"content-length",
        b"host",
        b"traceparent",
        b"transfer-encoding",
        b"x-prometheus-scrape-timeout-seconds",
    }
)
RESPONSE_FIELDS = frozenset(
    {
        b"connection",
        b"content-encoding",
        b"content-length",
        b"content-type",
        b"location",
        b"transfer-encoding",
    }
)

# RFC 3986, 3.2.2 and 3.2.3. The comma of a reg-name is left out: it would hide a Host that came twice.
_HOST = re.compile(
    rb"(?:\[[0-9A-Fa-f:.]{2,45}\]|(?:[A-Za-z0-9._~!$&'()*+;=-]|%[0-9A-Fa-f]{2}){1,255})(?::[0-9]{0,5})?"
)
# Field values allowed by RFC 9110, 5.5. llhttp has rejected all others; this is the second lock.
_VALUE = re.compile(rb"[\t\x20-\x7e\x80-\xff]*")

# W3C Trace Context, 3.2.
_TRACE = re.compile(rb"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")

_USER_AGENT = f"k8s-consul-registrar/{__version__}"


def is_host(text: bytes) -> bool:
    """Return True if a text is one well-formed host, with or without a port."""
    return _HOST.fullmatch(text) is not None


def request_fault(fields: Fields, *, needs_host: bool = True) -> Refusal | None:
    """Return why a request that parses is malformed: no single well-formed Host, or a body."""
    host = fields.get(b"host")
    if needs_host if host is None else not is_host(host):
        return Refusal(400, Outcome.BAD_REQUEST, "a request needs exactly one well-formed Host")
    if has_body(fields):
        return Refusal(400, Outcome.BAD_REQUEST, "a scrape has no body")
    return None


def has_body(fields: Fields) -> bool:
    """Return True if a request announces a body (RFC 9112, 6)."""
    return b"transfer-encoding" in fields or fields.get(b"content-length", b"0") != b"0"


def wants_close(fields: Fields) -> bool:
    """Return True if the sender closes the connection after this message (RFC 9112, 9.6)."""
    connection = fields.get(b"connection")
    return connection is not None and b"close" in [part.strip() for part in connection.lower().split(b",")]


def request_start(route: Route) -> bytes:
    """Return the start of the request to an upstream, the same for every scrape of a route."""
    return f"GET {route.path} HTTP/1.1\r\nHost: {route.endpoint}\r\nUser-Agent: {_USER_AGENT}\r\n".encode()


def as_legacy(start: bytes) -> bytes:
    """Return the start of a request as HTTP/1.0, so that the answer comes without chunks."""
    return start.replace(b" HTTP/1.1\r\n", b" HTTP/1.0\r\n", 1)


def pod_fields(seconds: float, traceparent: bytes | None) -> bytes:
    """Return the fields that only a Pod gets: the seconds that are left for its answer, and the trace."""
    fields = b"X-Prometheus-Scrape-Timeout-Seconds: %.3f\r\n" % max(0.001, seconds)
    if traceparent is not None and _TRACE.fullmatch(traceparent):
        fields += b"Traceparent: " + traceparent + b"\r\n"
    return fields


@lru_cache(maxsize=64)
def request_rest(accept: bytes | None, accept_encoding: bytes | None, token: str) -> bytes:
    """Return the rest of the request to an upstream: the client's Accept fields and the proxy's own token.

    An empty token sends none. Raises ValueError if a value is not allowed in a header.
    """
    authorization = f"Bearer {token}".encode("latin-1") if token else None
    fields = {b"Accept": accept, b"Accept-Encoding": accept_encoding, b"Authorization": authorization}
    return _lines(fields) + b"\r\n"


@lru_cache(maxsize=64)
def response_start(content_type: bytes | None, content_encoding: bytes | None) -> bytes:
    """Return the start of the answer to a client: the fields of the upstream's head that a scrape needs.

    Raises ValueError if a value is not allowed in a header.
    """
    return b"HTTP/1.1 200 OK\r\n" + _lines(
        {b"Content-Type": content_type, b"Content-Encoding": content_encoding}
    )


def _lines(fields: Mapping[bytes, bytes | None]) -> bytes:
    lines = []
    for name, value in fields.items():
        if value is not None:
            if _VALUE.fullmatch(value) is None:
                raise ValueError(f"the value of {name.decode()} is not allowed in a header")
            lines.append(name + b": " + value + b"\r\n")
    return b"".join(lines)


def refusal_bytes(refusal: Refusal, *, close: bool, with_body: bool = True) -> bytes:
    """Return a refusal as a whole answer; `with_body` is False for HEAD, whose answers have none."""
    body = f"{refusal.reason}\n".encode()
    lines = [
        f"HTTP/1.1 {refusal.status} {HTTPStatus(refusal.status).phrase}",
        "Content-Type: text/plain; charset=utf-8",
        f"Content-Length: {len(body)}",
        "X-Content-Type-Options: nosniff",
    ]
    if refusal.status == HTTPStatus.METHOD_NOT_ALLOWED:
        lines.append("Allow: GET")
    if refusal.status == HTTPStatus.UNAUTHORIZED:
        lines.append('WWW-Authenticate: Bearer realm="scrapes"')
    if close:
        lines.append("Connection: close")
    head = "\r\n".join(lines).encode() + b"\r\n\r\n"
    return head + body if with_body else head
