"""One connection to an upstream: connects, secures, sends a request and follows the answer."""

import asyncio
import socket
import ssl
from enum import Enum
from typing import Protocol, cast

from k8s_consul_registrar.proxy import refusals, response
from k8s_consul_registrar.proxy.nodes import KUBELET, Endpoint
from k8s_consul_registrar.proxy.refusals import Malformed, Refusal
from k8s_consul_registrar.proxy.response import END_OF_HEAD, Answer, Chunked, Counted, HeadCache, UntilClose
from k8s_consul_registrar.proxy.tls_stream import Buffers, PlainStep, TlsStep

# The framing of a body that arrived whole with its head.
WHOLE = Counted(0)


class ConnectionState(Enum):
    """State of an upstream connection: HEAD waits for the head of an answer, BODY for the rest of its body."""

    CONNECTING = "connecting"
    IDLE = "idle"
    HEAD = "head"
    BODY = "body"
    CLOSED = "closed"


# On the path of every read: a global is found faster than the member of an enum.
CONNECTING, IDLE, HEAD, BODY, CLOSED = ConnectionState

# Full buffers (128 KB) read off one connection before others have their turn. At 1 MB turns of 64 KB cost 33 % more
# CPU than of 1.3 MB, of 128 KB 6 % and of 256 KB 2 %. Beside eight endless bodies the p99 of small scrapes is 80 ms with
# turns of 256 KB and 126 ms with 1.3 MB.
MAX_READS = 2
# A longer answer than this is paced: a body without end would take most of a core from the other scrapes. Only
# what is left of it takes longer, at 32 MB a second and connection.
BULK_READS = 256  # full buffers, 32 MB
BULK_PAUSE = 0.004  # seconds after each full buffer
# Reasons not to read, as bits: the client is slower, the upstream takes nothing from us, others have their turn.
CLIENT_SLOWER, UNSENT, TURN = 1, 2, 4


class Exchange(Protocol):
    """The scrape that a connection serves."""

    def on_connected(self) -> None:
        """Ask: the connection is up and secure."""

    def on_response(self, start: bytes, body: memoryview) -> None:
        """Pass on the start of a 200 and the first of its body; the memory is lent for this call only."""

    def on_body(self, body: memoryview) -> None:
        """Pass on more of the body; the memory is lent for this call only."""

    def on_redirect(self, status: int, location: bytes) -> None:
        """Ask there, or fail: the answer is a redirect, and the connection is closed."""

    def on_end(self, *, is_exact: bool, is_reusable: bool) -> None:
        """Finish: the answer is complete, another may follow on this connection if `is_reusable`.

        It `is_exact` if each byte passed on belongs to it: another may follow on the client's connection.
        """

    def on_failure(self, refusal: Refusal, *, has_answered: bool) -> None:
        """Fail: no more of an answer will come, of which some byte came if it `has_answered`; all is closed."""


class UpstreamConnection(asyncio.BufferedProtocol):
    """A connection to a kubelet or a Pod, kept between scrapes; without TLS if it has no context.

    `idle_since` is the loop's time at which it was last put into the pool, `expires_at` the Unix time at which
    the upstream's certificate expires.
    """

    __slots__ = (
        "_buffers", "_connecting", "_exchange", "_framing", "_full_reads", "_has_answered", "_heads",
        "_holds", "_interim", "_interim_size", "_is_legacy", "_keeps", "_loop", "_partial", "_reads",
        "_state", "_timer", "_tls", "_transport", "_turn", "context", "endpoint", "expires_at",
        "idle_since",
    )  # fmt: skip

    def __init__(
        self, endpoint: Endpoint, context: ssl.SSLContext | None, buffers: Buffers, heads: HeadCache
    ) -> None:
        self.endpoint = endpoint
        self.context = context
        self.expires_at: float | None = None
        self.idle_since = self._turn = 0.0
        self._buffers = buffers
        self._heads = heads
        self._loop = asyncio.get_running_loop()
        self._state = CONNECTING
        self._exchange: Exchange | None = None
        self._framing: Counted | Chunked | UntilClose = WHOLE
        self._is_legacy = self._has_answered = False
        self._holds = self._interim = self._interim_size = self._reads = self._full_reads = 0
        self._keeps = True
        self._partial = b""
        self._connecting: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._tls: TlsStep | PlainStep
        self._transport: asyncio.Transport | None = None

    # Connecting

    def connect(self, exchange: Exchange, timeout: float) -> None:
        """Connect and secure within `timeout` seconds; ends in `on_connected` or `on_failure`."""
        self._exchange = exchange
        try:
            context, name = self.context, self.endpoint.server_name
            self._tls = PlainStep() if context is None else TlsStep(context, name, self._buffers.incoming)
        except (ValueError, ssl.SSLError):
            self._loop.call_soon(self._fail, refusals.UNSOUND_NAME)
            return
        self._timer = self._loop.call_later(timeout, self._fail, refusals.connect_timeout(timeout))
        self._connecting = self._loop.create_task(self._connect())

    async def _connect(self) -> None:
        address, port = self.endpoint.address, self.endpoint.port
        try:
            # AI_NUMERICHOST: only an IP literal. No name is ever resolved, whatever the table holds.
            await self._loop.create_connection(lambda: self, address, port, flags=socket.AI_NUMERICHOST)
        except OSError as error:
            self._connecting = None
            self._break(error)
        self._connecting = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin the handshake."""
        if self._state is CLOSED:
            cast("asyncio.Transport", transport).abort()
            return
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=0)
        self._handshake(b"")

    def _handshake(self, received: memoryview | bytes) -> None:
        try:
            is_complete = self._tls.advance_handshake(received)
        except ssl.SSLError as error:
            self._flush()
            self._break(error)
            return
        self._flush()
        if is_complete and self._exchange is not None:
            self._cancel_timer()
            self._state = IDLE
            self.expires_at = self._tls.peer_expires_at()
            self._exchange.on_connected()

    def _flush(self) -> None:
        outgoing = self._tls.outgoing
        if outgoing.pending and self._transport is not None:
            self._transport.write(outgoing.read())

    # Asking

    @property
    def is_usable(self) -> bool:
        """True if it is connected, secured and idle."""
        return self._state is IDLE

    def ask(self, exchange: Exchange, request: bytes, *, is_legacy: bool = False) -> None:
        """Send a request; its answer goes to `exchange`, without chunks if the client `is_legacy`."""
        assert self._transport is not None
        self._exchange = exchange
        self._state = HEAD
        self._is_legacy = is_legacy
        self._has_answered = False
        self._full_reads = 0
        self._transport.write(self._tls.encrypt(request))

    def pause(self) -> None:
        """Stop reading until `resume`: the client is slower than the upstream."""
        self._hold(CLIENT_SLOWER)

    def resume(self) -> None:
        """Read on."""
        self._release(CLIENT_SLOWER)

    def pause_writing(self) -> None:
        """Stop reading: an upstream that makes us answer without reading would fill our memory."""
        self._hold(UNSENT)

    def resume_writing(self) -> None:
        """Read on."""
        self._release(UNSENT)

    def _hold(self, reason: int) -> None:
        if self._transport is not None and self._state is not CLOSED:
            if not self._holds:
                self._transport.pause_reading()
            self._holds |= reason

    def _release(self, reason: int) -> None:
        if self._holds & reason and self._transport is not None and self._state is not CLOSED:
            self._holds &= ~reason
            if not self._holds:
                self._transport.resume_reading()

    # Reading

    def get_buffer(self, _sizehint: int) -> memoryview:
        """Lend the shared memory for one read."""
        return self._buffers.lent

    def buffer_updated(self, nbytes: int) -> None:
        """Decrypt received data and follow the answer."""
        state = self._state
        if state is CLOSED:
            return
        buffers = self._buffers
        if state is CONNECTING:
            self._handshake(buffers.received[:nbytes])
            return
        tls = self._tls
        try:
            count = tls.decrypt(buffers.received[:nbytes], buffers.plain)
        except ssl.SSLError as error:
            self._break(error)
            return
        if tls.outgoing.pending:
            self._flush()
        if count:
            self._follow(count)
        if tls.has_ended:
            self._end_by_close()
        elif nbytes == len(buffers.lent) and self._state is not CLOSED:
            self._take_turns()

    def _take_turns(self) -> None:
        """Let other connections have their turn: uvloop reads from one up to 32 times while its time stands still."""
        self._full_reads += 1
        if self._full_reads > BULK_READS:
            self._hold(TURN)
            self._loop.call_later(BULK_PAUSE, self._release, TURN)
            return
        now = self._loop.time()
        if now != self._turn:
            self._turn, self._reads = now, 0
        self._reads += 1
        if self._reads >= MAX_READS:
            self._reads = 0
            self._hold(TURN)
            self._loop.call_soon(self._release, TURN)

    def _follow(self, count: int) -> None:
        exchange = self._exchange
        if exchange is None:
            self.close()  # an answer without a request
            return
        self._has_answered = True
        try:
            if self._state is HEAD:
                self._read_head(exchange, count)
                return
            body = self._buffers.plain[:count]
            is_end = self._framing.take(body)
        except Malformed as error:
            self._fail(refusals.malformed(error))
            return
        exchange.on_body(response.in_a_chunk(body) if self._is_chunking else body)
        if is_end:
            self._end()

    @property
    def _is_chunking(self) -> bool:
        return isinstance(self._framing, UntilClose) and not self._is_legacy

    def _read_head(self, exchange: Exchange, count: int) -> None:
        data: bytes | bytearray = self._buffers.plain_bytes
        view = self._buffers.plain
        if self._partial:
            data = self._partial + view[:count].tobytes()
            view, count = memoryview(data), len(data)
            self._partial = b""
        start = 0
        while start < count:
            end = data.find(END_OF_HEAD, start, count) + len(END_OF_HEAD)
            is_complete = end >= len(END_OF_HEAD)
            if (end if is_complete else count + 1) - start > response.HEAD_LIMIT:
                raise Malformed("its head is too long")
            if not is_complete:
                self._partial = view[start:count].tobytes()
                response.check_beginning(self._partial)
                return
            raw = view[start:end].tobytes()
            answer = self._heads.get(raw) or self._heads.read(raw)
            if answer.status >= 200 or answer.status == response.SWITCHING_PROTOCOLS:
                self._interim = self._interim_size = 0
                self._begin(exchange, answer, view[end:count])
                return
            self._interim += 1
            self._interim_size += end - start
            if self._interim > response.MAX_INTERIM or self._interim_size > response.MAX_INTERIM_SIZE:
                raise Malformed("it sends interim answers without end")
            start = end

    def _begin(self, exchange: Exchange, answer: Answer, body: memoryview) -> None:
        if answer.location:
            self.close()
            exchange.on_redirect(answer.status, answer.location)
            return
        if answer.status != 200:
            self._fail(refusals.other_status(answer.status))
            return
        if answer.ends_by_close:
            if self.endpoint.peer == KUBELET and not self._is_legacy:
                raise Malformed(response.NO_FRAMING)
            self._state, self._framing = BODY, UntilClose()
            start = answer.start if self._is_legacy else answer.start + UntilClose.field
            exchange.on_response(start, response.in_a_chunk(body) if self._is_chunking else body)
            return
        if answer.length is None and self._is_legacy:
            raise Malformed("it sends chunks though asked in HTTP/1.0")
        self._keeps = answer.keeps
        self._state = BODY
        if answer.length == len(body):
            self._framing = WHOLE
            exchange.on_response(answer.start, body)
            self._end()
            return
        self._framing = framing = Chunked() if answer.length is None else Counted(answer.length)
        is_end = framing.take(body)
        exchange.on_response(answer.start, body)
        if is_end:
            self._end()

    def _end(self) -> None:
        exchange = self._exchange
        if exchange is None:
            return  # the client left while it was handed the last bytes
        self._exchange = None
        self._state, is_exact = IDLE, self._framing.is_exact
        exchange.on_end(is_exact=is_exact, is_reusable=is_exact and self._keeps)

    # Ending

    def eof_received(self) -> None:
        """End the answer if the end of the connection ends it; another one was cut.

        A kubelet ends with a close_notify, so that no one on the way can shorten its answer.
        """
        if self.endpoint.peer == KUBELET:
            self._fail(refusals.CLOSED_EARLY)
        else:
            self._end_by_close()

    def _end_by_close(self) -> None:
        exchange = self._exchange
        is_body = self._state is BODY and isinstance(self._framing, UntilClose)
        if exchange is None or not is_body or not self._tls.is_between_records:
            self._fail(refusals.CLOSED_EARLY)
            return
        self._keeps = False
        if self._is_chunking:
            exchange.on_body(memoryview(response.LAST_CHUNK))
        self._end()

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail the scrape that waits for an answer."""
        if isinstance(exc, OSError):
            self._break(exc)
        else:
            self._fail(refusals.CLOSED_EARLY)

    def _break(self, error: OSError) -> None:
        self._fail(refusals.connection_failure(error, self.endpoint.peer, self.context))

    def _fail(self, refusal: Refusal) -> None:
        exchange = self._exchange
        self.close()
        if exchange is not None:
            exchange.on_failure(refusal, has_answered=self._has_answered)

    def close(self) -> None:
        """End the connection at once, without a word to the scrape that uses it."""
        if self._state is CLOSED:
            return
        self._state, self._exchange, self._framing = CLOSED, None, WHOLE
        self._cancel_timer()
        if self._connecting is not None:
            self._connecting.cancel()
            self._connecting = None
        if self._transport is not None:
            self._transport.abort()
            # A transport that is closed while its `create_connection` has not returned keeps its protocol (uvloop).
            self._transport = None

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
