"""Log lines, metrics and status: what the registrar says about its work."""

import math
import time
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping

from msgspec.structs import replace

from k8s_consul_registrar.errors import Reason
from k8s_consul_registrar.kube.source_state import SourceStatus
from k8s_consul_registrar.model import Kind, Rejection, Source, Target, Written
from k8s_consul_registrar.registrar.brake import Ground, Held, Proof
from k8s_consul_registrar.registrar.claims import Endpoints
from k8s_consul_registrar.registrar.decide import Conflict, Kept, Withheld, Write
from k8s_consul_registrar.registrar.metrics import RegistrarMetrics
from k8s_consul_registrar.registrar.observed import Observed
from k8s_consul_registrar.registrar.status import Activity, Counts, RegistrarStatus
from k8s_consul_registrar.targets.scrape_config import socket_address
from k8s_consul_registrar.telemetry import Failures, get_logger

# Of many things of one sort the log names this many; the rest is a count.
MOST_NAMED = 20
# Seconds between two log lines about changes; the first change after a quiet second is logged at once.
CHANGES_INTERVAL = 1.0
# Seconds between two looks at the addresses that Pods share.
ENDPOINTS_INTERVAL = 5.0
# Internal errors that are remembered as logged at most: each names an ID.
MOST_ERRORS = 1000

log, log_names = get_logger("registrar"), get_logger("names")


class LogOnce:
    """The persistent conditions of one topic: each is logged when it begins, and again only when it changes."""

    def __init__(self) -> None:
        self._logged: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._logged)

    def new(self, about: str, text: str) -> bool:
        """Note a condition; return whether it is new or changed."""
        is_new = self._logged.get(about) != text
        self._logged[about] = text
        return is_new

    def over(self, about: str) -> bool:
        """Note that a condition has ended; return whether it was noted."""
        return self._logged.pop(about, None) is not None

    def only(self, facts: Mapping[str, str]) -> list[tuple[str, str]]:
        """Note that just these conditions stand; return those that are new or changed."""
        fresh = [(about, text) for about, text in facts.items() if self._logged.get(about) != text]
        self._logged = dict(facts)
        return fresh

    def clear(self) -> None:
        """Forget everything."""
        self._logged = {}


class Reporter:
    """Turns what happens into log lines, metrics and the status."""

    def __init__(
        self,
        metrics: RegistrarMetrics,
        status: RegistrarStatus,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._metrics = metrics
        self._status = status
        self._clock = clock
        self._debug = log.bind().debug  # bound once: each call would look the level up
        self._refused, self._conflicts, self._rejections = LogOnce(), LogOnce(), LogOnce()
        self._brakes, self._errors, self._shared = LogOnce(), LogOnce(), LogOnce()
        self._sources, self._consul = Failures(), Failures()
        self._seen_endpoints, self._endpoints_due = 0, -math.inf
        self._changes: Counts | None = None
        self._batches = 0
        self._changes_due = -math.inf
        self._named_until = 0.0
        self._named = 0
        self._is_up: bool | None = None
        metrics.awaiting_proxy.set_function(lambda: len(status.awaiting_proxy))

    # Sources and Consul

    def sources(self, statuses: Mapping[Source, SourceStatus]) -> None:
        """Show how well each source is known."""
        problems = {str(source): status.problem for source, status in statuses.items() if status.problem}
        for about in self._status.source_problems.keys() - problems.keys():
            log.info("can be listed again", source=about)
        self._status.source_problems = problems
        for about, text in self._sources.fresh(problems.items()):
            log.warning("cannot list; nothing of it is deregistered meanwhile", source=about, problem=text)
        for kind in Kind:
            states = [status.is_followed for source, status in statuses.items() if source.kind is kind]
            self._metrics.follows(kind, all(states) if states else None)

    def consul(self, problem: str, *, is_up: bool) -> None:
        """Show whether Consul is available; a change is logged."""
        if is_up is self._is_up and self._status.consul_problem == ("" if is_up else problem):
            return
        for _, text in self._consul.fresh([("consul", problem)] if problem and not is_up else []):
            log.error("Consul cannot be used; trying again", problem=text)
        if is_up and self._status.consul_problem:
            log.info("Consul can be used again")
        self._status.consul_problem = "" if is_up else problem
        if is_up is not self._is_up:
            self._is_up = is_up
            self._metrics.consul_up.set(is_up)

    # Leadership

    def leads(self) -> None:
        """Show that this replica writes."""
        self._status.is_standby = False
        self._metrics.leader.set(1)

    def stands_by(self) -> None:
        """Show that another replica writes: what was refused or in conflict is that one's to know."""
        self.flush()
        self._status.is_standby = True
        self._metrics.leader.set(0)
        self._status.refused.clear()
        self._status.conflicts.clear()
        self._status.lost.clear()
        self._status.awaiting_proxy.clear()
        self._status.withheld.clear()
        self._status.held = ()
        for topic in (self._refused, self._conflicts, self._brakes):
            topic.clear()
        self._metrics.conflicts.set(0)
        self._metrics.held.set(0)

    # Single service IDs

    def conflict(self, service_id: str, conflict: Conflict) -> None:
        """Report an ID that an object asks for and that belongs to something else."""
        self._forget_refusal(service_id)
        self._status.conflicts[service_id] = conflict
        self._metrics.conflicts.set(len(self._status.conflicts))
        text = f"wanted by {conflict.key}, held by {conflict.holder}"
        if self._conflicts.new(service_id, text) and self._may_name():
            log.warning("conflict: the service ID is not ours to write", service=service_id, problem=text)

    def lost(self, service_id: str, losers: tuple[Rejection, ...]) -> None:
        """Report the objects that do not get an ID they ask for."""
        self._status.lost[service_id] = losers
        for one in losers:
            self.rejected(one)

    def rejected(self, rejection: Rejection) -> None:
        """Report an object that asks to be scraped and cannot be."""
        if rejection.reason == Reason.NAMESPACE_FULL:
            return  # there may be thousands, of which the quota tells together
        text = f"{rejection.reason}: {rejection.detail}"
        if self._rejections.new(str(rejection.key), text) and self._may_name():
            log.warning("rejected", object=str(rejection.key), reason=text)

    def refused(self, verb: str, service_id: str, problem: str) -> None:
        """Report a write that Consul refused."""
        self._metrics.wrote(verb, 0, 1)
        self._status.refused[service_id] = problem
        if self._refused.new(service_id, problem) and self._may_name():
            log.warning("Consul refuses a service", verb=verb, service=service_id, problem=problem)

    def withheld(self, service_id: str, action: Withheld) -> bool:
        """Report a write that the policy does not allow; return True if that is new."""
        verb = verb_of(action.write)
        is_new = self._status.withheld.get(service_id) != verb
        if is_new:
            self.settled(service_id)
            self._status.withheld[service_id] = verb
            self._status.withheld_changes += 1
        if losers := getattr(action.write, "losers", ()):
            self.lost(service_id, losers)
        return is_new

    def keep_conflicts(self, claims: Container[str]) -> None:
        """Forget conflicts about IDs that no object asks for any more."""
        for service_id in [one for one in self._status.conflicts if one not in claims]:
            self.settled(service_id)

    def keep_withheld(self, is_held: Callable[[str], bool]) -> None:
        """Forget withheld removals of what Consul does not hold any more."""
        removals = [one for one, verb in self._status.withheld.items() if verb == "deregister"]
        for service_id in removals:
            if not is_held(service_id):
                self.settled(service_id)

    def settled(self, service_id: str) -> None:
        """Forget what stood against an ID."""
        if self._status.conflicts and self._status.conflicts.pop(service_id, None) is not None:
            self._metrics.conflicts.set(len(self._status.conflicts))
            self._conflicts.over(service_id)
        self._forget_refusal(service_id)

    def _forget_refusal(self, service_id: str) -> None:
        if self._status.refused and self._status.refused.pop(service_id, None) is not None:
            self._refused.over(service_id)
        if self._status.lost:
            self._status.lost.pop(service_id, None)
        if self._status.withheld and self._status.withheld.pop(service_id, None) is not None:
            self._status.withheld_changes += 1

    def wrote(self, verb: str, services: Iterable[tuple[str, Target | None]], written: Written) -> None:
        """Count writes."""
        self._metrics.wrote(verb, written.done, 0)
        for number, (service_id, target) in enumerate(services):
            if number == MOST_NAMED:
                break
            where = {} if target is None else {"address": target.address, "port": target.port}
            self._debug(verb, service=service_id, **where)

    def removed(self, service_id: str, record: Observed, proof: Proof) -> None:
        """Report a service that was removed, with the record that was there; the audit has logged it."""

    def lag(self, seconds: float) -> None:
        """Count the time from an event to Consul's acknowledgement of what it led to."""
        self._metrics.event_lag.observe(seconds)

    def internal_error(self, where: str, error: Exception) -> None:
        """Report an error in this program: it is confined to one ID, source or task."""
        self._metrics.internal_errors.inc()
        if len(self._errors) >= MOST_ERRORS:
            self._errors.clear()
        if self._errors.new(where, f"{type(error).__name__}: {error}"):
            log.error("internal error; please report it", where=where, exc_info=error)

    def names_unchecked(self, problem: str) -> None:
        """Report that service names can be checked at this registrar's own node only."""
        log_names.warning(
            "service names cannot be checked in the whole catalog; only this registrar's own node is",
            problem=problem,
        )

    def prefix_differs_in_case(self, prefix: str, service_id: str) -> None:
        """Report services under a prefix that Consul's catalog takes for the same one."""
        log.warning(
            "SERVICE_ID_PREFIX differs only in case from services in Consul, whose catalog ignores case",
            prefix=prefix,
            service=service_id,
        )

    def shared_endpoints(self, endpoints: Endpoints) -> None:
        """Report living Pods at one address and port, if they changed and not too often."""
        now = self._clock()
        if endpoints.generation == self._seen_endpoints or now < self._endpoints_due:
            return
        self._seen_endpoints, self._endpoints_due = endpoints.generation, now + ENDPOINTS_INTERVAL
        shared = tuple(endpoints.shared())
        self._metrics.shared_endpoints.set(len(shared))
        facts = {
            socket_address(members[0].address, members[0].port): " ".join(
                sorted(one.id for one in members)[:MOST_NAMED]
            )
            for members in shared
        }
        for about, text in self._shared.only(facts)[:MOST_NAMED]:
            log.warning(
                "several Pods have one address and port; all stay registered", address=about, services=text
            )

    # Batches and resyncs

    def batch(self, counts: Counts) -> None:
        """Report a batch that was reconciled; one that wrote nothing does not count, nor as a success."""
        if not (counts.writes or counts.refused):
            return
        self._metrics.passes.labels(counts.outcome).inc()
        self._metrics.pass_seconds.observe(counts.seconds)
        if not counts.refused:
            self._metrics.last_success.set(time.time())
        self._changes = counts if self._changes is None else self._changes + counts
        self._batches += 1
        self.flush_due()

    def failed(self) -> None:
        """Count a batch or a resync that ended because Consul is unavailable."""
        self._metrics.passes.labels("failure").inc()

    def resynced(
        self,
        counts: Counts,
        *,
        was_read: bool,
        kept: Mapping[Kept, int],
        held: tuple[Held, ...],
        rejections: Iterable[Rejection],
    ) -> None:
        """Report a resync: every standing figure is renewed."""
        self.flush()
        counts = replace(counts, conflicts=len(self._status.conflicts))
        now = time.time()
        self._status.recent.appendleft(Activity(is_resync=True, at=now, counts=counts))
        self._metrics.passes.labels(counts.outcome).inc()
        self._metrics.resyncs.inc()
        self._metrics.pass_seconds.observe(counts.seconds)
        self._metrics.last_success.set(now)
        if was_read:
            self._metrics.last_full_pass.set(now)
        for why in Kept:
            self._metrics.kept.labels(why.value).set(kept.get(why, 0))
        self._brake(held)
        lost = (one for one in self._status.lost_rejections() if one.reason != Reason.NAMESPACE_FULL)
        every = (*rejections, *lost)
        facts = {str(one.key): f"{one.reason}: {one.detail}" for one in every}
        for about, text in self._rejections.only(facts)[:MOST_NAMED]:
            log.warning("rejected", object=about, reason=text)
        if self._status.withheld:
            log.info("the policy withholds writes", **Counter(self._status.withheld.values()))
        _log(log.info, "resync", counts)

    def _brake(self, held: tuple[Held, ...]) -> None:
        self._status.held = held
        self._metrics.held.set(sum(len(one.ids) for one in held))
        brakes = {
            f"{one.source}{', quota' if one.ground is Ground.QUOTA else ''}": f"{len(one.ids)} services are "
            f"{'over the quota' if one.ground is Ground.QUOTA else 'missing from the list'}; waiting for lists that "
            f"agree for {one.due - one.since:g} s: {', '.join(one.ids[:MOST_NAMED])}"
            for one in held
        }
        for about, text in self._brakes.only(brakes):
            log.warning("brake: a mass removal is held", source=about, held=text)

    @property
    def due(self) -> float:
        """When the log line about changes is due, in seconds of the clock."""
        return math.inf if self._changes is None else self._changes_due

    def flush_due(self) -> None:
        """Log what the latest batches did, if that is due."""
        if self._changes is not None and self._clock() >= self._changes_due:
            self.flush()

    def flush(self) -> None:
        """Log what the latest batches did, due or not."""
        if self._changes is None:
            return
        counts, batches = self._changes, self._batches
        self._changes, self._batches = None, 0
        self._changes_due = self._clock() + CHANGES_INTERVAL
        counts = replace(
            counts, rejected=len(self._status.lost), held=sum(len(one.ids) for one in self._status.held)
        )
        self._status.recent.appendleft(Activity(is_resync=False, at=time.time(), counts=counts))
        _log(log.info, "changes", counts, passes=batches)

    def _may_name(self) -> bool:
        """Return whether the log may name one more thing now: `MOST_NAMED` in a second."""
        now = self._clock()
        if now >= self._named_until:
            self._named_until, self._named = now + 1.0, 0
        self._named += 1
        return self._named <= MOST_NAMED


def verb_of(write: Write) -> str:
    """Return a write's verb, as metrics have it."""
    return type(write).__name__.lower()


def _log(write: Callable[..., object], event: str, counts: Counts, **more: int) -> None:
    write(
        event,
        registered=counts.registered,
        updated=counts.updated,
        deregistered=counts.deregistered,
        unchanged=counts.unchanged,
        refused=counts.refused,
        rejected=counts.rejected,
        conflicts=counts.conflicts,
        held=counts.held,
        seconds=round(counts.seconds, 3),
        **more,
    )
