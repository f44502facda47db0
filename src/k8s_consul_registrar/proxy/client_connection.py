"""One client's connection: reads its requests and writes the answers, one at a time."""

import asyncio
import contextlib
import ipaddress
import math
import os
import socket
import struct
from collections.abc import Callable, Hashable
from enum import Enum
from hashlib import blake2b
from http import HTTPStatus
from typing import cast

from k8s_consul_registrar.proxy import request
from k8s_consul_registrar.proxy.headers import refusal_bytes
from k8s_consul_registrar.proxy.limits import ConnectionLimit
from k8s_consul_registrar.proxy.refusals import UNAUTHORIZED, UNAUTHORIZED_WITH_PODS, Outcome, Refusal
from k8s_consul_registrar.proxy.relay import Relay
from k8s_consul_registrar.proxy.request import Fault, Request, RequestReader
from k8s_consul_registrar.proxy.scrape import Scrape
from k8s_consul_registrar.rotating import BearerTokens, Rotating

# Statuses of requests that no upstream was asked about.
DENIED = (HTTPStatus.UNAUTHORIZED, HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED)
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class ClientState(Enum):
    """State of a client connection: LINGERING has sent its last answer and ignores what still arrives."""

    READING = "reading"
    SCRAPING = "scraping"
    LINGERING = "lingering"
    CLOSED = "closed"


# On the path of every read and write: a global is found faster than the member of an enum.
READING, SCRAPING, LINGERING, CLOSED = ClientState


class ClientConnection(asyncio.BufferedProtocol):
    """A connection to the proxy, kept between scrapes.

    The body is written straight from the shared memory to the socket. Only the part that the socket does not
    accept is copied, and then nothing more is read from the upstream until it is gone, so a slow client holds
    one read at most.
    """

    __slots__ = (
        "_allowance",
        "_close_after",
        "_expires",
        "_fd",
        "_has_succeeded",
        "_inbound",
        "_is_blocked",
        "_is_head",
        "_is_trusted",
        "_limit",
        "_on_lost",
        "_reader",
        "_relay",
        "_scrape",
        "_state",
        "_transport",
    )

    def __init__(
        self,
        relay: Relay,
        inbound: Rotating[BearerTokens] | None,
        limit: "ConnectionLimit[ClientConnection]",
        on_lost: Callable[["ClientConnection"], None],
    ) -> None:
        self._relay = relay
        self._inbound = inbound
        self._limit = limit
        limit.enter(self, None)
        self._on_lost = on_lost
        self._reader = RequestReader(relay.requests)
        self._transport: asyncio.Transport | None = None
        self._state = READING
        # Never used once CLOSED: the system gives the number to another connection.
        self._fd = -1
        self._scrape: Scrape | None = None
        self._close_after = False
        self._is_head = False
        self._is_blocked = False
        # True once the client has shown credentials, or on an open port had a successful scrape.
        self._is_trusted = False
        self._has_succeeded = False
        self._allowance = relay.timing.keep_alive
        self._expires = math.inf

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to read."""
        self._transport = cast("asyncio.Transport", transport)
        if self._state is CLOSED:
            self._transport.abort()
            return
        self._expire_in(self._relay.timing.request_head)
        self._limit.move(self, self._origin(), is_trusted=False)
        # Any byte that the socket does not accept at once is a reason to wait.
        self._transport.set_write_buffer_limits(high=0)
        self._fd = self._socket().fileno()

    def _socket(self) -> socket.socket:
        assert self._transport is not None
        return cast("socket.socket", self._transport.get_extra_info("socket"))

    def _origin(self) -> Hashable:
        """Return the client's address, of IPv6 its network: one host has a whole network of addresses."""
        assert self._transport is not None
        peer = self._transport.get_extra_info("peername")
        if peer is None:
            return None
        return peer[0] if len(peer) == 2 else _network(peer[0].partition("%")[0])

    @property
    def is_idle(self) -> bool:
        """True if no answer is under way, to its last byte."""
        return self._state is READING and not self._is_blocked

    # Reading

    def get_buffer(self, _sizehint: int) -> memoryview:
        """Lend the shared memory for one read."""
        return self._relay.buffers.received

    def buffer_updated(self, nbytes: int) -> None:
        """Read the next request, or a part of it."""
        state = self._state
        if state is LINGERING or state is CLOSED:
            return
        if state is SCRAPING or self._is_blocked:
            # The previous answer is not complete, or the client has not read it: going on would gather answers without bound.
            self.abort()
            return
        reader = self._reader
        was_midway = reader.is_midway
        result = reader.feed(self._relay.buffers.received[:nbytes])
        match result:
            case Request():
                self._serve(result)
            case None:
                if reader.is_midway and not was_midway:
                    self._expire_in(self._relay.timing.request_head)
            case Fault():
                self._is_head = result.is_head
                self._close_after = not result.keeps_alive
                self._relay.counts.ended(result.refusal.outcome)
                self.refuse(result.refusal)

    def _serve(self, request: Request) -> None:
        relay = self._relay
        self._is_head = False
        self._close_after = not request.keeps_alive
        if self._inbound is not None and not self._inbound.current().accepts(
            request.fields.get(b"authorization")
        ):
            relay.counts.ended(UNAUTHORIZED.outcome)
            if self._is_trusted:
                self._trust(self._origin(), is_trusted=False)
            self.refuse(UNAUTHORIZED if relay.pods is None else UNAUTHORIZED_WITH_PODS)
            return
        if not self._is_trusted:
            credentials = self._credentials(request)
            if credentials is not None:
                self._trust(credentials, is_trusted=True)
        routed = relay.find(request.target)
        if isinstance(routed, Refusal):
            self._close_after |= routed.status == HTTPStatus.BAD_REQUEST
            relay.counts.ended(routed.outcome)
            self.refuse(routed)
            return
        self._expires = math.inf  # the scrape has a deadline of its own
        self._state = SCRAPING
        self._limit.begin(self)
        self._scrape = scrape = Scrape(relay, self, routed, request)
        scrape.start()

    def _credentials(self, request: Request) -> Hashable | None:
        """Return a key for the credentials that the client has shown, None if none are required."""
        if self._inbound is None:
            return None
        return blake2b(request.fields[b"authorization"], digest_size=16).digest()

    def _trust(self, identity: Hashable, *, is_trusted: bool) -> None:
        self._is_trusted = is_trusted
        self._limit.move(self, identity, is_trusted=is_trusted)

    def _expire_in(self, seconds: float) -> None:
        self._expires = self._relay.loop.time() + seconds

    # Writing

    def respond(self, head: bytes, body: memoryview) -> None:
        """Send the head, without its last empty line, and the first bytes of the body, in one go."""
        if self._state is CLOSED:
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
        if self._state is CLOSED:
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

    def _send_answer(self, answer: bytes) -> None:
        """Send an answer of the proxy's own."""
        self._queue(answer)

    def pause_writing(self) -> None:
        """Wait: the client takes no more for now."""
        self._is_blocked = True
        self._expire_in(self._relay.timing.unread)
        if self._scrape is not None:
            self._scrape.pause()

    def resume_writing(self) -> None:
        """Go on: the client has taken everything."""
        self._is_blocked = False
        if self._scrape is not None:
            self._expires = math.inf
            self._scrape.resume()
        elif self._state is READING:
            self._expire_in(self._allowance)

    def _closes_after(self) -> bool:
        return self._close_after or self._relay.is_draining

    # How a scrape ends

    def finish(self, *, can_go_on: bool = True) -> None:
        """Wait for the next request now that the answer is complete, or close."""
        self._scrape = None
        if self._state is CLOSED:
            return
        self._has_succeeded = True
        if not self._is_trusted:
            self._trust(self._origin(), is_trusted=True)
        if not can_go_on or self._closes_after():
            self.close()
        else:
            self._go_on(self._relay.timing.keep_alive)

    def _go_on(self, allowance: float) -> None:
        """Wait for the next request, for `allowance` seconds once the client has read everything."""
        if self._state is SCRAPING:
            self._limit.end(self)
        self._state = READING
        self._allowance = allowance
        relay = self._relay
        self._expires = relay.loop.time() + (relay.timing.unread if self._is_blocked else allowance)

    def refuse(self, refusal: Refusal) -> None:
        """Send a refusal as the answer."""
        self._scrape = None
        if self._state is CLOSED:
            return
        closes = self._closes_after()
        self._send_answer(refusal_bytes(refusal, close=closes, with_body=not self._is_head))
        timing = self._relay.timing
        if closes:
            self._linger()
        elif refusal.status in DENIED and not self._has_succeeded:
            self._go_on(timing.denied_keep_alive)
        else:
            self._go_on(timing.keep_alive)

    def _linger(self) -> None:
        # Closing with unread bytes at hand would reset the connection, and the answer with it (RFC 9112, 9.6).
        assert self._transport is not None
        self._limit.end(self)
        self._state = LINGERING
        with contextlib.suppress(OSError):
            self._transport.write_eof()
        self._expire_in(self._relay.timing.linger)

    def part(self) -> None:
        """End an idle connection, so that a request under way to it is not reset."""
        if self._transport is None:
            self.close()  # accepted a moment ago: `connection_made` is still to come
        elif self.is_idle:
            self._linger()

    def reset(self) -> None:
        """Break the connection, so that the answer begun does not look complete."""
        if self._state is not CLOSED and self._transport is not None:
            # Without this an abort ends in a clean FIN.
            self._socket().setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        self.abort()

    def close(self) -> None:
        """Close once everything is sent; until then the connection gives way like an idle one."""
        self._limit.end(self)
        self._state = CLOSED
        self._expire_in(self._relay.timing.unread)
        if self._transport is not None:
            self._transport.close()

    def give_way(self) -> None:
        """Close at once, to make room for another connection."""
        self._limit.leave(self)
        self.abort()

    def abort(self) -> None:
        """Close at once, and leave the scrape under way."""
        self._leave()
        if self._transport is not None:
            self._transport.abort()

    def expire(self, now: float) -> None:
        """Drop a client that is too slow, or idle for too long."""
        if now < self._expires:
            return
        self._expires = math.inf
        if self._scrape is not None:
            self._scrape.give_way()
        elif self._reader.is_midway and self.is_idle:
            self._close_after = True
            self._relay.counts.ended(Outcome.BAD_REQUEST)
            self.refuse(request.TOO_SLOW)
        else:
            self.abort()

    def recheck(self) -> None:
        """Close if the client would not be accepted any more; without certificates there is nothing to check."""

    def eof_received(self) -> None:
        """Leave: a client that sends no more is taken as gone, as nginx and Go's server do."""
        self._leave()

    def connection_lost(self, _exc: Exception | None) -> None:
        """Forget the connection."""
        self._leave()
        self._limit.leave(self)
        self._on_lost(self)

    def _leave(self) -> None:
        self._limit.end(self)
        self._state = CLOSED
        if self._scrape is not None:
            scrape, self._scrape = self._scrape, None
            scrape.leave()


def _network(address: str) -> Hashable:
    """Return the network of an IPv6 address, or the IPv4 address that it stands for."""
    parsed = ipaddress.IPv6Address(address)
    return str(parsed.ipv4_mapped) if parsed.ipv4_mapped else int(parsed) >> 64
