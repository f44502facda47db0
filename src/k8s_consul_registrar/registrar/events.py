"""Kubernetes Events of a registrar: their texts about an object, and the time at which each is due. Pure."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import StrEnum

import msgspec
from msgspec.structs import replace

from k8s_consul_registrar.kube.events import DueEvent, EventOutcome, ObjectEvent, Occurrences
from k8s_consul_registrar.kube.objects import Item
from k8s_consul_registrar.model import Kind, KubeService, Node, ObjectKey, Pod, Rejection, Target, Written
from k8s_consul_registrar.registrar.brake import Ground, Held, Proof
from k8s_consul_registrar.registrar.decide import Conflict, Kept
from k8s_consul_registrar.registrar.desired import DesiredState
from k8s_consul_registrar.registrar.metrics import RegistrarMetrics
from k8s_consul_registrar.registrar.observed import AsDesired, Observed
from k8s_consul_registrar.registrar.reporter import Reporter
from k8s_consul_registrar.registrar.status import Counts, RegistrarStatus
from k8s_consul_registrar.targets.endpoints import ServiceScrape, Value
from k8s_consul_registrar.targets.scrape_config import socket_address

# Standing rejections that are looked at in one step; less than a millisecond of work.
SLICE = 250
# What an Event says of a removal.
_GONE = "nothing asks for it any more"
_WHY = {Ground.QUOTA: "its namespace has more targets than MAX_TARGETS_PER_NAMESPACE"}


class EventReason(StrEnum):
    """Reasons of Events, as `kubectl describe` shows them."""

    REJECTED = "ScrapeRejected"
    CONFLICT = "ScrapeConflict"
    WRITE_FAILED = "ScrapeWriteFailed"
    REGISTERED = "ScrapeRegistered"
    DEREGISTERED = "ScrapeDeregistered"


class EventLimits(msgspec.Struct, frozen=True):
    """The bounds on Events; times are in seconds.

    An Event is repeated once in `interval`. `rate` Events are written in a second, after a `burst`;
    `most_waiting` may wait for that. `pause` is how long a namespace rests where Events are forbidden.
    """

    interval: float = 3600.0
    rate: float = 10.0
    burst: int = 50
    most_waiting: int = 1000
    pause: float = 600.0

    @property
    def most_known(self) -> int:
        """The Events to remember: no more can be written in `interval`, so that none is repeated too soon."""
        return math.ceil(self.rate * self.interval) + self.burst


class Bucket(msgspec.Struct, frozen=True):
    """A token bucket: what is left at a moment."""

    tokens: float
    at: float = -math.inf

    def refilled(self, now: float, limits: EventLimits) -> "Bucket":
        """Return the bucket as it is now."""
        gained = limits.rate * (now - self.at)
        return Bucket(min(self.tokens + gained, limits.burst), now)


class EventPlan:
    """Decides which Event is written when; every moment is given, `now` in monotonic seconds.

    New occurrences wait in a bounded queue. Rejections that stand are written beside them, again each `interval`:
    they are looked at one after the other, so that each has its turn and none is dropped.
    """

    def __init__(self, limits: EventLimits = EventLimits()) -> None:  # noqa: B008 - an immutable value
        self.on_added: Callable[[], None] = _ignore
        self._limits = limits
        self._bucket = Bucket(limits.burst)
        self._waiting: dict[int, DueEvent] = {}
        self._told: dict[int, Occurrences] = {}  # those told last come last
        self._paused: dict[str, float] = {}
        self._standing: Iterator[ObjectEvent] | None = None
        self._offered: Iterator[ObjectEvent] | None = None

    def __len__(self) -> int:
        return len(self._told)

    def add(self, event: ObjectEvent, now: float, wall: float) -> bool:
        """Take an occurrence; return False if it is dropped, since too many wait."""
        digest = hash(event.identity)
        waiting = self._waiting.get(digest)
        seen = waiting.seen if waiting else self._told.get(digest)
        if seen is None:
            seen = Occurrences(wall, wall, -math.inf)
        seen.count += 1
        seen.last = wall
        if waiting or not self._is_due(event, seen, now):
            return True
        if len(self._waiting) >= self._limits.most_waiting:
            return False
        self._waiting[digest] = DueEvent(event, seen)
        self.on_added()
        return True

    def stand(self, events: Iterator[ObjectEvent]) -> None:
        """Take the rejections and conflicts that hold now; they are looked at after those taken before."""
        self._offered = events
        self.on_added()

    def clear(self) -> None:
        """Forget pending Events: another replica leads."""
        self._waiting.clear()
        self._standing = self._offered = None

    def next(self, now: float, wall: float) -> DueEvent | float:
        """Return the next Event to write, or after how many seconds to ask again."""
        self._bucket = self._bucket.refilled(now, self._limits)
        if not self._waiting and self._standing is None and self._offered is None:
            return math.inf
        if self._bucket.tokens < 1:
            return (1 - self._bucket.tokens) / self._limits.rate
        due = self._next_waiting(now) or self._next_standing(now, wall)
        if due is None:
            return 0.0
        self._bucket = replace(self._bucket, tokens=self._bucket.tokens - 1)
        due.seen.told_at = now
        digest = hash(due.event.identity)
        self._told.pop(digest, None)
        self._told[digest] = due.seen
        while len(self._told) > self._limits.most_known:
            del self._told[next(iter(self._told))]
        return due

    def not_told(self, due: DueEvent) -> None:
        """Note that an Event could not be written: it may be tried again."""
        due.seen.told_at = -math.inf

    def pause(self, namespace: str, now: float) -> None:
        """Let a namespace rest, since its Events are forbidden."""
        self._paused = {one: until for one, until in self._paused.items() if until > now}
        self._paused[namespace] = now + self._limits.pause

    def _is_due(self, event: ObjectEvent, seen: Occurrences, now: float) -> bool:
        is_paused = self._paused.get(event.namespace, -math.inf) > now
        return not is_paused and now - seen.told_at >= self._limits.interval

    def _next_waiting(self, now: float) -> DueEvent | None:
        while self._waiting:
            due = self._waiting.pop(next(iter(self._waiting)))
            if self._is_due(*due, now):
                return due
        return None

    def _next_standing(self, now: float, wall: float) -> DueEvent | None:
        """Look at the next rejections that still hold; None if none of them is due."""
        if self._standing is None:
            self._standing, self._offered = self._offered, None
        for _ in range(SLICE):
            event = next(self._standing, None) if self._standing is not None else None
            if event is None:
                self._standing = None
                break
            digest = hash(event.identity)
            seen = self._told.get(digest) or Occurrences(wall, wall, -math.inf)
            if digest not in self._waiting and self._is_due(event, seen, now):
                seen.count += 1
                seen.last = wall
                return DueEvent(event, seen)
        return None


class EventReporter(Reporter):
    """A reporter that also writes Events about objects, for their authors, while this replica leads."""

    def __init__(
        self,
        metrics: RegistrarMetrics,
        status: RegistrarStatus,
        plan: EventPlan,
        desired: DesiredState,
        *,
        tells_all: bool = False,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """Make the reporter; with `tells_all` it writes Events about successes too."""
        super().__init__(metrics, status, clock)
        self._plan = plan
        self._desired = desired
        self._tells_all = tells_all
        self._wall = wall
        self._leads = False

    def leads(self) -> None:
        """Show that this replica writes, Events too."""
        super().leads()
        self._leads = True

    def stands_by(self) -> None:
        """Show that another replica writes."""
        super().stands_by()
        self._leads = False
        self._plan.clear()

    def rejected(self, rejection: Rejection) -> None:
        """Report an object that asks to be scraped and cannot be."""
        super().rejected(rejection)
        self._tell(self._of_rejection(rejection))

    def conflict(self, service_id: str, conflict: Conflict) -> None:
        """Report an ID that an object asks for and that belongs to something else."""
        super().conflict(service_id, conflict)
        note = f"the service ID {service_id} is not ours to write: held by {conflict.holder}"
        self._tell(self._event(conflict.key, EventReason.CONFLICT, "Register", note))

    def refused(self, verb: str, service_id: str, problem: str) -> None:
        """Report a write that Consul refused, about the object that asks for it."""
        super().refused(verb, service_id, problem)
        for target in self._desired.claims.get(service_id, ())[:1]:
            note = f"Consul refuses to {verb} the service {service_id}: {problem}"
            self._tell(self._event(target.key, EventReason.WRITE_FAILED, verb.capitalize(), note))

    def wrote(self, verb: str, services: Iterable[tuple[str, Target | None]], written: Written) -> None:
        """Count writes, and write an Event about each that changed a scrape after the first sync."""
        services = tuple(services)
        super().wrote(verb, services, written)
        if verb != "register" or not (self._tells_all and self._status.has_synced):
            return
        unwritten = {*(one.id for one in written.failures), *written.stale}
        for service_id, target in services:
            if target is not None and service_id not in unwritten:
                note = (
                    f"registered as the service {service_id} at {socket_address(target.address, target.port)}"
                )
                self._tell(self._event(target.key, EventReason.REGISTERED, "Register", note))

    def removed(self, service_id: str, record: Observed, proof: Proof) -> None:
        """Report a service that was removed, about its object unless that is being deleted."""
        super().removed(service_id, record, proof)
        if not (self._tells_all and self._status.has_synced and isinstance(record, AsDesired)):
            return
        target = record.target
        if not target.is_terminating:
            note = f"the service {service_id} was removed from Consul: {_WHY.get(proof.ground, _GONE)}"
            uid = target.rank[2]
            self._tell(self._event(target.key, EventReason.DEREGISTERED, "Deregister", note, uid=uid))

    def resynced(
        self,
        counts: Counts,
        *,
        was_read: bool,
        kept: Mapping[Kept, int],
        held: tuple[Held, ...],
        rejections: Iterable[Rejection],
    ) -> None:
        """Report a resync, and repeat the Events of rejections that still hold."""
        rejections = tuple(rejections)
        super().resynced(counts, was_read=was_read, kept=kept, held=held, rejections=rejections)
        if self._leads:
            standing = self._desired.rejections
            self._plan.stand(self._of_rejection(one) for one in rejections if standing.get(one.key) is one)

    def _tell(self, event: ObjectEvent) -> None:
        if self._leads and not self._plan.add(event, self._clock(), self._wall()):
            self._metrics.wrote_event(EventOutcome.DROPPED)

    def _of_rejection(self, rejection: Rejection) -> ObjectEvent:
        note = f"{rejection.reason}: {rejection.detail}"
        event = self._event(rejection.key, EventReason.REJECTED, "Resolve", note, uid=rejection.uid)
        return replace(event, cause=rejection.reason)

    def _event(
        self, key: ObjectKey, reason: EventReason, action: str, note: str, *, uid: str = ""
    ) -> ObjectEvent:
        is_warning = reason not in (EventReason.REGISTERED, EventReason.DEREGISTERED)
        return ObjectEvent(key, uid or self._uid(key), reason, action, note, is_warning=is_warning)

    def _uid(self, key: ObjectKey) -> str:
        """Return the UID of an object, empty if it is not known."""
        if key.kind is Kind.ENDPOINT:
            key = ObjectKey(Kind.SERVICE, key.namespace, key.name)
        match self._desired.store.get(key):
            case Rejection(uid=uid):
                return uid
            case ServiceScrape(rank=(_, _, uid)) | (Target(rank=(_, _, uid)), *_):
                return uid
        return ""


def with_uid(resolve: Callable[[Item], Value | None]) -> Callable[[Item], Value | None]:
    """Return a resolution whose rejections have the UIDs of their objects, which `kubectl describe` looks for."""

    def resolved(item: Item) -> Value | None:
        value = resolve(item)
        if isinstance(value, Rejection) and isinstance(item, (Pod, Node, KubeService)):
            return replace(value, uid=item.uid)
        return value

    return resolved


def _ignore() -> None:
    pass
