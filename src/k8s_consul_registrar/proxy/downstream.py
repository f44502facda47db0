"""One caller's connection: reads its requests, writes the answers, one at a time."""

import asyncio
import contextlib
import math
import os
import socket
import struct
from collections.abc import Callable
from http import HTTPStatus
from typing import cast

from k8s_consul_registrar.proxy import request
from k8s_consul_registrar.proxy.headers import refusal_bytes
from k8s_consul_registrar.proxy.outcomes import Outcome, Refusal
from k8s_consul_registrar.proxy.relay import Relay
from k8s_consul_registrar.proxy.request import Fault, Request, RequestReader
from k8s_consul_registrar.proxy.scrape import Scrape
from k8s_consul_registrar.rotating import BearerTokens, Rotating

UNAUTHORIZED = Refusal(401, Outcome.UNAUTHORIZED, "a bearer token is needed, or another one")
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class Downstream(asyncio.BufferedProtocol):
    """A connection to the proxy, kept between scrapes.

    The body is written straight from the shared memory to the socket; only what the socket does not take is
    copied, and then the kubelet is read no further until it has gone. So a slow caller holds one read at most.
    """

    __slots__ = (
        "_close_after",
        "_expires",
        "_fd",
        "_inbound",
        "_is_blocked",
        "_is_head",
        "_is_lingering",
        "_on_lost",
        "_reader",
        "_relay",
        "_scrape",
        "_transport",
    )

    def __init__(
        self, relay: Relay, inbound: Rotating[BearerTokens] | None, on_lost: Callable[["Downstream"], None]
    ) -> None:
        self._relay = relay
        self._inbound = inbound
        self._on_lost = on_lost
        self._reader = RequestReader(relay.memory)
        self._transport: asyncio.Transport | None = None
        # Valid only while the transport is open: a number is given to another connection after that.
        self._fd = -1
        self._scrape: Scrape | None = None
        self._close_after = False
        self._is_head = False
        self._is_blocked = False
        self._is_lingering = False
        self._expires = relay.loop.time() + relay.timing.request_head

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the connection over."""
        self._transport = cast("asyncio.Transport", transport)
        # Any byte the socket does not take at once is a reason to wait.
        self._transport.set_write_buffer_limits(high=0)
        self._fd = self._socket().fileno()

    def _socket(self) -> socket.socket:
        assert self._transport is not None
        return cast("socket.socket", self._transport.get_extra_info("socket"))

    @property
    def is_idle(self) -> bool:
        """Whether no answer is under way, to its last byte."""
        return self._scrape is None and not self._is_blocked and not self._is_lingering

    # Reading

    def get_buffer(self, _sizehint: int) -> memoryview:
        """Lend the shared memory for one read."""
        return self._relay.buffers.received

    def buffer_updated(self, nbytes: int) -> None:
        """Take what the caller sent: the next request, or part of it."""
        if self._is_lingering or self._fd < 0:
            return
        if not self.is_idle:
            # The answer before is under way, or not taken yet: to go on would gather answers without bound.
            self._leave()
            self.abort()
            return
        was_midway = self._reader.is_midway
        heard = self._reader.feed(self._relay.buffers.received[:nbytes])
        match heard:
            case None:
                if not was_midway:
                    self._expires = self._relay.loop.time() + self._relay.timing.request_head
            case Request():
                self._serve(heard)
            case Fault():
                self._is_head = heard.is_head
                self._close_after = not heard.keeps_alive
                self._relay.counts.ended(heard.refusal.outcome)
                self.refuse(heard.refusal)

    def _serve(self, asked: Request) -> None:
        relay = self._relay
        self._is_head = False
        self._close_after = not asked.keeps_alive
        if self._inbound is not None and not self._inbound.current().accepts(
            asked.fields.get(b"authorization")
        ):
            relay.counts.ended(UNAUTHORIZED.outcome)
            self.refuse(UNAUTHORIZED)
            return
        routed = relay.find(asked.target)
        if isinstance(routed, Refusal):
            self._close_after |= routed.status == HTTPStatus.BAD_REQUEST
            relay.counts.ended(routed.outcome)
            self.refuse(routed)
            return
        self._expires = math.inf  # the scrape has a deadline of its own
        self._scrape = scrape = Scrape(relay, self, routed, asked.fields)
        scrape.start()

    # Writing

    def respond(self, head: bytes, body: memoryview) -> None:
        """Send the head, but for its last empty line, and the first bytes of the body, in one go."""
        if self._fd < 0:
            return
        head += b"Connection: close\r\n\r\n" if self._closes_after() else b"\r\n"
        try:
            sent = os.writev(self._fd, (head, body))
        except BlockingIOError:
            sent = 0
        except OSError:
            self.abort()
            return
        if sent < len(head):
            self._queue(head[sent:] + body)
        elif sent < len(head) + len(body):
            self._queue(body[sent - len(head) :].tobytes())

    def send(self, body: memoryview) -> None:
        """Send more of the body."""
        if self._fd < 0:
            return
        try:
            sent = 0 if self._is_blocked else os.write(self._fd, body)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.abort()
            return
        if sent < len(body):
            self._queue(body[sent:].tobytes())

    def _queue(self, rest: bytes) -> None:
        assert self._transport is not None
        self._transport.write(rest)

    def _say(self, answer: bytes) -> None:
        """Send an answer of our own."""
        self._queue(answer)

    def pause_writing(self) -> None:
        """Wait: the caller takes no more for now."""
        self._is_blocked = True
        if self._scrape is not None:
            self._scrape.pause()

    def resume_writing(self) -> None:
        """Go on: the caller has taken everything."""
        self._is_blocked = False
        if self._scrape is not None:
            self._scrape.resume()
        elif not self._is_lingering:
            self._expires = self._relay.loop.time() + self._relay.timing.keep_alive

    def _closes_after(self) -> bool:
        return self._close_after or self._relay.is_draining

    # How a scrape ends

    def finish(self, *, can_go_on: bool = True) -> None:
        """Wait for the next request now that the answer is complete, or close."""
        self._scrape = None
        if self._fd < 0:
            return
        if not can_go_on or self._closes_after():
            self.close()
            return
        timing = self._relay.timing
        self._expires = self._relay.loop.time() + (timing.flush if self._is_blocked else timing.keep_alive)

    def refuse(self, refusal: Refusal) -> None:
        """Answer this instead."""
        self._scrape = None
        if self._transport is None or self._fd < 0:
            return
        closes = self._closes_after()
        self._say(refusal_bytes(refusal, close=closes, with_body=not self._is_head))
        if not closes:
            self.finish()
        else:
            self._linger()

    def _linger(self) -> None:
        # Closing with unread bytes at hand would reset the connection, and the answer with it (RFC 9112, 9.6).
        assert self._transport is not None
        self._is_lingering = True
        with contextlib.suppress(OSError):
            self._transport.write_eof()
        self._expires = self._relay.loop.time() + self._relay.timing.linger

    def reset(self) -> None:
        """Break the connection, so that the answer begun does not look complete."""
        if self._fd >= 0:
            # Without this an abort ends in a clean FIN.
            self._socket().setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        self._leave()
        self.abort()

    def close(self) -> None:
        """Close once everything is sent."""
        self._fd = -1
        self._expires = self._relay.loop.time() + self._relay.timing.flush
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Close at once."""
        self._fd = -1
        if self._transport is not None:
            self._transport.abort()

    def expire(self, now: float) -> None:
        """Drop a caller that is too slow, or idle for too long."""
        if now < self._expires:
            return
        self._expires = math.inf
        if self._fd >= 0 and self._reader.is_midway and self.is_idle:
            self._close_after = True
            self._relay.counts.ended(Outcome.BAD_REQUEST)
            self.refuse(request.TOO_SLOW)
        else:
            self.abort()

    def doubt(self) -> None:
        """Hear that whom to believe has changed; nothing to a connection without certificates."""

    def eof_received(self) -> None:
        """Take a caller that sends no more as one that has left, as nginx and Go's server do."""
        self._leave()

    def connection_lost(self, _exc: Exception | None) -> None:
        """Forget the connection."""
        self._leave()
        self._on_lost(self)

    def _leave(self) -> None:
        self._fd = -1
        if self._scrape is not None:
            scrape, self._scrape = self._scrape, None
            scrape.leave()
