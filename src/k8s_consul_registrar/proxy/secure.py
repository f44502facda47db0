"""One caller's connection over TLS: the plain one, with a step of encryption between it and the socket."""

import os
import ssl
from collections.abc import Callable

from k8s_consul_registrar.proxy.downstream import Downstream
from k8s_consul_registrar.proxy.headers import refusal_bytes
from k8s_consul_registrar.proxy.outcomes import Outcome, Refusal
from k8s_consul_registrar.proxy.relay import Relay
from k8s_consul_registrar.proxy.request import Request
from k8s_consul_registrar.proxy.tls import TlsStep
from k8s_consul_registrar.rotating import BearerTokens, Rotating
from k8s_consul_registrar.tls import ServerTls

# What OpenSSL calls a first line of HTTP where a handshake should begin.
_SPEAKS_HTTP = "HTTP_REQUEST"
SPEAK_TLS = Refusal(400, Outcome.HANDSHAKE, "this port speaks https")


class SecureDownstream(Downstream):
    """A connection to the proxy whose bytes are encrypted by us, so that it costs no buffers while it is idle.

    A new certificate counts for new connections. A new authority of clients' certificates counts for all:
    what was begun under another one ends after the answer under way.
    """

    __slots__ = ("_files", "_is_secure", "_tls", "_trust")

    def __init__(
        self,
        relay: Relay,
        inbound: Rotating[BearerTokens] | None,
        on_lost: Callable[[Downstream], None],
        files: ServerTls,
    ) -> None:
        super().__init__(relay, inbound, on_lost)
        self._files = files
        self._trust = files.value.client_ca
        self._tls = TlsStep(files.value.context, None, relay.buffers.incoming)
        self._is_secure = False

    def buffer_updated(self, nbytes: int) -> None:
        """Decrypt what came and take it as the plain connection would."""
        if self._is_lingering or self._fd < 0:
            return
        tls, buffers = self._tls, self._relay.buffers
        received = buffers.received[:nbytes]
        try:
            if self._is_secure:
                count = tls.decrypt(received, buffers.plain)
            else:
                self._is_secure = tls.advance_handshake(received)
                count = tls.decrypt_rest(buffers.plain) if self._is_secure else 0
        except ssl.SSLError as error:
            self._turn_away(error)
            return
        if tls.has_output:
            self._put(tls.output())
        if count:
            # A request is small; of what is longer than its limit a part tells as much as the whole.
            count = min(count, len(buffers.received))
            buffers.received[:count] = buffers.plain[:count]
            super().buffer_updated(count)
        if tls.has_ended:
            self._leave()
            self.abort()

    def _turn_away(self, error: ssl.SSLError) -> None:
        """End a connection that is not secure, after telling the other side why."""
        if not self._is_secure:
            self._relay.counts.ended(Outcome.HANDSHAKE)
        self._leave()
        if self._transport is None:
            return
        if self._tls.has_output:
            self._transport.write(self._tls.output())
        if error.reason == _SPEAKS_HTTP:
            self._transport.write(refusal_bytes(SPEAK_TLS, close=True))
        self._linger()

    def _serve(self, asked: Request) -> None:
        if self._is_stale:
            self.close()
        else:
            super()._serve(asked)

    @property
    def _is_stale(self) -> bool:
        return self._files.value.client_ca != self._trust

    def _closes_after(self) -> bool:
        return super()._closes_after() or self._is_stale

    def doubt(self) -> None:
        """Close an idle connection where whom to believe has changed; one that is not goes after its answer."""
        if self._is_stale and self.is_idle and self._fd >= 0:
            self.close()

    # Writing

    def respond(self, head: bytes, body: memoryview) -> None:
        """Send the head, but for its last empty line, and the first bytes of the body."""
        if self._fd < 0:
            return
        head += b"Connection: close\r\n\r\n" if self._closes_after() else b"\r\n"
        self._put(self._tls.encrypt_all(head, body))

    def send(self, body: memoryview) -> None:
        """Send more of the body."""
        if self._fd >= 0:
            self._put(self._tls.encrypt_all(body))

    def _say(self, answer: bytes) -> None:
        self._put(self._tls.encrypt_all(answer))

    def _put(self, encrypted: bytes) -> None:
        """Write to the socket at once, in the order of encryption; what it does not take is kept."""
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
        self._part()
        super()._linger()

    def close(self) -> None:
        """Close once everything is sent, and say that this is the end."""
        self._part()
        super().close()

    def _part(self) -> None:
        if self._is_secure and self._fd >= 0 and not self._is_lingering:
            self._put(self._tls.farewell())
