"""One scrape: waits for its place, asks the kubelet, hands the answer on, and ends in one way only."""

from http import HTTPStatus
from time import monotonic
from typing import Protocol

from k8s_consul_registrar.errors import OperationalError
from k8s_consul_registrar.proxy import failures
from k8s_consul_registrar.proxy.headers import Fields, request_rest
from k8s_consul_registrar.proxy.limits import Entry, scrape_deadline
from k8s_consul_registrar.proxy.outcomes import Outcome, Refusal
from k8s_consul_registrar.proxy.relay import Relay, Routed
from k8s_consul_registrar.proxy.upstream import Upstream

# Refusals of these statuses are about whom we asked, and worth remembering.
FAILED = (HTTPStatus.BAD_GATEWAY, HTTPStatus.GATEWAY_TIMEOUT)


class Caller(Protocol):
    """Whoever asked for the scrape; memory handed over is lent for the call."""

    def respond(self, head: bytes, body: memoryview) -> None:
        """Send the head, but for its last empty line, and the first bytes of the body."""

    def send(self, body: memoryview) -> None:
        """Send more of the body."""

    def finish(self, *, can_go_on: bool) -> None:
        """Wait for the next request now that the answer is complete, or close where none `can_go_on`."""

    def refuse(self, refusal: Refusal) -> None:
        """Answer this instead; nothing was sent yet."""

    def reset(self) -> None:
        """Break the connection, so that the answer begun does not look complete."""


class Scrape:
    """A request under way, between a caller and an upstream connection.

    Ends exactly once: complete, refused, cut, or left by its caller; then its place, its timer and its
    connection are given back.
    """

    __slots__ = (
        "_asked_at",
        "_began_at",
        "_caller",
        "_fields",
        "_has_begun",
        "_has_place",
        "_is_over",
        "_is_reused",
        "_relay",
        "_routed",
        "_seconds",
        "_upstream",
    )

    def __init__(self, relay: Relay, caller: Caller, routed: Routed, fields: Fields) -> None:
        self._relay = relay
        self._caller = caller
        self._routed = routed
        self._fields = fields
        self._began_at = self._asked_at = monotonic()
        self._upstream: Upstream | None = None
        # How long it may take once it was let in or queued; 0 until then.
        self._seconds = 0.0
        self._has_place = False
        self._has_begun = False
        self._is_reused = False
        self._is_over = False

    def start(self) -> None:
        """Take a place or wait for one."""
        relay = self._relay
        entry = self._routed.peers.limits.enter(self._routed.route.endpoint, self)
        if entry is Entry.FULL:
            self._refuse(failures.QUEUE_FULL)
            return
        announced = self._fields.get(b"x-prometheus-scrape-timeout-seconds")
        self._seconds = seconds = scrape_deadline(announced, relay.timing.longest_scrape)
        relay.deadlines.start(self, seconds)
        if entry is Entry.RUN:
            self._has_place = True
            self._run()

    def admitted(self) -> None:
        """Begin: a place came free."""
        self._has_place = True
        self._asked_at = monotonic()
        if self._is_current():
            self._run()
        else:
            self._refuse(self._routed.peers.unknown)

    def _is_current(self) -> bool:
        """Say whether whom we ask may still be asked: Nodes and Pods go while a scrape waits or connects."""
        return self._routed.peers.is_current(self._routed.route.endpoint)

    def _run(self) -> None:
        relay, peers = self._relay, self._routed.peers
        upstream = peers.pool.take(self._routed.route.endpoint, peers.context())
        if upstream is None:
            self._dial()
            return
        relay.counts.reuses += 1
        self._upstream = upstream
        self._is_reused = True
        self._ask(upstream)

    def _dial(self) -> None:
        relay = self._relay
        relay.counts.dials += 1
        self._is_reused = False
        self._upstream = Upstream(self._routed.route.endpoint, self._routed.peers.context(), relay.buffers)
        self._upstream.dial(self, relay.timing.connect)

    def _ask(self, upstream: Upstream) -> None:
        fields = self._fields
        try:
            token = self._routed.peers.token()
            rest = request_rest(fields.get(b"accept"), fields.get(b"accept-encoding"), token)
        except (OperationalError, ValueError):
            self._refuse(failures.NO_CREDENTIALS)
            return
        upstream.ask(self, self._routed.request + rest)

    # What the upstream connection tells

    def on_connected(self) -> None:
        """Ask over the fresh connection."""
        assert self._upstream is not None
        if self._is_current():
            self._ask(self._upstream)
        else:
            self._refuse(self._routed.peers.unknown)

    def on_response(self, start: bytes, body: memoryview) -> None:
        """Hand the beginning of the answer on."""
        self._has_begun = True
        counts = self._relay.counts
        counts.upstream_times.observe(monotonic() - self._asked_at)
        counts.body_bytes += len(body)
        self._caller.respond(start, body)

    def on_body(self, body: memoryview) -> None:
        """Hand more of it on."""
        self._relay.counts.body_bytes += len(body)
        self._caller.send(body)

    def on_end(self, *, is_exact: bool, is_reusable: bool) -> None:
        """Keep the connection and let the caller go on."""
        relay, upstream = self._relay, self._upstream
        assert upstream is not None
        self._upstream = None
        if is_reusable and self._is_current() and not relay.is_draining:
            upstream.resume()
            self._routed.peers.pool.put(upstream, relay.loop.time())
        else:
            upstream.close()
        if self._end(Outcome.OK):
            self._caller.finish(can_go_on=is_exact)

    def on_failure(self, refusal: Refusal, *, heard: bool) -> None:
        """Try once more where a kept connection had gone stale; else the scrape has failed."""
        self._upstream = None
        if self._is_reused and not heard and self._is_current():
            self._relay.counts.retries += 1
            self._dial()
        elif self._has_begun:
            self._cut(refusal.reason)
        else:
            self._refuse(refusal)

    # What the caller tells

    def pause(self) -> None:
        """Read no more from the kubelet: the caller takes no more."""
        if self._upstream is not None:
            self._upstream.pause()

    def resume(self) -> None:
        """Read on."""
        if self._upstream is not None:
            self._upstream.resume()

    def leave(self) -> None:
        """End the call to the kubelet at once: the caller is gone."""
        self._end(Outcome.CALLER_LEFT)

    # Ending

    def expire(self) -> None:
        """End in a 504, a 503 or a cut: the time is up."""
        if self._has_begun:
            self._cut(failures.TIMED_OUT.reason)
        else:
            self._refuse(failures.TIMED_OUT if self._has_place else failures.WAITED_OUT)

    def _cut(self, reason: str) -> None:
        if self._end(Outcome.CUT):
            worded = self._routed.peers.worded(Refusal(HTTPStatus.BAD_GATEWAY, Outcome.CUT, reason))
            self._note(worded)
            self._caller.reset()

    def _refuse(self, refusal: Refusal) -> None:
        refusal = self._routed.peers.worded(refusal)
        if self._end(refusal.outcome):
            self._note(refusal)
            self._caller.refuse(refusal)

    def _note(self, refusal: Refusal) -> None:
        if refusal.status in FAILED:
            self._relay.failures.note(self._routed.route.endpoint, refusal.outcome, refusal.reason)

    def _end(self, outcome: Outcome) -> bool:
        """Give everything back; True the first time."""
        if self._is_over:
            return False
        self._is_over = True
        relay, limits, endpoint = self._relay, self._routed.peers.limits, self._routed.route.endpoint
        counts = relay.counts
        counts.ended(outcome)
        counts.durations.observe(monotonic() - self._began_at)
        if self._upstream is not None:
            self._upstream.close()
            self._upstream = None
        if self._seconds:
            relay.deadlines.stop(self, self._seconds)
            if self._has_place:
                limits.leave(endpoint)
            else:
                limits.withdraw(endpoint, self)
        return True
