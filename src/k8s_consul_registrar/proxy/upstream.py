"""One connection to a kubelet: dials, secures, asks and follows the answer, for one scrape at a time."""

import asyncio
import socket
import ssl
from typing import Protocol, cast

from k8s_consul_registrar.proxy import failures
from k8s_consul_registrar.proxy.buffers import Buffers
from k8s_consul_registrar.proxy.nodes import Endpoint
from k8s_consul_registrar.proxy.outcomes import Refusal
from k8s_consul_registrar.proxy.response import END_OF_HEAD, HEAD_LIMIT, Answer, Chunked, Counted, Malformed
from k8s_consul_registrar.proxy.tls import PlainStep, TlsStep

SWITCHING_PROTOCOLS = 101
# The framing of a body that came along with its head.
WHOLE = Counted(0)


class Exchange(Protocol):
    """Whoever asks over a connection and hears what comes of it."""

    def on_connected(self) -> None:
        """Ask: the connection is up and secure."""

    def on_response(self, start: bytes, body: memoryview) -> None:
        """Take how the answer to a 200 begins and the first of its body; the memory is lent for this call only."""

    def on_body(self, body: memoryview) -> None:
        """Take more of the body; the memory is lent for this call only."""

    def on_end(self, *, is_exact: bool, is_reusable: bool) -> None:
        """Take note that the answer is complete, and whether another may follow on this connection.

        Where it `is_exact`, what was handed over is the answer to the last byte, so that another may follow
        on the caller's connection too.
        """

    def on_failure(self, refusal: Refusal, *, heard: bool) -> None:
        """No answer will come or the rest will not; `heard` is whether any byte of one came. The connection is gone."""


class Upstream(asyncio.BufferedProtocol):
    """A connection to a kubelet or a Pod, kept between scrapes; without TLS where there is no context for it.

    `idle_since` is the loop's time at which it was last put aside.
    """

    __slots__ = (
        "_buffers",
        "_closed",
        "_connecting",
        "_exchange",
        "_framing",
        "_heard",
        "_is_paused",
        "_keeps",
        "_loop",
        "_partial",
        "_timer",
        "_tls",
        "_transport",
        "context",
        "endpoint",
        "idle_since",
    )

    def __init__(self, endpoint: Endpoint, context: ssl.SSLContext | None, buffers: Buffers) -> None:
        self.endpoint = endpoint
        self.context = context
        self.idle_since = 0.0
        self._buffers = buffers
        self._loop = asyncio.get_running_loop()
        self._exchange: Exchange | None = None
        self._framing: Counted | Chunked | None = None
        self._heard = False
        self._is_paused = False
        self._keeps = True
        self._partial = b""
        self._closed = False
        self._connecting: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._tls: TlsStep | PlainStep | None = None
        self._transport: asyncio.Transport | None = None

    # Connecting

    def dial(self, exchange: Exchange, timeout: float) -> None:
        """Connect and secure within `timeout` seconds; ends in `on_connected` or `on_failure`."""
        self._exchange = exchange
        try:
            context, name = self.context, self.endpoint.server_name
            self._tls = PlainStep() if context is None else TlsStep(context, name, self._buffers.incoming)
        except (ValueError, ssl.SSLError):
            self._loop.call_soon(self._fail, failures.UNSOUND_NAME)
            return
        self._timer = self._loop.call_later(timeout, self._fail, failures.connect_timeout(timeout))
        self._connecting = self._loop.create_task(self._connect())

    async def _connect(self) -> None:
        address, port = self.endpoint.address, self.endpoint.port
        try:
            # AI_NUMERICHOST: an IP literal or nothing. No name is ever resolved, whatever the table holds.
            await self._loop.create_connection(lambda: self, address, port, flags=socket.AI_NUMERICHOST)
        except OSError as error:
            self._connecting = None
            self._break(error)
        self._connecting = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin the handshake."""
        self._transport = cast("asyncio.Transport", transport)
        if self._closed:
            self._transport.abort()
            return
        self._transport.set_write_buffer_limits(high=0)
        self._handshake(b"")

    def _handshake(self, received: memoryview | bytes) -> None:
        assert self._tls is not None
        try:
            is_complete = self._tls.advance_handshake(received)
        except ssl.SSLError as error:
            self._flush()
            self._break(error)
            return
        self._flush()
        if is_complete and self._exchange is not None:
            assert self._timer is not None
            self._timer.cancel()
            self._timer = None
            self._exchange.on_connected()

    def _flush(self) -> None:
        if self._tls is not None and self._tls.has_output and self._transport is not None:
            self._transport.write(self._tls.output())

    # Asking

    @property
    def is_usable(self) -> bool:
        """Whether it is up, secure and idle."""
        return not self._closed and self._exchange is None and self._timer is None

    def ask(self, exchange: Exchange, request: bytes) -> None:
        """Send a request; what comes of it goes to `exchange`."""
        assert self._tls is not None
        assert self._transport is not None
        self._exchange = exchange
        self._heard = False
        self._transport.write(self._tls.encrypt(request))

    def pause(self) -> None:
        """Read no more until `resume`: the caller is slower than the kubelet."""
        if self._transport is not None and not self._closed:
            self._is_paused = True
            self._transport.pause_reading()

    def resume(self) -> None:
        """Read on."""
        if self._is_paused and self._transport is not None and not self._closed:
            self._is_paused = False
            self._transport.resume_reading()

    # Reading

    def get_buffer(self, _sizehint: int) -> memoryview:
        """Lend the shared memory for one read."""
        return self._buffers.received

    def buffer_updated(self, nbytes: int) -> None:
        """Decrypt what came and follow the answer."""
        if self._closed:
            return
        buffers = self._buffers
        if self._timer is not None:
            self._handshake(buffers.received[:nbytes])
            return
        tls = self._tls
        assert tls is not None
        try:
            count = tls.decrypt(buffers.received[:nbytes], buffers.plain)
        except ssl.SSLError as error:
            self._break(error)
            return
        if tls.has_output:
            self._flush()
        if count:
            self._follow(count)
        if tls.has_ended:
            self._fail(failures.CLOSED_EARLY)

    def _follow(self, count: int) -> None:
        exchange, framing = self._exchange, self._framing
        if exchange is None:
            self.close()  # an answer nobody asked for
            return
        self._heard = True
        try:
            if framing is None:
                self._read_head(exchange, count)
                return
            body = self._buffers.plain[:count]
            is_end = framing.take(body)
        except Malformed as error:
            self._fail(failures.malformed(error))
            return
        exchange.on_body(body)
        if is_end:
            self._end()

    def _read_head(self, exchange: Exchange, count: int) -> None:
        data: bytes | bytearray = self._buffers.plain_bytes
        view = self._buffers.plain
        if self._partial:
            data = self._partial + view[:count].tobytes()
            view, count = memoryview(data), len(data)
            self._partial = b""
        start = 0
        while True:
            end = data.find(END_OF_HEAD, start, count) + len(END_OF_HEAD)
            if end < len(END_OF_HEAD):
                self._partial = view[start:count].tobytes()
                end = count + 1
            if end - start > HEAD_LIMIT:
                raise Malformed("its head is too long")
            if self._partial:
                return
            answer = self._buffers.answers.read(view[start:end].tobytes())
            if answer.status >= 200 or answer.status == SWITCHING_PROTOCOLS:
                break
            start = end
            if start == count:
                return
        self._begin(exchange, answer, view[end:count])

    def _begin(self, exchange: Exchange, answer: Answer, body: memoryview) -> None:
        if answer.status != 200:
            self._fail(failures.other_status(answer.status))
            return
        self._keeps = answer.keeps
        if answer.length == len(body):
            self._framing = WHOLE
            exchange.on_response(answer.start, body)
            self._end()
            return
        framing = Chunked() if answer.length is None else Counted(answer.length)
        is_end = framing.take(body)
        self._framing = framing
        exchange.on_response(answer.start, body)
        if is_end:
            self._end()

    def _end(self) -> None:
        exchange, framing = self._exchange, self._framing
        if exchange is None or framing is None:
            return  # the caller left while it was handed the last bytes
        self._exchange = self._framing = None
        is_exact = framing.is_exact
        exchange.on_end(is_exact=is_exact, is_reusable=is_exact and self._keeps and not self._closed)

    # Ending

    def eof_received(self) -> None:
        """Count the end of the stream as the end of the connection: the framing tells whether too early."""
        self._fail(failures.CLOSED_EARLY)

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell whoever waits for an answer."""
        if isinstance(exc, OSError):
            self._break(exc)
        else:
            self._fail(failures.CLOSED_EARLY)

    def _break(self, error: OSError) -> None:
        self._fail(failures.connection_failure(error, self.endpoint.peer, self.context))

    def _fail(self, refusal: Refusal) -> None:
        exchange, heard = self._exchange, self._heard
        self.close()
        if exchange is not None:
            exchange.on_failure(refusal, heard=heard)

    def close(self) -> None:
        """End the connection at once, whatever is under way; nobody is told."""
        if self._closed:
            return
        self._closed = True
        self._exchange = self._framing = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._connecting is not None:
            self._connecting.cancel()
            self._connecting = None
        if self._transport is not None:
            self._transport.abort()
