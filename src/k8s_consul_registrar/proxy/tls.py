"""The TLS step of a connection: bytes in, bytes out, no socket."""

import contextlib
import ssl
from collections.abc import Callable

# The most plain text one record holds (RFC 8446, 5.1), so the most one read returns.
RECORD = 16 * 1024
# How much ciphertext OpenSSL is handed at a time, where records are smaller than that.
PIECE = 16 * 1024
# What a record begins with: its type, a version, and in two bytes the length of the rest (RFC 8446, 5.1).
RECORD_HEADER = 5
# The most a length may say (RFC 5246, 6.2.3); OpenSSL is shown more at once and refuses it.
LONGEST_RECORD = RECORD + 2048


class PlainStep:
    """What a connection without TLS has in a `TlsStep`'s place: bytes go through as they are."""

    __slots__ = ("has_ended", "has_output")

    def __init__(self) -> None:
        self.has_ended = False
        self.has_output = False

    def advance_handshake(self, received: memoryview | bytes = b"") -> bool:  # noqa: ARG002 - of a `TlsStep`
        """Say that there is nothing to agree on."""
        return True

    def encrypt(self, plain: bytes) -> bytes:
        """Return it."""
        return plain

    def output(self) -> bytes:
        """Return nothing: everything to send is returned by `encrypt`."""
        return b""

    def decrypt(self, received: memoryview, plain: memoryview) -> int:
        """Copy `received` into `plain` and return how many bytes there are."""
        count = len(received)
        plain[:count] = received
        return count


class TlsStep:
    """One connection's TLS between ciphertext off a plain transport and plain text.

    OpenSSL is handed whole records and asked as often as they hold data: asked for one of which a part is
    missing it raises, which costs as much as decrypting it. The parts are kept here until then, so that one
    `incoming`, the memory OpenSSL reads from, does for all connections of a process: it holds nothing between
    two calls, and an idle connection has none of its own.
    """

    __slots__ = ("_begun", "_incoming", "_object", "_outgoing", "_read", "_rest", "has_ended")

    def __init__(
        self, context: ssl.SSLContext, server_name: str | None, incoming: ssl.MemoryBIO | None = None
    ) -> None:
        """Begin the client's side to the server of a name; without a name, the server's side."""
        self._incoming = incoming or ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._object = context.wrap_bio(
            self._incoming, self._outgoing, server_side=server_name is None, server_hostname=server_name
        )
        # typeshed knows only the form that returns bytes; with a buffer it returns their number.
        self._read: Callable[[int, memoryview], int] = self._object.read  # type: ignore[assignment]
        # What came of the record at hand; and what came along with the end of the handshake.
        self._begun = b""
        self._rest = b""
        self.has_ended = False

    def advance_handshake(self, received: memoryview | bytes = b"") -> bool:
        """Take the peer's bytes and say whether the handshake is complete; raises ssl.SSLError."""
        self._hand_over(received)
        try:
            self._object.do_handshake()
        except ssl.SSLWantReadError:
            return False
        self._rest = self._incoming.read()
        return True

    def _hand_over(self, piece: memoryview | bytes) -> None:
        """Let OpenSSL read this and nothing else: no byte of another connection, however that one failed."""
        incoming = self._incoming
        if incoming.pending:
            incoming.read()
        if piece:
            incoming.write(piece)

    def encrypt(self, plain: bytes) -> bytes:
        """Return what to send for `plain`."""
        self._object.write(plain)
        return self._outgoing.read()

    def encrypt_all(self, *parts: bytes | memoryview) -> bytes:
        """Return what to send for parts of any size."""
        for part in parts:
            self._object.write(part)
        return self._outgoing.read()

    def farewell(self) -> bytes:
        """Return what tells the peer that the stream ends here on purpose (RFC 8446, 6.1)."""
        with contextlib.suppress(ssl.SSLError):
            self._object.unwrap()
        return self._outgoing.read()

    @property
    def has_output(self) -> bool:
        """Whether there is something to send that no `encrypt` returned: handshake, alerts, key updates."""
        return self._outgoing.pending > 0

    def output(self) -> bytes:
        """Return it."""
        return self._outgoing.read()

    def decrypt_rest(self, plain: memoryview) -> int:
        """Decrypt into `plain` what came along with the end of the handshake; returns how many bytes there are."""
        return self.decrypt(memoryview(b""), plain) if self._rest else 0

    def decrypt(self, received: memoryview, plain: memoryview) -> int:
        """Decrypt all of `received` into `plain` and return how many bytes there are.

        `has_ended` turns true where the peer closes the stream. Raises ssl.SSLError.
        """
        if self._rest:
            received, self._rest = memoryview(self._rest + received.tobytes()), b""
        filled = start = 0
        size = len(received)
        if self._begun:
            start, filled = self._complete(received, plain)
        while start < size and not self.has_ended:
            end = start
            # Small records together, up to a piece.
            while end - start < PIECE // 2 and end + RECORD_HEADER <= size:
                length = received[end + 3] << 8 | received[end + 4]
                further = end + RECORD_HEADER + length if length <= LONGEST_RECORD else size
                if further > size or (further - start > LONGEST_RECORD and end > start):
                    break
                end = further
            if end == start:
                self._begun = received[start:].tobytes()
                break
            self._hand_over(received[start:end])
            filled = self._take(plain, filled)
            start = end
        return filled

    def _complete(self, received: memoryview, plain: memoryview) -> tuple[int, int]:
        """Decrypt what began before `received`; returns where that ends in it, and how many bytes there are."""
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
                filled = self._take(plain, 0)
                return end, filled
        self._begun = begun + received[start:].tobytes()
        return len(received), 0

    def _take(self, plain: memoryview, filled: int) -> int:
        """Read all there is into `plain` from `filled` on, and return up to where it is filled then."""
        incoming, read = self._incoming, self._read
        roomy = len(plain) - RECORD
        while True:
            try:
                count = read(RECORD, plain[filled:])
            except ssl.SSLWantReadError:
                return filled  # the rest held no data of ours: a session ticket, a key update
            except ssl.SSLZeroReturnError:
                count = 0
            if not count:
                self.has_ended = True
                return filled
            filled += count
            # A record that had room is read whole, and nothing of it is left inside.
            if not incoming.pending and (filled <= roomy or not self._object.pending()):
                return filled
