"""One client's connection over TLS: the plain one, with encryption between it and the socket."""

import os
import ssl
from collections.abc import Callable, Hashable

from k8s_consul_registrar.proxy.client_connection import CLOSED, LINGERING, ClientConnection
from k8s_consul_registrar.proxy.headers import refusal_bytes
from k8s_consul_registrar.proxy.limits import ConnectionLimit
from k8s_consul_registrar.proxy.refusals import Outcome, Refusal
from k8s_consul_registrar.proxy.relay import Relay
from k8s_consul_registrar.proxy.request import Request
from k8s_consul_registrar.proxy.tls_stream import EmptyRecordsError, TlsStep
from k8s_consul_registrar.rotating import BearerTokens, Rotating
from k8s_consul_registrar.tls import ServerTls

# OpenSSL's reason for a first line of HTTP where a handshake should begin.
_SPEAKS_HTTP = "HTTP_REQUEST"
SPEAK_TLS = Refusal(400, Outcome.HANDSHAKE, "this port speaks https")


class SecureClientConnection(ClientConnection):
    """A connection to the proxy that encrypts in memory, so that it costs no buffers while it is idle.

    A new certificate counts for new connections. A new authority of clients' certificates counts for all: a
    connection made under another one ends after the answer under way.
    """

    __slots__ = ("_client_ca", "_files", "_is_secure", "_tls")

    def __init__(
        self,
        relay: Relay,
        inbound: Rotating[BearerTokens] | None,
        limit: ConnectionLimit[ClientConnection],
        on_lost: Callable[[ClientConnection], None],
        files: ServerTls,
    ) -> None:
        super().__init__(relay, inbound, limit, on_lost)
        self._files = files
        self._client_ca = files.value.client_ca
        self._tls = TlsStep(files.value.context, None, relay.buffers.incoming)
        self._is_secure = False

    def buffer_updated(self, nbytes: int) -> None:
        """Decrypt received data and read it as the plain connection would."""
        if self._state is LINGERING or self._state is CLOSED:
            return
        tls, buffers = self._tls, self._relay.buffers
        received = buffers.received[:nbytes]
        try:
            if self._is_secure:
                count = tls.decrypt(received, buffers.plain)
            else:
                self._is_secure = tls.advance_handshake(received)
                count = tls.decrypt_rest(buffers.plain) if self._is_secure else 0
        except EmptyRecordsError:
            self.abort()
            return
        except ssl.SSLError as error:
            self._end_insecure(error)
            return
        if tls.outgoing.pending:
            self._put(tls.outgoing.read())
        if count:
            # A request is small; a part of one that is too long shows as much as the whole.
            count = min(count, len(buffers.received))
            buffers.received[:count] = buffers.plain[:count]
            super().buffer_updated(count)
        if tls.has_ended:
            self.abort()

    def _end_insecure(self, error: ssl.SSLError) -> None:
        """End a connection after an error of TLS, and tell the client why."""
        if not self._is_secure:
            self._relay.counts.ended(Outcome.HANDSHAKE)
        self._leave()
        if self._transport is None:
            return
        if self._tls.outgoing.pending:
            self._transport.write(self._tls.outgoing.read())
        if error.reason == _SPEAKS_HTTP:
            self._transport.write(refusal_bytes(SPEAK_TLS, close=True))
        self._linger()

    def _serve(self, request: Request) -> None:
        if self._is_stale:
            self.close()
        else:
            super()._serve(request)

    def _credentials(self, request: Request) -> Hashable | None:
        """Return what stands for the token or, without one, for the certificate that the client has shown."""
        credentials = super()._credentials(request)
        if credentials is None and self._client_ca:
            return self._tls.peer_certificate()
        return credentials

    @property
    def _is_stale(self) -> bool:
        return self._files.value.client_ca != self._client_ca

    def _closes_after(self) -> bool:
        return super()._closes_after() or self._is_stale

    def recheck(self) -> None:
        """Close an idle connection of a replaced authority; another one ends after its answer."""
        if self._is_stale and self.is_idle:
            self.close()

    # Writing

    def respond(self, head: bytes, body: memoryview) -> None:
        """Send the head, without its last empty line, and the first bytes of the body."""
        if self._state is CLOSED:
            return
        head += b"Connection: close\r\n\r\n" if self._closes_after() else b"\r\n"
        self._put(self._tls.encrypt_all(head, body))

    def send(self, body: memoryview) -> None:
        """Send more of the body."""
        if self._state is not CLOSED:
            self._put(self._tls.encrypt_all(body))

    def _send_answer(self, answer: bytes) -> None:
        self._put(self._tls.encrypt_all(answer))

    def _put(self, encrypted: bytes) -> None:
        """Write to the socket at once, in the order of encryption; keep the part that it does not accept."""
        try:
            sent = 0 if self._is_blocked else os.write(self._fd, encrypted)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.abort()
            return
        if sent < len(encrypted):
            self._queue(encrypted[sent:])

    def _linger(self) -> None:
        self._send_close_notify()
        super()._linger()

    def close(self) -> None:
        """Close once everything is sent, after a close_notify."""
        self._send_close_notify()
        super().close()

    def _send_close_notify(self) -> None:
        if self._is_secure and self._state is not CLOSED and self._state is not LINGERING:
            self._put(self._tls.close_notify())
