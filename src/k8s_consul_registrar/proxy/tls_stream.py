"""The TLS step of a connection (bytes in, bytes out, no socket), and the memory that it uses."""

import contextlib
import ssl
from collections.abc import Callable
from typing import Any

# The most plain text that one record holds (RFC 8446, 5.1), and so the most that one read returns.
RECORD = 16 * 1024
# A record's header: its type, a version, and in two bytes the length of the rest (RFC 8446, 5.1).
RECORD_HEADER = 5
# The most that is read off a socket at once: eight full records, with the type and the tag that each ends with
# (5.2). One byte less, and a part of a record would be copied and kept at every read of a long answer.
RECEIVE_SIZE = 8 * (RECORD_HEADER + RECORD + 1 + 16)
# With as many clients as this, half of it: each may leave one read in memory by not reading.
MANY_CLIENTS = 1024
# The plain text of these TLS records, and of one that began before.
PLAIN_SIZE = RECEIVE_SIZE + 17 * 1024
# Records that OpenSSL gets at a time.
MAX_TOGETHER = 16
# Records without data that are accepted in a row: session tickets and key updates of an honest peer are fewer.
MAX_EMPTY_RECORDS = 16
# The longest record allowed (RFC 5246, 6.2.3); OpenSSL gets a longer one at once and fails.
LONGEST_RECORD = RECORD + 2048


class Buffers:
    """Memory that every connection of a process reads into: one buffer for all, since reads never overlap.

    The event loop asks for a buffer, reads and reports in one go, so the data must be taken out before the
    report returns. A buffer for each of 5,000 kept connections would be 640 MB. `received` is data off a
    socket, of which `lent` is read into, `plain` its plain text. `incoming`, which OpenSSL reads from, is empty between two reports: one
    for each connection would hold on to the 22 KB of the largest record it ever saw.
    """

    __slots__ = ("incoming", "lent", "plain", "plain_bytes", "received", "received_bytes")

    def __init__(self) -> None:
        self.received_bytes = bytearray(RECEIVE_SIZE)
        self.received = self.lent = memoryview(self.received_bytes)
        self.plain_bytes = bytearray(PLAIN_SIZE)
        self.plain = memoryview(self.plain_bytes)
        self.incoming = ssl.MemoryBIO()

    def share(self, clients: int) -> None:
        """Lend less where there are many clients."""
        self.lent = self.received if clients < MANY_CLIENTS else self.received[: RECEIVE_SIZE // 2]


class EmptyRecordsError(ssl.SSLError):
    """An error of a peer that sends one TLS record after another without data, each of which costs us as much."""

    reason = "TOO_MANY_RECORDS_WITHOUT_DATA"


class PlainStep:
    """The step of a connection without TLS: bytes pass unchanged, and `outgoing` stays empty."""

    __slots__ = ("has_ended", "outgoing")

    def __init__(self) -> None:
        self.has_ended = False
        self.outgoing = ssl.MemoryBIO()

    is_between_records = True

    def advance_handshake(self, received: memoryview | bytes = b"") -> bool:  # noqa: ARG002 - of a `TlsStep`
        """Return True: there is nothing to agree on."""
        return True

    def peer_expires_at(self) -> None:
        """Return None: there is no certificate."""

    def encrypt(self, plain: bytes) -> bytes:
        """Return `plain` itself."""
        return plain

    def decrypt(self, received: memoryview, plain: memoryview) -> int:
        """Copy `received` into `plain` and return its length."""
        count = len(received)
        plain[:count] = received
        return count


class TlsStep:
    """TLS of one connection, between ciphertext off a plain transport and plain text.

    OpenSSL gets only whole records: asked for a record of which a part is missing it raises, which costs as
    much as decrypting it. The parts are kept here until then, so one `incoming`, the memory that OpenSSL reads
    from, serves all connections of a process. `outgoing` holds what is to be sent and no `encrypt` returned:
    handshake, alerts, key updates.
    """

    __slots__ = (
        "_begun",
        "_empty_records",
        "_incoming",
        "_object",
        "_read",
        "_rest",
        "has_ended",
        "outgoing",
    )

    def __init__(
        self, context: ssl.SSLContext, server_name: str | None, incoming: ssl.MemoryBIO | None = None
    ) -> None:
        """Begin the client's side to the server of a name; without a name, the server's side."""
        self._incoming = incoming or ssl.MemoryBIO()
        self.outgoing = ssl.MemoryBIO()
        self._object = context.wrap_bio(
            self._incoming, self.outgoing, server_side=server_name is None, server_hostname=server_name
        )
        # typeshed knows only the form that returns bytes; with a buffer it returns their number.
        self._read: Callable[[int, memoryview], int] = self._object.read  # type: ignore[assignment]
        # The beginning of an incomplete record; and data that arrived with the end of the handshake.
        self._begun = b""
        self._rest = b""
        self._empty_records = 0
        self.has_ended = False

    def advance_handshake(self, received: memoryview | bytes = b"") -> bool:
        """Process the peer's bytes and return True once the handshake is complete; raises ssl.SSLError."""
        self._hand_over(received)
        try:
            self._object.do_handshake()
        except ssl.SSLWantReadError:
            return False
        self._rest = self._incoming.read()
        return True

    def _hand_over(self, piece: memoryview | bytes) -> None:
        """Give OpenSSL only this to read: no byte of another connection, however that one failed."""
        incoming = self._incoming
        if incoming.pending:
            incoming.read()
        if piece:
            incoming.write(piece)

    def encrypt(self, plain: bytes) -> bytes:
        """Return the ciphertext of `plain`."""
        self._object.write(plain)
        return self.outgoing.read()

    def encrypt_all(self, *parts: bytes | memoryview) -> bytes:
        """Return the ciphertext of parts of any size."""
        for part in parts:
            self._object.write(part)
        return self.outgoing.read()

    def close_notify(self) -> bytes:
        """Return the alert that ends the stream on purpose (RFC 8446, 6.1)."""
        with contextlib.suppress(ssl.SSLError):
            self._object.unwrap()
        return self.outgoing.read()

    def peer_certificate(self) -> bytes | None:
        """Return the certificate that the peer has shown, None for none."""
        return self._object.getpeercert(binary_form=True)

    def peer_expires_at(self) -> float | None:
        """Return when the peer's certificate expires (Unix time), None if it was not verified or is odd."""
        facts: Any = self._object.getpeercert()
        try:
            return ssl.cert_time_to_seconds(facts["notAfter"])
        except (KeyError, TypeError, ValueError):
            return None

    @property
    def is_between_records(self) -> bool:
        """True if no record is incomplete."""
        return not self._begun

    def decrypt_rest(self, plain: memoryview) -> int:
        """Decrypt data that arrived with the end of the handshake into `plain`, and return its length."""
        return self.decrypt(memoryview(b""), plain) if self._rest else 0

    def decrypt(self, received: memoryview, plain: memoryview) -> int:
        """Decrypt all of `received` into `plain` and return the length of the plain text.

        `has_ended` turns true once the peer closes the stream. Raises ssl.SSLError.
        """
        if self._rest:
            received, self._rest = memoryview(self._rest + received.tobytes()), b""
        filled = start = 0
        size = len(received)
        if self._begun:
            start, filled = self._complete(received, plain)
        while start < size and not self.has_ended:
            end = start
            records = 0
            while records < MAX_TOGETHER and end + RECORD_HEADER <= size:
                length = received[end + 3] << 8 | received[end + 4]
                further = end + RECORD_HEADER + length if length <= LONGEST_RECORD else size
                if further > size:
                    break
                end = further
                records += 1
            if end == start:
                self._begun = received[start:].tobytes()
                break
            # As `_hand_over` does, without the call.
            if self._incoming.pending:
                self._incoming.read()
            self._incoming.write(received[start:end])
            filled = self._take(plain, filled, records)
            start = end
        return filled

    def _complete(self, received: memoryview, plain: memoryview) -> tuple[int, int]:
        """Decrypt the record that began before `received`; return where it ends there, and its length."""
        begun, start = self._begun, 0
        if len(begun) < RECORD_HEADER:
            start = min(RECORD_HEADER - len(begun), len(received))
            begun += received[:start].tobytes()
        if len(begun) >= RECORD_HEADER:
            length = begun[3] << 8 | begun[4]
            missing = RECORD_HEADER + length - len(begun) if length <= LONGEST_RECORD else 0
            if missing <= len(received) - start:
                end = start + missing
                self._begun = b""
                self._hand_over(begun)
                self._incoming.write(received[start:end])
                filled = self._take(plain, 0, 1)
                return end, filled
        self._begun = begun + received[start:].tobytes()
        return len(received), 0

    def _take(self, plain: memoryview, filled: int, records: int) -> int:
        """Read the data of `records` into `plain` from `filled` on, and return how far it is filled then.

        Raises EmptyRecordsError after too many records without data.
        """
        incoming, read = self._incoming, self._read
        roomy = len(plain) - RECORD
        while True:
            try:
                count = read(RECORD, plain[filled:])
            except ssl.SSLWantReadError:
                break  # the rest held no data: a session ticket, a key update
            except ssl.SSLZeroReturnError:
                count = 0
            if not count:
                self.has_ended = True
                return filled
            filled += count
            records -= 1
            # A record that had room is read whole, and nothing of it is left inside.
            if not incoming.pending and (filled <= roomy or not self._object.pending()):
                break
        if records > 0:
            self._empty_records += records
            if self._empty_records > MAX_EMPTY_RECORDS:
                raise EmptyRecordsError
        elif self._empty_records:
            self._empty_records = 0
        return filled
