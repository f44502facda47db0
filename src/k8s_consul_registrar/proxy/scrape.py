"""One scrape: waits for a place, asks the upstream, passes the answer on, and ends exactly once."""

from enum import Enum
from time import monotonic
from typing import Protocol

from k8s_consul_registrar.errors import OperationalError
from k8s_consul_registrar.proxy import refusals
from k8s_consul_registrar.proxy.headers import as_legacy, pod_fields, request_rest, request_start
from k8s_consul_registrar.proxy.limits import FULL, RUN, scrape_deadline
from k8s_consul_registrar.proxy.nodes import KUBELET
from k8s_consul_registrar.proxy.refusals import UPSTREAM_FAILED, Outcome, Refusal
from k8s_consul_registrar.proxy.relay import Relay, Routed
from k8s_consul_registrar.proxy.request import Request
from k8s_consul_registrar.proxy.routes import redirected
from k8s_consul_registrar.proxy.upstream import UpstreamConnection

# A client may announce any timeout. One of fewer seconds says nothing about the upstream.
FAIR_TIMEOUT = 0.9


class ScrapeState(Enum):
    """State of a scrape: without a place, connecting, waiting for an answer, passing it on, ended."""

    QUEUED = "queued"
    CONNECTING = "connecting"
    WAITING = "waiting"
    RELAYING = "relaying"
    DONE = "done"


# On the path of every scrape: a global is found faster than the member of an enum.
QUEUED, CONNECTING, WAITING, RELAYING, DONE = ScrapeState
OK = Outcome.OK


class Client(Protocol):
    """The client connection that asked for a scrape; memory handed over is lent for the call."""

    def respond(self, head: bytes, body: memoryview) -> None:
        """Send the head, without its last empty line, and the first bytes of the body."""

    def send(self, body: memoryview) -> None:
        """Send more of the body."""

    def finish(self, *, can_go_on: bool) -> None:
        """Wait for the next request, or close if none `can_go_on`: the answer is complete."""

    def refuse(self, refusal: Refusal) -> None:
        """Send a refusal; nothing was sent yet."""

    def reset(self) -> None:
        """Break the connection, so that the answer begun does not look complete."""


class Scrape:
    """A request under way, between a client connection and an upstream connection.

    It ends exactly once: complete, refused, cut, or left by its client; then its place, its deadline and its
    connection are given back.
    """

    __slots__ = (
        "_asked_at",
        "_began_at",
        "_client",
        "_connection",
        "_has_redirected",
        "_is_reused",
        "_is_stalled",
        "_relay",
        "_request",
        "_routed",
        "_seconds",
        "_state",
    )

    def __init__(self, relay: Relay, client: Client, routed: Routed, request: Request) -> None:
        self._relay = relay
        self._client = client
        self._routed = routed
        self._request = request
        self._state = QUEUED
        self._began_at = self._asked_at = monotonic()
        self._connection: UpstreamConnection | None = None
        self._is_reused = self._has_redirected = False
        # True while the client takes no more.
        self._is_stalled = False
        # The time allowed; 0 for a scrape that never entered the limits.
        self._seconds = 0.0

    def start(self) -> None:
        """Take a place or wait for one."""
        relay = self._relay
        entry = self._routed.upstream.limits.enter(self._routed.route.endpoint, self, self._began_at)
        if entry is FULL:
            self._refuse(refusals.QUEUE_FULL)
            return
        announced = self._request.fields.get(b"x-prometheus-scrape-timeout-seconds")
        self._seconds = seconds = scrape_deadline(announced, relay.timing.longest_scrape)
        relay.deadlines.start(self, seconds)
        if entry is RUN:
            self._state = CONNECTING
            self._run()

    def admitted(self) -> None:
        """Begin: a place came free."""
        self._asked_at = monotonic()
        self._state = CONNECTING
        if self._is_current():
            self._run()
        else:
            self._refuse(self._routed.upstream.unknown)

    def _is_current(self) -> bool:
        """Return True if the upstream may still be asked: Nodes and Pods go while a scrape waits or connects."""
        return self._routed.upstream.is_current(self._routed.route.endpoint)

    def _run(self) -> None:
        upstream = self._routed.upstream
        connection = upstream.pool.take(self._routed.route.endpoint, upstream.context())
        if connection is None:
            self._connect()
            return
        self._relay.counts.reuses += 1
        self._connection = connection
        self._is_reused = True
        self._ask(connection)

    def _connect(self) -> None:
        relay, upstream = self._relay, self._routed.upstream
        relay.counts.dials += 1
        self._state = CONNECTING
        self._is_reused = False
        self._connection = connection = UpstreamConnection(
            self._routed.route.endpoint, upstream.context(), relay.buffers, upstream.heads
        )
        connection.connect(self, relay.timing.connect)

    def _ask(self, connection: UpstreamConnection) -> None:
        self._state = WAITING
        fields, start, is_legacy = self._request.fields, self._routed.request, self._request.is_legacy
        try:
            token = self._routed.upstream.token()
            rest = request_rest(fields.get(b"accept"), fields.get(b"accept-encoding"), token)
        except (OperationalError, ValueError):
            self._refuse(refusals.NO_CREDENTIALS)
            return
        if is_legacy:
            start = as_legacy(start)
        if self._routed.route.endpoint.peer != KUBELET:
            left = self._seconds - (monotonic() - self._began_at)
            start += pod_fields(left, fields.get(b"traceparent"))
        connection.ask(self, start + rest, is_legacy=is_legacy)

    # Called by the upstream connection

    def on_connected(self) -> None:
        """Ask over the new connection."""
        assert self._connection is not None
        if self._is_current():
            self._ask(self._connection)
        else:
            self._refuse(self._routed.upstream.unknown)

    def on_response(self, start: bytes, body: memoryview) -> None:
        """Pass on the start of the answer."""
        self._state = RELAYING
        counts = self._relay.counts
        counts.upstream_times.observe(monotonic() - self._asked_at)
        counts.body_bytes += len(body)
        self._client.respond(start, body)

    def on_body(self, body: memoryview) -> None:
        """Pass on more of the body."""
        self._relay.counts.body_bytes += len(body)
        self._client.send(body)

    def on_redirect(self, status: int, location: bytes) -> None:
        """Follow a redirect of a Pod to itself once; any other one has failed."""
        self._connection = None
        route = None if self._has_redirected else redirected(self._routed.route, location)
        if route is None or not self._is_current():
            self._refuse(refusals.redirect(status, location))
            return
        self._has_redirected = True
        self._routed = Routed(route, request_start(route), self._routed.upstream)
        self._connect()

    def on_end(self, *, is_exact: bool, is_reusable: bool) -> None:
        """Keep the connection and let the client go on."""
        relay, connection, routed = self._relay, self._connection, self._routed
        assert connection is not None
        self._connection = None
        upstream, endpoint, now = routed.upstream, routed.route.endpoint, monotonic()
        if is_reusable and upstream.is_current(endpoint) and not relay.is_draining:
            if self._is_stalled:
                connection.resume()
            upstream.pool.put(connection, now)
        else:
            connection.close()
        if self._end(OK, now):
            relay.last_scrapes.noted[endpoint] = self._began_at, now, OK, connection.expires_at
            self._client.finish(can_go_on=is_exact)

    def on_failure(self, refusal: Refusal, *, has_answered: bool) -> None:
        """Try once more if a kept connection had gone stale; otherwise the scrape has failed."""
        self._connection = None
        if self._is_reused and not has_answered and self._is_current():
            self._relay.counts.retries += 1
            self._connect()
        elif self._state is RELAYING:
            self._cut(refusal.reason)
        else:
            self._refuse(refusal)

    # Called by the client connection

    def pause(self) -> None:
        """Stop reading from the upstream: the client takes no more for now."""
        if self._connection is not None:
            self._is_stalled = True
            self._connection.pause()
            self._routed.upstream.limits.stall(self._routed.route.endpoint, self, monotonic())

    def resume(self) -> None:
        """Read on."""
        self._is_stalled = False
        self._routed.upstream.limits.go_on(self)
        if self._connection is not None:
            self._connection.resume()

    def give_way(self) -> None:
        """Leave the place to another scrape: reset a client that reads nothing, refuse one that waits."""
        if self._state is QUEUED:
            self._refuse(refusals.QUEUE_FULL)
        elif self._end(Outcome.CALLER_STALLED, monotonic()):
            self._client.reset()

    def leave(self) -> None:
        """Drop the upstream's answer: the client is gone."""
        self._end(Outcome.CALLER_LEFT, monotonic())

    # Ending

    def expire(self) -> None:
        """End in a 504, a 503 or a cut: the time is up."""
        is_fair = self._seconds >= FAIR_TIMEOUT
        if self._state is RELAYING:
            self._cut(refusals.TIMED_OUT.reason, Outcome.CUT if is_fair else Outcome.CALLER_LEFT)
        elif self._state is QUEUED:
            self._refuse(refusals.WAITED_OUT)
        else:
            self._refuse(refusals.TIMED_OUT if is_fair else refusals.TOO_SHORT)

    def _cut(self, reason: str, outcome: Outcome = Outcome.CUT) -> None:
        refusal = Refusal(refusals.CLOSED_EARLY.status, outcome, reason)
        now = monotonic()
        if self._end(outcome, now):
            self._note(self._routed.upstream.describe(refusal), now)
            self._client.reset()

    def _refuse(self, refusal: Refusal) -> None:
        refusal = self._routed.upstream.describe(refusal)
        now = monotonic()
        if self._end(refusal.outcome, now):
            self._note(refusal, now)
            self._client.refuse(refusal)

    def _note(self, refusal: Refusal, now: float) -> None:
        if refusal.status in UPSTREAM_FAILED and refusal.outcome is not Outcome.CALLER_LEFT:
            endpoint = self._routed.route.endpoint
            self._relay.failures.note(endpoint, refusal.outcome, refusal.reason)
            self._relay.last_scrapes.noted[endpoint] = self._began_at, now, refusal.outcome, None

    def _end(self, outcome: Outcome, now: float) -> bool:
        """Give everything back; True the first time."""
        state = self._state
        if state is DONE:
            return False
        self._state = DONE
        relay, limits, endpoint = self._relay, self._routed.upstream.limits, self._routed.route.endpoint
        if self._is_stalled:
            limits.go_on(self)
        counts = relay.counts
        counts.outcomes[outcome] += 1
        counts.durations.observe(now - self._began_at)
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._seconds:
            relay.deadlines.stop(self, self._seconds)
            if state is QUEUED:
                limits.withdraw(endpoint, self)
            else:
                limits.leave(endpoint)
        return True
