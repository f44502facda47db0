"""The answer of an upstream, read without sockets: its head, and where its body ends.

llhttp parses both. The body's bytes are passed on unchanged: llhttp in its strict mode accepts a chunked body
only in the form of RFC 9112 (no bare LF, no folding, no spaces), so the next reader finds the same end.
"""

from http import HTTPStatus
from typing import NamedTuple

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

from k8s_consul_registrar.proxy.headers import RESPONSE_FIELDS, Fields, response_start, wants_close
from k8s_consul_registrar.proxy.refusals import Malformed

HEAD_LIMIT = 64 * 1024
VERSION = b"HTTP/1."
SWITCHING_PROTOCOLS = 101
# Interim answers (1xx) accepted before the final one, and their size in all: each costs as much to read.
MAX_INTERIM = 5
MAX_INTERIM_SIZE = 16 * 1024
END_OF_HEAD = b"\r\n\r\n"
NO_FRAMING = "its body has neither a length nor chunks"
REDIRECTS = frozenset({301, 302, 303, 307, 308})
# Fields that come once (RFC 9110, 5.3), or say the same as often as they come.
_SINGLETONS = frozenset({b"content-type", b"location"})
_REPEATABLE = frozenset({b"content-encoding"})
_LENGTH = b"content-length:"
LAST_CHUNK = b"0\r\n\r\n"
_ANY_CHUNKED_HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


class Head(NamedTuple):
    """The head of an answer; `fields` holds only those the relay uses."""

    status: int
    is_http_1_1: bool
    fields: Fields


class _HeadReader:
    """Collector of the fields that llhttp reads of one head."""

    __slots__ = ("fields", "is_complete")

    def __init__(self) -> None:
        self.fields: dict[bytes, bytes] = {}
        self.is_complete = False

    def on_header(self, name: bytes, value: bytes) -> None:
        key = name.lower()
        if key in RESPONSE_FIELDS:
            fields = self.fields
            if key not in fields:
                fields[key] = value
            elif key not in _SINGLETONS and not (key in _REPEATABLE and fields[key] == value):
                fields[key] += b", " + value

    def on_headers_complete(self) -> None:
        self.is_complete = True


def check_beginning(part: bytes) -> None:
    """Raise Malformed for the beginning of an answer that no end would make a sound head."""
    if part[: len(VERSION)] != VERSION[: len(part)]:
        raise Malformed("it does not speak HTTP/1.1")
    if b"\n\n" in part:
        raise Malformed("its head ends its lines without a carriage return")


def read_head(head: memoryview) -> Head:
    """Parse a whole head, its empty line included; raises Malformed."""
    if head[: len(VERSION)] != VERSION:
        raise Malformed("it does not speak HTTP/1.1")
    reader = _HeadReader()
    parser = HttpResponseParser(reader)
    try:
        parser.feed_data(head)
    except HttpParserUpgrade:
        raise Malformed("it switches to another protocol") from None
    except HttpParserError as error:
        single = _with_one_length(head.tobytes())
        if single is not None:
            return read_head(memoryview(single))
        raise Malformed(f"its head does not parse: {error}") from None
    if not reader.is_complete:
        raise Malformed("its head does not end where it should")
    status = parser.get_status_code()
    if status < HTTPStatus.CONTINUE:
        raise Malformed("its status is below 100")
    return Head(status, head[len(VERSION)] == ord("1"), reader.fields)


def _with_one_length(head: bytes) -> bytes | None:
    """Return a head that announces one length several times with only one of them, None for any other head."""
    lines = head.split(b"\r\n")
    lengths = [line for line in lines[1:] if line[: len(_LENGTH)].lower() == _LENGTH]
    if len(lengths) < 2 or len({line[len(_LENGTH) :].strip(b" \t") for line in lengths}) > 1:
        return None
    others = [line for line in lines[1:] if line[: len(_LENGTH)].lower() != _LENGTH]
    return b"\r\n".join([lines[0], lengths[0], *others])


class Counted:
    """A body of an announced length."""

    __slots__ = ("left",)

    is_exact = True

    def __init__(self, length: int) -> None:
        self.left = length

    @property
    def field(self) -> bytes:
        """The line of the head that announces it."""
        return b"Content-Length: %d\r\n" % self.left

    def take(self, body: memoryview) -> bool:
        """Follow some bytes and return True if the body ends with them; raises Malformed beyond its end."""
        self.left -= len(body)
        if self.left < 0:
            raise Malformed("it sends more than the length it announced")
        return self.left == 0


class Chunked:
    """A body in chunks; llhttp follows the framing without a Python object for each chunk."""

    __slots__ = ("_ends", "_parser", "_tail")

    field = b"Transfer-Encoding: chunked\r\n"

    def __init__(self) -> None:
        # A parser of its own that ignores headers: an endless trailer would otherwise gather in memory.
        self._ends = _Ends()
        self._parser = HttpResponseParser(self._ends)
        self._parser.feed_data(_ANY_CHUNKED_HEAD)
        self._tail = b""

    def take(self, body: memoryview) -> bool:
        """Follow some bytes and return True if the body ends with them; raises Malformed beyond its end."""
        if not body:
            return False
        try:
            self._parser.feed_data(body)
        except (HttpParserError, HttpParserUpgrade) as error:
            raise Malformed(f"its chunks do not parse: {error}") from None
        ends = self._ends
        if ends.begun > 1:
            raise Malformed("it sends more than its chunks")
        self._tail = (self._tail + body[-7:].tobytes())[-7:]
        return ends.ended

    @property
    def is_exact(self) -> bool:
        """True if the body ended in the plain form, with nothing after it that llhttp would skip.

        Trailers or further line ends are passed on too, but then no other answer may follow on either
        connection.
        """
        return self._tail in (b"\r\n0\r\n\r\n", b"0\r\n\r\n")


class UntilClose:
    """A body that ends with the connection; the client gets it in chunks, which show that it is complete."""

    __slots__ = ()

    field = Chunked.field
    is_exact = True

    def take(self, body: memoryview) -> bool:  # noqa: ARG002 - of every framing
        """Return False: only the end of the connection ends the body."""
        return False


def in_a_chunk(body: memoryview) -> memoryview:
    """Return data as one chunk; no data is none, since an empty chunk would be the last one."""
    return memoryview(b"%x\r\n%b\r\n" % (len(body), body.tobytes())) if body else body


class _Ends:
    __slots__ = ("begun", "ended")

    def __init__(self) -> None:
        self.begun = 0
        self.ended = False

    def on_message_begin(self) -> None:
        self.begun += 1

    def on_message_complete(self) -> None:
        self.ended = True


def framing_of(head: Head, *, may_end_by_close: bool = False) -> Counted | Chunked | UntilClose:
    """Return the framing of an answer's body (RFC 9112, 6.3); raises Malformed if there is none."""
    coding = head.fields.get(b"transfer-encoding")
    length = head.fields.get(b"content-length")
    if coding is not None:
        if length is not None or not head.is_http_1_1 or coding.strip().lower() != b"chunked":
            raise Malformed("its transfer encoding is not plain chunks")
        return Chunked()
    if length is None and may_end_by_close:
        return UntilClose()
    if length is None:
        raise Malformed(NO_FRAMING)
    if not length.isdigit() or len(length) > 18:
        raise Malformed("its length is no number")
    return Counted(int(length))


class Answer(NamedTuple):
    """The parsed head of an answer; for a 200, `start` is the start of the answer to the client.

    `length` is the body's, None if it comes in chunks or ends with the connection. `keeps` is True if another
    answer may follow on the connection. `location` is that of a redirect.
    """

    status: int
    start: bytes
    length: int | None
    keeps: bool
    ends_by_close: bool = False
    location: bytes = b""


def read_answer(raw: memoryview, rules: "AnswerRules") -> Answer:
    """Parse a whole head, its empty line included; raises Malformed."""
    head = read_head(raw)
    if head.status != HTTPStatus.OK:
        location = head.fields.get(b"location", b"") if head.status in REDIRECTS else b""
        return Answer(head.status, b"", None, keeps=False, location=location)
    framing = framing_of(head, may_end_by_close=rules.may_end_by_close)
    content_type = head.fields.get(b"content-type", b"").strip() or rules.content_type
    try:
        start = response_start(content_type or None, head.fields.get(b"content-encoding"))
    except ValueError as error:
        raise Malformed(str(error)) from None
    return Answer(
        head.status,
        start if isinstance(framing, UntilClose) else start + framing.field,
        framing.left if isinstance(framing, Counted) else None,
        head.is_http_1_1 and not wants_close(head.fields),
        isinstance(framing, UntilClose),
    )


class AnswerRules(NamedTuple):
    """Allowances for one kind of upstream: its type of content where it states none, and bodies without length."""

    may_end_by_close: bool = False
    content_type: bytes = b""


class HeadCache:
    """Heads of answers seen lately, by their bytes.

    A head holds its time to the second and otherwise the same for all kubelets: with many scrapes a second
    most heads were seen before, and the parsed head depends only on the bytes.
    """

    __slots__ = ("_rules", "_seen", "get")

    MAX_LENGTH = 1024
    MAX_HEADS = 256

    def __init__(self, rules: AnswerRules | None = None) -> None:
        self._rules = rules or AnswerRules()
        self._seen: dict[bytes, Answer] = {}
        self.get = self._seen.get

    def read(self, raw: bytes) -> Answer:
        """Return a whole head parsed; raises Malformed."""
        known = self.get(raw)
        if known is not None:
            return known
        answer = read_answer(memoryview(raw), self._rules)
        if answer.status == HTTPStatus.OK and len(raw) <= self.MAX_LENGTH:
            if len(self._seen) >= self.MAX_HEADS:
                self._seen.clear()
            self._seen[raw] = answer
        return answer
