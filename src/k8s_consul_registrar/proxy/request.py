"""The requests of a client connection, parsed by llhttp and checked beyond it; no sockets."""

import re
from typing import NamedTuple

from httptools import HttpParserError, HttpParserInvalidMethodError, HttpParserUpgrade, HttpRequestParser

from k8s_consul_registrar.proxy.headers import (
    REQUEST_FIELDS,
    Fields,
    has_body,
    is_host,
    request_fault,
    wants_close,
)
from k8s_consul_registrar.proxy.refusals import Outcome, Refusal

HEAD_LIMIT = 16 * 1024
TARGET_LIMIT = 2 * 1024
END_OF_HEAD = b"\r\n\r\n"

_METHOD = re.compile(rb"[A-Za-z]{1,32} ")
# RFC 9112, 2.2: empty lines before a request are ignored. A client may end the previous request with one.
_EMPTY_LINES = re.compile(rb"(?:\r\n){0,8}")
_ONE_EMPTY_LINE = (b"", b"\r\n")
# RFC 9112, 3.2.2: a server accepts the form that clients use with a proxy. Its host decides nothing.
_ABSOLUTE = re.compile(rb"[Hh][Tt][Tt][Pp][Ss]?://(?P<authority>[^/?#@]*)(?P<path>/.*)")

METHOD = Refusal(405, Outcome.METHOD, "a scrape is a GET")
MALFORMED = Refusal(400, Outcome.BAD_REQUEST, "the request is not well-formed")
ONE_AT_A_TIME = Refusal(400, Outcome.BAD_REQUEST, "one request at a time: the next only after the answer")
VERSION = Refusal(505, Outcome.BAD_REQUEST, "only HTTP/1.0 and HTTP/1.1 are spoken here")
LINE_TOO_LONG = Refusal(414, Outcome.BAD_REQUEST, "the request target is too long")
HEAD_TOO_LONG = Refusal(431, Outcome.BAD_REQUEST, "the request's header is too long")
TOO_SLOW = Refusal(408, Outcome.BAD_REQUEST, "the request did not come in time")


class Request(NamedTuple):
    """A valid GET: the target as it was sent, the fields that the relay uses, and if another may follow.

    `is_legacy` is True for HTTP/1.0, whose clients know no chunks.
    """

    target: bytes
    fields: Fields
    keeps_alive: bool
    is_legacy: bool = False


class Fault(NamedTuple):
    """The answer to an invalid request; `is_head` answers have no body."""

    refusal: Refusal
    keeps_alive: bool = False
    is_head: bool = False


class RequestCache:
    """Valid requests seen before, by their bytes, shared by all connections.

    A collector sends the same bytes at every scrape, and the parsed request depends on nothing else, so
    they are parsed once.
    """

    __slots__ = ("_seen", "get")

    MAX_LENGTH = 1024
    MAX_REQUESTS = 8192

    def __init__(self) -> None:
        self._seen: dict[bytes, Request] = {}
        self.get = self._seen.get

    def put(self, raw: bytes, request: Request) -> None:
        """Remember a request, and forget all others where there are too many."""
        if len(raw) <= self.MAX_LENGTH:
            if len(self._seen) >= self.MAX_REQUESTS:
                self._seen.clear()
            self._seen[raw] = request


class _Head:
    """Collector of what llhttp reads of one request.

    The parser holds it and it holds no parser, so a closed connection leaves no cycle of references behind.
    """

    __slots__ = ("fields", "is_complete", "target")

    def __init__(self) -> None:
        self.target = b""
        self.fields: dict[bytes, bytes] = {}
        self.is_complete = False

    def on_url(self, piece: bytes) -> None:
        """Append a piece of the target; it may come in several."""
        self.target += piece

    def on_header(self, name: bytes, value: bytes) -> None:
        """Add a field, joined to earlier values of it."""
        key = name.lower()
        if key in REQUEST_FIELDS:
            fields = self.fields
            fields[key] = value if key not in fields else fields[key] + b", " + value

    def on_headers_complete(self) -> None:
        """Note the end of the head, which ends every request without a body."""
        self.is_complete = True


class RequestReader:
    """Reader of one request after another off one connection."""

    __slots__ = ("_cache", "_head", "_parser", "_partial")

    def __init__(self, cache: RequestCache) -> None:
        self._cache = cache
        self._partial = b""
        self._head: _Head
        self._parser: HttpRequestParser

    @property
    def is_midway(self) -> bool:
        """True if a request has begun and is not complete; empty lines begin none."""
        return bool(self._partial) and bool(self._partial.strip(b"\r\n"))

    def feed(self, data: memoryview) -> Request | Fault | None:
        """Parse received data: return a request, its fault, or None if it is incomplete.

        After a Fault that does not keep the connection alive nothing more may be fed.
        """
        if self._partial:
            raw = self._partial + data.tobytes()
        else:
            raw = data.tobytes()
            known = self._cache.get(raw)
            if known is not None:
                return known
            self._head = _Head()
            self._parser = HttpRequestParser(self._head)
        if len(raw) > HEAD_LIMIT:
            return Fault(HEAD_TOO_LONG if 0 <= raw.find(b"\r\n") <= TARGET_LIMIT else LINE_TOO_LONG)
        return self._parse(raw, data)

    def _parse(self, raw: bytes, data: memoryview) -> Request | Fault | None:
        parser = self._parser
        try:
            parser.feed_data(data)
        except HttpParserUpgrade:
            # RFC 9110, 7.8: an upgrade may be ignored. llhttp reads nothing more after one.
            is_connect = parser.get_method() == b"CONNECT"
            return Fault(METHOD) if is_connect else self._finish(raw, parser)
        except HttpParserError as error:
            return self._parse_fault(raw, error)
        if self._head.is_complete:
            return self._finish(raw, parser)
        self._partial = raw
        return Fault(LINE_TOO_LONG) if len(self._head.target) > TARGET_LIMIT else None

    def _finish(self, raw: bytes, parser: HttpRequestParser) -> Request | Fault:
        self._partial = b""
        if len(self._head.target) > TARGET_LIMIT:
            return Fault(LINE_TOO_LONG)
        return self._judge(raw, parser.get_method(), parser.get_http_version())

    def _parse_fault(self, raw: bytes, error: Exception) -> Fault:
        problem = str(error)
        if isinstance(error, HttpParserInvalidMethodError) and _METHOD.match(raw):
            return Fault(METHOD)
        if "HTTP version" in problem or problem.startswith("Pause on PRI"):
            return Fault(VERSION)
        if self._head.is_complete and raw.find(END_OF_HEAD) + len(END_OF_HEAD) < len(raw):
            return Fault(ONE_AT_A_TIME)
        return Fault(MALFORMED)

    def _judge(self, raw: bytes, method: bytes, version: str) -> Request | Fault:
        target, fields = self._head.target, self._head.fields
        head = raw[_EMPTY_LINES.match(raw).end() :]  # type: ignore[union-attr]  # it matches nothing too
        is_legacy = version == "1.0"
        if version != "1.1" and not is_legacy:
            return Fault(VERSION)
        if method != b"GET" or not head.startswith(b"GET %b HTTP/%b\r\n" % (target, version.encode())):
            return self._judge_line(head, method, version)
        rest = head[head.find(END_OF_HEAD) + len(END_OF_HEAD) :]
        if rest not in _ONE_EMPTY_LINE and not has_body(fields):
            return Fault(ONE_AT_A_TIME)
        fault = request_fault(fields, needs_host=not is_legacy)
        if fault is not None:
            return Fault(fault)
        absolute = _ABSOLUTE.fullmatch(target)
        if absolute is not None:
            if not is_host(absolute["authority"]):
                return Fault(MALFORMED)
            target = absolute["path"]
        request = Request(target, fields, not is_legacy and not wants_close(fields), is_legacy)
        self._cache.put(raw, request)
        return request

    def _judge_line(self, head: bytes, method: bytes, version: str) -> Fault:
        fields = self._head.fields
        line = b"%b %b HTTP/%b\r\n" % (method, self._head.target, version.encode())
        if method == b"GET" or not head.startswith(line):
            return Fault(MALFORMED)
        is_alone = head.find(END_OF_HEAD) + len(END_OF_HEAD) == len(head) and not has_body(fields)
        is_sound = version == "1.1" and is_alone and request_fault(fields) is None and not wants_close(fields)
        return Fault(METHOD, keeps_alive=is_sound, is_head=method == b"HEAD")
