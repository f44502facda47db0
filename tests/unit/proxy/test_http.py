"""Requests and answers read without a socket, whole and in any pieces."""

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k8s_consul_registrar.proxy import headers, request, response
from k8s_consul_registrar.proxy.nodes import Endpoint
from k8s_consul_registrar.proxy.refusals import Malformed, Outcome, Refusal
from k8s_consul_registrar.proxy.request import Fault, Request, RequestCache, RequestReader
from k8s_consul_registrar.proxy.response import Chunked, Counted, HeadCache, framing_of, read_head
from k8s_consul_registrar.proxy.routes import Route
from k8s_consul_registrar.tls import printable

GET = (
    b"GET /api/v1/nodes/x/proxy/metrics/cadvisor?a=b HTTP/1.1\r\nHost: proxy.example:8080\r\n"
    b"User-Agent: Prometheus/2.53.3\r\nAccept: text/plain\r\nACCEPT: */*;q=0.1\r\nAccept-Encoding: gzip\r\n"
    b"X-Prometheus-Scrape-Timeout-Seconds: 10\r\n\r\n"
)
HEARD = Request(
    b"/api/v1/nodes/x/proxy/metrics/cadvisor?a=b",
    {
        b"host": b"proxy.example:8080",
        b"accept": b"text/plain, */*;q=0.1",
        b"accept-encoding": b"gzip",
        b"x-prometheus-scrape-timeout-seconds": b"10",
    },
    keeps_alive=True,
)


def feed(reader: RequestReader, *pieces: bytes) -> Request | Fault | None:
    """Feed pieces one after another, the last of which must complete what is read."""
    *firsts, last = pieces
    for piece in firsts:
        assert reader.feed(memoryview(piece)) is None
    return reader.feed(memoryview(last))


def test_request_after_request() -> None:
    """Reads one request after another, whole, byte by byte and cut anywhere, nothing left of the one before."""
    reader = RequestReader(RequestCache())
    assert feed(reader, GET) == HEARD
    assert feed(reader, *(bytes([byte]) for byte in GET)) == HEARD
    for cut in range(1, len(GET)):
        assert feed(reader, GET[:cut], GET[cut:]) == HEARD
    bare = feed(reader, b"GET /x HTTP/1.1\r\nHost: a\r\nConnection: Close\r\n\r\n")
    assert bare == Request(b"/x", {b"host": b"a", b"connection": b"Close"}, keeps_alive=False)


@pytest.mark.parametrize("host", ["a", "a:80", "a.b-c.d:", "192.0.2.1:8080", "[2001:db8::1]:8080", "_x.y"])
def test_sound_hosts(host: str) -> None:
    """Takes names, IPv4 and bracketed IPv6 addresses, with or without a port."""
    assert isinstance(
        feed(RequestReader(RequestCache()), f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()), Request
    )


@pytest.mark.parametrize(
    "host", ["", "a b", "a/b", "a@b", "2001:db8::1", "[::1", "a:b", "a:123456", "a,b", "é", "%zz"]
)
def test_unsound_hosts(host: str) -> None:
    """Refuses what is no host with a port."""
    heard = feed(RequestReader(RequestCache()), f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    assert isinstance(heard, Fault)
    assert heard.refusal.status == 400
    assert not heard.keeps_alive


def test_limits_of_a_request() -> None:
    """Tells a target too long from a head too long, however they come in."""
    long_target = b"GET /" + b"a" * request.TARGET_LIMIT + b" HTTP/1.1\r\nHost: a\r\n\r\n"
    assert feed(RequestReader(RequestCache()), long_target) == Fault(request.LINE_TOO_LONG)
    just = b"GET /" + b"a" * (request.TARGET_LIMIT - 1) + b" HTTP/1.1\r\nHost: a\r\n\r\n"
    assert isinstance(feed(RequestReader(RequestCache()), just), Request)
    reader, heard = RequestReader(RequestCache()), None
    sent = 0
    for piece in [b"GET / HTTP/1.1\r\nHost: a\r\n", *[b"X: " + b"y" * 95 + b"\r\n"] * 1000]:
        heard = reader.feed(memoryview(piece))
        sent += len(piece)
        if heard is not None:
            break
    assert heard == Fault(request.HEAD_TOO_LONG)
    assert sent <= request.HEAD_LIMIT + 200


@settings(deadline=None)
@given(st.lists(st.binary(max_size=40), max_size=6), st.booleans())
def test_any_bytes_as_requests(pieces: list[bytes], begins_well: bool) -> None:
    """Takes any bytes without an exception, and nothing but a sound GET as a request."""
    reader = RequestReader(RequestCache())
    for piece in [GET[:30], *pieces] if begins_well else pieces:
        heard = reader.feed(memoryview(piece))
        if isinstance(heard, Request):
            assert heard.target.startswith(b"/")
            assert b"host" in heard.fields
        if isinstance(heard, Fault):
            return


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nX-Other: y\r\n"


def test_response_head() -> None:
    """Reads the fields the relay uses, joined where they come twice."""
    head = read_head(memoryview(HEAD + b"Connection: a\r\nCONNECTION: close\r\nContent-Length: 5\r\n\r\n"))
    assert head == response.Head(
        200,
        is_http_1_1=True,
        fields={b"content-type": b"text/plain", b"connection": b"a, close", b"content-length": b"5"},
    )
    assert headers.wants_close(head.fields)
    assert isinstance(framing_of(head), Counted)


@settings(deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=30), max_size=5), st.lists(st.integers(1, 40), min_size=1))
def test_chunks_in_any_pieces(chunks: list[bytes], cuts: list[int]) -> None:
    """Finds the end of chunks exactly, wherever the reads cut them."""
    body = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"
    framing = Chunked()
    start = 0
    for turn in range(len(body)):
        end = min(start + cuts[turn % len(cuts)], len(body))
        is_end = framing.take(memoryview(body[start:end]))
        assert is_end == (end == len(body))
        start = end
        if is_end:
            break
    assert start == len(body)
    assert framing.is_exact


@pytest.mark.parametrize(
    "body",
    [b"0\r\nX: y\r\n\r\n", b"00\r\n\r\n", b"0;a=b\r\n\r\n", b"1\r\na\r\n0\r\n\r\n\r\n", b"0\r\nX: 0\r\n\r\n"],
)
def test_chunks_that_end_oddly(body: bytes) -> None:
    """Passes them on, but not as an answer another may follow, wherever they are cut."""
    for cut in range(len(body)):
        framing = Chunked()
        ended = framing.take(memoryview(body[:cut]))
        assert framing.take(memoryview(body[cut:])) or ended
        assert ended or not framing.is_exact


def test_endless_trailer_gathers_nothing() -> None:
    """Keeps none of a trailer that does not end."""
    framing = Chunked()
    framing.take(memoryview(b"0\r\nX: "))
    for _ in range(100):
        assert not framing.take(memoryview(b"y" * 1000))
    assert len(framing._tail) <= 7


@settings(deadline=None)
@given(st.binary(max_size=80))
def test_any_bytes_as_chunks(body: bytes) -> None:
    """Calls nothing but Malformed on any bytes."""
    with contextlib.suppress(Malformed):
        Chunked().take(memoryview(body))
    with contextlib.suppress(Malformed):
        read_head(memoryview(b"HTTP/1.1 200 OK\r\n" + body + b"\r\n\r\n"))


def test_counted() -> None:
    """Ends with the last byte announced, and finds one more."""
    assert Counted(0).take(memoryview(b""))
    framing = Counted(5)
    assert not framing.take(memoryview(b"abcd"))
    assert framing.take(memoryview(b"e"))
    with pytest.raises(Malformed):
        framing.take(memoryview(b"f"))


def test_request_to_the_kubelet() -> None:
    """Writes the request's head from the route and the few fields that pass."""
    route = Route(Endpoint("2001:db8::1", 10250, "", ""), "/metrics/cadvisor")
    head = headers.request_start(route) + headers.request_rest(b"text/plain", None, "secret")
    assert head.startswith(
        b"GET /metrics/cadvisor HTTP/1.1\r\nHost: [2001:db8::1]:10250\r\nUser-Agent: k8s-consul-"
    )
    assert head.endswith(b"\r\nAccept: text/plain\r\nAuthorization: Bearer secret\r\n\r\n")
    for token in ("a\r\nb", "a\x00", "ü\u2028"):
        with pytest.raises(ValueError):  # noqa: PT011 - UnicodeEncodeError is one, and both mean the same here
            headers.request_rest(None, None, token)


def test_refusals_are_whole_answers() -> None:
    """Writes a refusal with its length, and what its status asks for."""
    raw = headers.refusal_bytes(Refusal(405, Outcome.METHOD, "no"), close=True)
    assert raw.startswith(b"HTTP/1.1 405 Method Not Allowed\r\n")
    assert b"\r\nAllow: GET\r\n" in raw
    assert b"\r\nConnection: close\r\n" in raw
    assert raw.endswith(
        b"Content-Length: 3\r\nX-Content-Type-Options: nosniff\r\nAllow: GET\r\nConnection: close\r\n\r\nno\n"
    )
    assert headers.refusal_bytes(Refusal(405, Outcome.METHOD, "no"), close=False, with_body=False).endswith(
        b"\r\n\r\n"
    )


def test_texts_of_libraries_are_cut() -> None:
    """Lets no control character and no endless text of a peer's making into an answer."""
    assert printable("a\r\nb\x1b[31mé") == "a??b?[31m?"
    assert len(printable("x" * 1000)) == 200


def test_heads_are_remembered_by_their_bytes() -> None:
    """Makes of a head seen before what was made of it first, and tells heads apart that differ in any byte."""
    memory = HeadCache()
    first = memory.read(HEAD + b"Date: Sun, 22 Nov 2026 16:00:00 GMT\r\nContent-Length: 5\r\n\r\n")
    assert memory.read(HEAD + b"Date: Sun, 22 Nov 2026 16:00:00 GMT\r\nContent-Length: 5\r\n\r\n") is first
    assert first.length == 5
    assert first.start.endswith(b"Content-Length: 5\r\n")
    other = memory.read(HEAD + b"Date: Sun, 22 Nov 2026 16:00:00 GMT\r\nContent-Length: 6\r\n\r\n")
    assert (other.length, first.length) == (6, 5)
    closing = memory.read(HEAD + b"Content-Length: 5\r\nConnection: close\r\n\r\n")
    assert (closing.keeps, first.keeps) == (False, True)


def test_only_sound_heads_are_remembered() -> None:
    """Judges every head that is none of a 200 again, and holds a bounded number of the others."""
    memory = HeadCache()
    refused = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n"
    assert memory.read(refused) is not memory.read(refused)
    for _ in range(2):
        with pytest.raises(Malformed):
            memory.read(HEAD + b"\r\n")
    long = HEAD + b"X: " + b"y" * HeadCache.MAX_LENGTH + b"\r\nContent-Length: 5\r\n\r\n"
    assert memory.read(long) is not memory.read(long)
    for number in range(3 * HeadCache.MAX_HEADS):
        assert memory.read(HEAD + b"Content-Length: %d\r\n\r\n" % number).length == number
        assert len(memory._seen) <= HeadCache.MAX_HEADS


LINES = st.sampled_from(
    [
        b"HTTP/1.1 200 OK",
        b"HTTP/1.0 200 OK",
        b"HTTP/1.1 099 X",
        b"HTTP/1.1 302 Found",
        b"Content-Length: 5",
        b"content-length:5",
        b"Content-Length: 6",
        b"Content-Length: 5, 5",
        b"Transfer-Encoding: chunked",
        b"Transfer-Encoding: gzip, chunked",
        b"Content-Type: text/plain",
        b"Content-Type: a\x00b",
        b"Location: /metrics/",
        b"Connection: close",
        b"Upgrade: h2c",
        b" folded",
        b": nameless",
        b"",
    ]
)


@settings(deadline=None)
@given(
    lines=st.lists(st.one_of(LINES, st.binary(max_size=20)), max_size=8),
    starts_well=st.booleans(),
    may_end_by_close=st.booleans(),
)
def test_any_head_is_an_answer_or_malformed(
    lines: list[bytes], starts_well: bool, may_end_by_close: bool
) -> None:
    """Makes of any bytes an answer with one framing at most, or Malformed; never an answer of two lengths."""
    raw = b"\r\n".join([*([b"HTTP/1.1 200 OK"] if starts_well else []), *lines, b"", b""])
    try:
        got = HeadCache(response.AnswerRules(may_end_by_close=may_end_by_close)).read(raw)
    except Malformed:
        return
    assert got.status >= 100
    if got.status != 200:
        return
    start = got.start.lower()
    framings = (
        start.count(b"content-length:") + start.count(b"transfer-encoding: chunked") + got.ends_by_close
    )
    assert framings == 1
    assert not got.ends_by_close or may_end_by_close
    lengths = {
        line.partition(b":")[2].strip() for line in lines if line.lower().startswith(b"content-length:")
    }
    assert got.length is None or lengths == {b"%d" % got.length}
