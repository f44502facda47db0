"""The TLS step: what it decrypts is what was encrypted, however it comes, and it asks OpenSSL only when it must."""

import contextlib
import functools
import random
import ssl

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k8s_consul_registrar.proxy.tls_stream import (
    LONGEST_RECORD,
    MANY_CLIENTS,
    PLAIN_SIZE,
    RECEIVE_SIZE,
    Buffers,
    TlsStep,
)
from k8s_consul_registrar.tls import Trust
from support.proxy_lab import authority, authority_pem


@functools.cache
def server_context(version: ssl.TLSVersion) -> ssl.SSLContext:
    """Return the other side's context."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = context.maximum_version = version
    authority().issue_cert("127.0.0.1").configure_cert(context)
    return context


@functools.cache
def client_context() -> ssl.SSLContext:
    """Return the step's own context."""
    return Trust(authority_pem()).context


class Pair:
    """A step and the server at its other end, without a socket between; `late` is what the server sent last."""

    def __init__(
        self,
        version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3,
        piece: int = 1 << 20,
        incoming: ssl.MemoryBIO | None = None,
    ) -> None:
        self.step = TlsStep(client_context(), "127.0.0.1", incoming)
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.server = server_context(version).wrap_bio(self._incoming, self._outgoing, server_side=True)
        is_complete = self.step.advance_handshake()
        is_agreed = False
        while not (is_complete and is_agreed):
            self._incoming.write(self.step.outgoing.read())
            try:
                self.server.do_handshake()
                is_agreed = True
            except ssl.SSLWantReadError:
                pass
            if is_complete:
                break
            flight = self._outgoing.read()
            for start in range(0, len(flight), piece):
                is_complete = self.step.advance_handshake(flight[start : start + piece])

    def encrypt(self, *parts: bytes) -> bytes:
        """Return what the server sends for parts, each of a record of its own, and what it had to send before."""
        for part in parts:
            self.server.write(part)
        return self._outgoing.read()

    def decrypt(self, received: bytes) -> bytes:
        """Return what the step makes of it."""
        plain = memoryview(bytearray(PLAIN_SIZE))
        return plain[: self.step.decrypt(memoryview(received), plain)].tobytes()


VERSIONS = [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]


@pytest.mark.parametrize("version", VERSIONS)
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_any_records_in_any_pieces(version: ssl.TLSVersion, seed: int) -> None:
    """Returns every byte as soon as its record is complete, whatever sizes records and pieces have."""
    pick = random.Random(seed)
    pair = Pair(version, piece=pick.choice((1, 7, 1000, 1 << 20)))
    sizes = [pick.choice((1, 3, 100, 1300, 4096, 16383, 16384)) for _ in range(pick.randrange(1, 30))]
    parts = [pick.randbytes(size) for size in sizes]
    wire = b""
    ends = []  # of each record on the wire, with what is plain by then
    for number, part in enumerate(parts):
        wire += pair.encrypt(part)
        ends.append((len(wire), sum(sizes[: number + 1])))
    got, at = b"", 0
    while at < len(wire):
        piece = wire[at : at + pick.choice((1, 2, 4, 5, 6, 500, 16406, RECEIVE_SIZE))]
        at += len(piece)
        got += pair.decrypt(piece)
        assert len(got) == max((plain for end, plain in ends if end <= at), default=0)
    assert got == b"".join(parts)
    assert not pair.step.has_ended


def test_openssl_is_asked_only_for_whole_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asks as often as there are records, and never in vain, where they come in pieces of another size."""
    pair = Pair()
    pair.decrypt(pair.encrypt(b"first"))  # the session tickets are out of the way after it
    wire = pair.encrypt(*[bytes(16384)] * 20)
    asked = []
    read = pair.step._read

    def counted(size: int, into: memoryview) -> int:
        asked.append(size)
        return read(size, into)

    monkeypatch.setattr(pair.step, "_read", counted)
    pieces = [wire[start : start + 50_000] for start in range(0, len(wire), 50_000)]
    assert sum(len(pair.decrypt(piece)) for piece in pieces) == 20 * 16384
    assert len(asked) == 20


def test_many_clients_get_smaller_reads() -> None:
    """Lends half of the memory where each of many open clients may leave one read unread."""
    buffers = Buffers()
    assert len(buffers.lent) == RECEIVE_SIZE
    buffers.share(MANY_CLIENTS)
    assert len(buffers.lent) == RECEIVE_SIZE // 2
    buffers.share(MANY_CLIENTS - 1)
    assert len(buffers.lent) == RECEIVE_SIZE


def test_data_that_comes_along_with_the_handshake() -> None:
    """Never stays one record late: the rest of a record is read with the next."""
    pair = Pair(ssl.TLSVersion.TLSv1_3)
    pair.step.advance_handshake(pair.encrypt(b"early"))
    assert pair.decrypt(pair.encrypt(b"next")) == b"earlynext"
    assert pair.decrypt(pair.encrypt(b"last")) == b"last"


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_connections_that_share_their_memory(seed: int) -> None:
    """Each gets its own bytes in any order of events, and one that fails takes none of the others along."""
    pick = random.Random(seed)
    incoming = ssl.MemoryBIO()
    pairs = [Pair(pick.choice(VERSIONS), pick.choice((7, 1 << 20)), incoming) for _ in range(4)]
    victim = pairs[0]
    sent = dict.fromkeys(pairs, b"")
    wires = dict.fromkeys(pairs, b"")
    got = dict.fromkeys(pairs, b"")
    for _ in range(60):
        pair = pick.choice(pairs)
        if pick.random() < 0.4:
            part = pick.randbytes(pick.choice((1, 100, 4096, 16384)))
            sent[pair] += part
            wires[pair] += pair.encrypt(part)
        elif pair is victim and pick.random() < 0.3:
            with contextlib.suppress(ssl.SSLError):
                pair.decrypt(pick.randbytes(pick.choice((3, 30, 300))))
            pairs.remove(pair)
        else:
            count = pick.choice((1, 5, 500, 16406, 40000))
            got[pair] += pair.decrypt(wires[pair][:count])
            wires[pair] = wires[pair][count:]
    for pair in pairs:
        for start in range(0, len(wires[pair]), RECEIVE_SIZE):
            got[pair] += pair.decrypt(wires[pair][start : start + RECEIVE_SIZE])
        assert got[pair] == sent[pair]
        assert not pair.step.has_ended


def test_end_of_the_stream() -> None:
    """Tells the data before it, then that it has ended."""
    pair = Pair()
    wire = pair.encrypt(b"data")
    try:
        pair.server.unwrap()
    except ssl.SSLWantReadError:
        wire += pair.encrypt()
    assert pair.decrypt(wire) == b"data"
    assert pair.step.has_ended


@pytest.mark.parametrize(
    "garbage",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"\x17\x03\x03" + (LONGEST_RECORD + 1).to_bytes(2, "big") + bytes(100),
        b"\x17\x03\x03\xff\xff" + bytes(100),
        b"\x17\x03\x03\x00\x20" + bytes(32),
    ],
)
def test_garbage_is_an_error_at_once(garbage: bytes) -> None:
    """Leaves it to OpenSSL to refuse what is no record, without waiting for a length that may never come."""
    pair = Pair()
    with pytest.raises(ssl.SSLError):
        pair.decrypt(garbage)


def test_garbage_in_pieces_is_an_error_at_once() -> None:
    """Is refused as soon as its length is there, though its header came in two."""
    pair = Pair()
    assert pair.decrypt(b"\x17\x03\x03") == b""
    with pytest.raises(ssl.SSLError):
        pair.decrypt(b"\xff\xff" + bytes(100))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_damaged_records_are_errors_of_tls_and_nothing_else(seed: int) -> None:
    """Ends in an SSLError, or in what was sent, whatever becomes of records on the way and however they come."""
    pick = random.Random(seed)
    pair = Pair(pick.choice(VERSIONS))
    parts = [pick.randbytes(pick.choice((1, 100, 16_384))) for _ in range(pick.randrange(1, 12))]
    wire = bytearray(pair.encrypt(*parts))
    for _ in range(pick.randrange(3)):
        at = pick.randrange(len(wire))
        match pick.randrange(3):
            case 0:
                wire[at] ^= 1 << pick.randrange(8)
            case 1:
                wire[at:at] = pick.randbytes(pick.randrange(1, 40))
            case _:
                del wire[at : at + pick.randrange(1, 40)]
    got, at = b"", 0
    with contextlib.suppress(ssl.SSLError):
        while at < len(wire) and not pair.step.has_ended:
            piece = bytes(wire[at : at + pick.choice((1, 5, 1000, RECEIVE_SIZE))])
            at += len(piece)
            got += pair.decrypt(piece)
    assert b"".join(parts).startswith(got)
