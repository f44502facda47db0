"""Heads and chunks beside a strict reader of RFC 9112, with every defect that two readers may take differently."""

import re
from typing import NamedTuple

from hypothesis import example, given, settings
from hypothesis import strategies as st

from k8s_consul_registrar.proxy.refusals import Malformed
from k8s_consul_registrar.proxy.request import Fault, Request, RequestCache, RequestReader
from k8s_consul_registrar.proxy.response import AnswerRules, Chunked, HeadCache

# RFC 9110, 5.1 and 5.5: no space before the colon, no control character but the tab.
FIELD = re.compile(rb"(?P<name>[!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*(?P<value>[\t\x20-\x7e\x80-\xff]*?)[ \t]*")
REQUEST_LINE = re.compile(rb"GET (?P<target>[\x21-\x7e\x80-\xff]+) HTTP/1\.(?P<minor>[01])")
# The reason may hold anything: it is never passed on.
STATUS_LINE = re.compile(rb"HTTP/1\.[0-9] (?P<status>[1-9][0-9]{2})(?: [^\r\n]*)?")
# Values below that are a host, too.
HOST = re.compile(rb"[a-z0-9_+-]+")


class Read(NamedTuple):
    """A head as the strict reader takes it: the match of its first line, and its fields in lower case."""

    first: re.Match[bytes]
    fields: dict[bytes, list[bytes]]


def strict(raw: bytes, first: re.Pattern[bytes]) -> Read | None:
    """Return a whole head, its empty line included; None for any defect."""
    line, *lines = raw.split(b"\r\n")
    found = first.fullmatch(line)
    if found is None or lines[-2:] != [b"", b""]:
        return None
    fields: dict[bytes, list[bytes]] = {}
    for each in lines[:-2]:
        field = FIELD.fullmatch(each)
        if field is None:
            return None
        fields.setdefault(field["name"].lower(), []).append(field["value"])
    return Read(found, fields)


NAMES = st.sampled_from(
    [
        b"Host",
        b"Content-Length",
        b"content-length",
        b"Transfer-Encoding",
        b"Connection",
        b"Accept",
        b"X",
        b"",
        b"X\x00",
    ]
)
VALUES = st.sampled_from(
    [b"a", b"0", b"5", b"6", b"-5", b"+5", b"5, 5", b"5_0", b"0x5", b"5 5", b"chunked", b"xchunked", b"close",
     b"a\x00b", b"a\rb", b"a\x7fb", b"a\xffb", b"a\tb", b"", b"99999999999999999999"]
)  # fmt: skip
COLONS = st.sampled_from([b": ", b": ", b":", b":\t", b" : ", b"\t:", b" ", b": \x0b"])
ENDS = st.sampled_from([b"\r\n", b"\r\n", b"\r\n", b"\r\n", b"\n", b"\r", b"\r\n ", b"\r\n\t", b"\x00\r\n"])
LINES = st.tuples(NAMES, COLONS, VALUES, ENDS).map(b"".join)
FIELDS = st.lists(
    st.one_of(LINES, st.just(b"Host: a\r\n"), st.just(b"Content-Length: 5\r\n")), max_size=4
).map(b"".join)
TARGETS = st.sampled_from(
    [b"/x", b"/x", b"/x?y=z", b"/x y", b" /x", b"/x ", b"/x\ty", b"/\x00", b"/\x7f", b"/\r", b""]
)
SPACES = st.sampled_from([b" ", b" ", b" ", b"  ", b"\t", b""])
REQUEST_LINES = st.tuples(
    st.just(b"GET"), SPACES, TARGETS, SPACES, st.sampled_from([b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.0"]), ENDS
).map(b"".join)
STATUS_LINES = st.tuples(
    st.sampled_from([b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.0"]),
    SPACES,
    st.sampled_from([b"200", b"200", b"302", b"099", b"-200", b"+200", b"2000", b"20", b"2 00"]),
    SPACES,
    st.sampled_from([b"OK", b"OK", b"", b"O\x00K", b"O\rK"]),
    ENDS,
).map(b"".join)


def feed(raw: bytes, cut: int) -> Request | Fault | None:
    """Read a request that comes in two pieces, the second of which may be empty."""
    reader = RequestReader(RequestCache())
    got = reader.feed(memoryview(raw[:cut]))
    return reader.feed(memoryview(raw[cut:])) if got is None and cut < len(raw) else got


@settings(max_examples=150, deadline=None)
@given(line=REQUEST_LINES, fields=FIELDS, cut=st.integers(0, 200))
@example(b"GET /x HTTP/1.1\r\n", b"Host: a\nX: y\r\n", 200)
@example(b"GET /x HTTP/1.1\r\n", b"Host: a\r\nX: y\r\n z\r\n", 200)
@example(b"GET /x HTTP/1.1\r\n", b"Host: a\r\nX: y\x00z\r\n", 200)
@example(b"GET /x HTTP/1.1\r\n", b"Host: a\r\nContent-Length: 0\r\nContent-Length: 5\r\n", 200)
@example(b"GET /x HTTP/1.1\r\n", b"Host: a\r\nContent-Length: 5\r\nContent-Length: 0\r\n", 200)
@example(b"GET /x HTTP/1.1\r\n", b"Host: a\r\nContent-Length: 0\r\nTransfer-Encoding: chunked\r\n", 200)
@example(b"GET /x HTTP/1.1\r\n", b"Host: a\r\nTransfer-Encoding: xchunked\r\n", 200)
@example(b"GET /x HTTP/1.1\r\n", b"Host: a\r\nTransfer-Encoding: chunked\r\n", 200)
@example(b"GET /x HTTP/1.1\r\n", b"Host: a\r\nContent-Length: 5\r\n", 200)
@example(b"GET /x HTTP/1.1\r\n", b"Host : a\r\n", 200)
@example(b"GET /x HTTP/1.1\r\n", b"Host: a\r\nContent-Length: -5\r\n", 200)
@example(b"GET /x y HTTP/1.1\r\n", b"Host: a\r\n", 200)
@example(b"GET  /x HTTP/1.1\r\n", b"Host: a\r\n", 200)
@example(b"GET /x\tHTTP/1.1\r\n", b"Host: a\r\n", 200)
@example(b"GET /x HTTP/1.1 \r\n", b"Host: a\r\n", 200)
def test_request_is_what_a_strict_reader_takes(line: bytes, fields: bytes, cut: int) -> None:
    """Takes a head for a request only if a strict reader does, with the same target and without a body."""
    raw = line + fields + b"\r\n"
    got = feed(raw, cut)
    read = strict(raw, REQUEST_LINE)
    hosts = [] if read is None else read.fields.get(b"host", [])
    is_sound = (
        read is not None
        and read.first["target"].startswith(b"/")
        and (len(hosts) == 1 or (not hosts and read.first["minor"] == b"0"))
        and all(HOST.fullmatch(host) for host in hosts)
        and b"transfer-encoding" not in read.fields
        and read.fields.get(b"content-length", [b"0"]) == [b"0"]
    )
    assert isinstance(got, Request) == is_sound, (raw, got)
    if isinstance(got, Request) and read is not None:
        assert (got.target, got.is_legacy) == (read.first["target"], read.first["minor"] == b"0")


@settings(max_examples=150, deadline=None)
@given(line=STATUS_LINES, fields=FIELDS, may_end_by_close=st.booleans())
@example(b"HTTP/1.1 200 OK\r\n", b"Content-Length: 5\nX: y\r\n", True)
@example(b"HTTP/1.1 200 OK\n", b"Content-Length: 5\r\n", True)
@example(b"HTTP/1.1 200 OK\r\n", b"Content-Length: 5\r\nX: y\r\n z\r\n", True)
@example(b"HTTP/1.1 200 OK\r\n", b"Content-Length: 5\r\nX: y\x00z\r\n", True)
@example(b"HTTP/1.1 200 OK\r\n", b"Content-Length: 5\r\nContent-Length: 6\r\n", True)
@example(b"HTTP/1.1 200 OK\r\n", b"Content-Length: 5, 5\r\n", True)
@example(b"HTTP/1.1 200 OK\r\n", b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n", True)
@example(b"HTTP/1.1 200 OK\r\n", b"Transfer-Encoding: xchunked\r\n", True)
@example(b"HTTP/1.1 200 OK\r\n", b"Content-Length : 5\r\n", True)
@example(b"HTTP/1.1 200 OK\r\n", b"Content-Length: -5\r\n", True)
@example(b"HTTP/1.1 200 OK\r\n", b"Content-Length: +5\r\n", True)
@example(b"HTTP/1.1 200 OK\r\n", b"Content-Length: 5_0\r\n", True)
@example(b"HTTP/1.1 200 OK\r\n", b"Content-Length: 99999999999999999999\r\n", True)
def test_answer_is_what_a_strict_reader_takes(line: bytes, fields: bytes, may_end_by_close: bool) -> None:
    """Takes a head for an answer only if a strict reader does, with the same status and one framing."""
    raw = line + fields + b"\r\n"
    try:
        got = HeadCache(AnswerRules(may_end_by_close=may_end_by_close)).read(raw)
    except Malformed:
        return
    read = strict(raw, STATUS_LINE)
    assert read is not None, (raw, got)
    assert got.status == int(read.first["status"])
    if got.status != 200:
        return
    codings, lengths = read.fields.get(b"transfer-encoding", []), set(read.fields.get(b"content-length", []))
    if got.ends_by_close:
        assert may_end_by_close
        assert not codings
        assert not lengths
    elif got.length is None:
        assert ([each.lower() for each in codings], lengths) == ([b"chunked"], set())
    else:
        assert not codings
        (length,) = lengths
        assert length.isdigit()
        assert got.length == int(length)


SIZE_LINE = re.compile(rb"([0-9A-Fa-f]+)(?:[ \t]*;[\t\x20-\x7e\x80-\xff]*)?")


def end_of_chunks(body: bytes) -> int | None:
    """Return where a strict reader finds the end of a body in chunks, None if there is none or for any defect."""
    at = 0
    while (end := body.find(b"\r\n", at)) >= 0:
        size = SIZE_LINE.fullmatch(body[at:end])
        if size is None:
            return None
        at, length = end + 2, int(size[1], 16)
        if not length:
            return _end_of_trailer(body, at)
        if body[at + length : at + length + 2] != b"\r\n":
            return None
        at += length + 2
    return None


def _end_of_trailer(body: bytes, at: int) -> int | None:
    while (end := body.find(b"\r\n", at)) > at:
        if FIELD.fullmatch(body[at:end]) is None:
            return None
        at = end + 2
    return at + 2 if end == at else None


SIZES = st.sampled_from([b"1", b"5", b"05", b"5;a=b", b"5 ;a", b"5 ", b" 5", b"-5", b"+5", b"0x5", b"5_", b"5\n", b"",
                         b"ffffffffffffffff5", b"5;\x00"])  # fmt: skip
CHUNKS = st.lists(
    st.tuples(
        SIZES,
        st.sampled_from([b"\r\n", b"\r\n", b"\n", b"\r"]),
        st.sampled_from([b"a", b"hello", b"hell"]),
        ENDS,
    ).map(b"".join),
    max_size=3,
).map(b"".join)
LASTS = st.sampled_from(
    [
        b"0\r\n\r\n",
        b"0\r\n\r\n",
        b"00\r\n\r\n",
        b"0\r\nX: y\r\n\r\n",
        b"0\n\n",
        b"0\r\n\n",
        b"0\r\nX : y\r\n\r\n",
        b"-0\r\n\r\n",
    ]
)


@settings(max_examples=150, deadline=None)
@given(chunks=CHUNKS, last=LASTS, more=st.sampled_from([b"", b"", b"\r\n", b"HTTP/1.1 200 OK\r\n\r\n"]))
@example(b"5\nhello\r\n", b"0\r\n\r\n", b"")
@example(b"5\r\nhello\n", b"0\r\n\r\n", b"")
@example(b"-5\r\nhello\r\n", b"0\r\n\r\n", b"")
@example(b"0x5\r\nhello\r\n", b"0\r\n\r\n", b"")
@example(b"ffffffffffffffff5\r\nhello\r\n", b"0\r\n\r\n", b"")
def test_chunks_end_where_a_strict_reader_ends_them(chunks: bytes, last: bytes, more: bytes) -> None:
    """Finds the end of a body only where a strict reader does; another answer follows only right after it."""
    body = chunks + last + more
    framing = Chunked()
    try:
        has_ended = framing.take(memoryview(body))
    except Malformed:
        return
    end = end_of_chunks(body)
    assert has_ended == (end is not None), body
    assert not (has_ended and framing.is_exact) or end == len(body)


def test_an_endless_extension_of_a_chunk_gathers_nothing() -> None:
    """Keeps none of it, and never takes the body for complete in a form after which another answer may follow."""
    framing = Chunked()
    framing.take(memoryview(b"5;a="))
    for _ in range(100):
        assert not framing.take(memoryview(b"x" * 1000))
    assert len(framing._tail) <= 7
    assert framing.take(memoryview(b"\r\nhello\r\n0;b\r\n\r\n"))
    assert not framing.is_exact
