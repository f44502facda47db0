"""The TLS step of a connection: bytes in, bytes out, no socket; and the contexts that say whom to trust."""

import contextlib
import ssl
from collections.abc import Callable

# A piece of ciphertext at a time: an idle connection keeps a buffer of this order, not of a whole read.
PIECE = 16 * 1024
# The most plain text one record holds (RFC 8446, 5.1), so the most one read returns.
RECORD = 16 * 1024


def kubelet_context(
    *,
    ca_pem: str | None,
    skip_verification: bool = False,
) -> ssl.SSLContext:
    """Return the context for kubelets: HTTP/1.1 alone, verified by the CAs in `ca_pem`.

    Without a CA the system's are trusted. `skip_verification` is the operator's explicit choice.
    Raises ssl.SSLError where a CA cannot be read.
    """
    context = ssl.create_default_context(cadata=ca_pem)
    context.set_alpn_protocols(["http/1.1"])
    # The same on every Python: 3.13 turned strictness on, which a cluster's own CA does not meet (kubeadm's
    # has no authority key identifier), and trust in any certificate of the file, a kubelet's own included.
    context.verify_flags &= ~ssl.VerifyFlags.VERIFY_X509_STRICT
    context.verify_flags |= ssl.VerifyFlags.VERIFY_X509_PARTIAL_CHAIN
    # RFC 9525, 2: the common name is no identity.
    context.hostname_checks_common_name = False
    if skip_verification:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def pod_context(*, ca_pem: str | None, skip_verification: bool = False) -> ssl.SSLContext:
    """Return the context for Pods that are scraped by https; it never shows a certificate of ours."""
    return kubelet_context(ca_pem=ca_pem, skip_verification=skip_verification)


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
    """One connection's TLS between ciphertext off a plain transport and plain text."""

    __slots__ = ("_incoming", "_object", "_outgoing", "_read", "has_ended")

    def __init__(self, context: ssl.SSLContext, server_name: str | None) -> None:
        """Begin the client's side to the server of a name; without a name, the server's side."""
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._object = context.wrap_bio(
            self._incoming, self._outgoing, server_side=server_name is None, server_hostname=server_name
        )
        # typeshed knows only the form that returns bytes; with a buffer it returns their number.
        self._read: Callable[[int, memoryview], int] = self._object.read  # type: ignore[assignment]
        self.has_ended = False

    def advance_handshake(self, received: memoryview | bytes = b"") -> bool:
        """Take the peer's bytes and say whether the handshake is complete; raises ssl.SSLError."""
        if received:
            self._incoming.write(received)
        try:
            self._object.do_handshake()
        except ssl.SSLWantReadError:
            return False
        return True

    def encrypt(self, plain: bytes) -> bytes:
        """Return what to send for `plain`."""
        self._object.write(plain)
        return self._outgoing.read()

    def encrypt_all(self, *parts: bytes | memoryview) -> bytes:
        """Return what to send for parts of any size; OpenSSL takes one record of them at a time."""
        write = self._object.write
        for part in parts:
            rest = memoryview(part)
            while rest:
                rest = rest[write(rest) :]
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
        filled = 0
        while self._incoming.pending and not self.has_ended:
            try:
                count = self._read(RECORD, plain[filled:])
            except ssl.SSLWantReadError:
                break
            except ssl.SSLZeroReturnError:
                count = 0
            self.has_ended = not count
            filled += count
        return filled

    def decrypt(self, received: memoryview, plain: memoryview) -> int:
        """Decrypt all of `received` into `plain` and return how many bytes there are.

        `has_ended` turns true where the peer closes the stream. Raises ssl.SSLError.
        """
        incoming, tls, read = self._incoming, self._object, self._read
        filled = 0
        for start in range(0, len(received), PIECE):
            incoming.write(received[start : start + PIECE])
            while True:
                try:
                    count = read(RECORD, plain[filled:])
                except ssl.SSLWantReadError:
                    break
                except ssl.SSLZeroReturnError:
                    count = 0
                if not count:
                    self.has_ended = True
                    return filled
                filled += count
                # Asking again with nothing at hand would raise, which costs more than a small read.
                if not incoming.pending and not tls.pending():
                    break
        return filled
