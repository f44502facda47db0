"""Kubernetes Events: their JSON, and the task that writes them to the API server one by one."""

import asyncio
import hashlib
import math
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from enum import StrEnum
from typing import NamedTuple, Protocol
from urllib.parse import quote

import msgspec

from k8s_consul_registrar.backoff import Backoff, Timing
from k8s_consul_registrar.errors import ClusterError, ClusterForbidden, ClusterRefused
from k8s_consul_registrar.kube.client import KubeClient
from k8s_consul_registrar.kube.responses import ApiAction
from k8s_consul_registrar.model import Kind, ObjectKey
from k8s_consul_registrar.telemetry import Failures, get_logger

GROUP = "events.k8s.io"
RESOURCE = f"events.{GROUP}"
CONTROLLER = "k8s-consul-registrar"
# The API's limits: kubernetes pkg/apis/core/validation/events.go, and 253 characters for the name of an object.
MOST_NOTE = 1024  # bytes
MOST_INSTANCE = 128
MOST_NAME = 253
# The namespace of Events about objects that have none.
NODE_NAMESPACE = "default"
KINDS: Mapping[Kind, str] = {
    Kind.POD: "Pod",
    Kind.NODE: "Node",
    Kind.SERVICE: "Service",
    Kind.ENDPOINT: "Service",
}
# Requests for one Event at most; it is given up after that.
ATTEMPTS = 3
REMEDY = "apply the overlay emit-events (chart: registrar.emitEvents), or set EMIT_EVENTS=none"

log = get_logger("events")


class EventOutcome(StrEnum):
    """Results of writing an Event; label values of a metric."""

    CREATED = "created"
    REPEATED = "repeated"  # the series of an Event goes on
    KNOWN = "known"  # an Event of an earlier process or leader is there
    DROPPED = "dropped"  # too many were waiting, or the lead was lost
    FORBIDDEN = "forbidden"
    REFUSED = "refused"
    FAILED = "failed"


class ObjectEvent(msgspec.Struct, frozen=True, gc=False):
    """An occurrence at one object; `cause` distinguishes the meanings of one reason and is not shown."""

    key: ObjectKey
    uid: str
    reason: str
    action: str
    note: str
    cause: str = ""
    is_warning: bool = True

    @property
    def identity(self) -> tuple[str, ...]:
        """The parts by which two occurrences are the same Event."""
        return (self.key.kind, self.key.namespace, self.key.name, self.uid, self.reason, self.cause)

    @property
    def namespace(self) -> str:
        """The namespace of the Event."""
        return self.key.namespace or NODE_NAMESPACE

    @property
    def name(self) -> str:
        """The name of the Event: the same from each process, so that the API server keeps one."""
        identity = "\0".join(self.identity).encode("utf-8", "surrogatepass")
        digest = hashlib.blake2b(identity, digest_size=8).hexdigest()
        return f"{self.key.name[: MOST_NAME - len(digest) - 1].rstrip('-.')}.{digest}"


class Occurrences(msgspec.Struct, gc=False):
    """The first and the last observation, in seconds of the epoch, and their number.

    `told_at` is when its Event was last written, in monotonic seconds; `is_written` is True once the API server has an Event of it.
    """

    first: float
    last: float
    told_at: float
    count: int = 0
    is_written: bool = False


class DueEvent(NamedTuple):
    """An Event to write now."""

    event: ObjectEvent
    seen: Occurrences


class EventQueue(Protocol):
    """Decides which Event is written at which time."""

    on_added: Callable[[], None]

    def next(self, now: float, wall: float) -> DueEvent | float:
        """Return the next Event, or after how many seconds to ask again."""

    def not_told(self, due: DueEvent) -> None:
        """Note that an Event could not be written: it may be tried again."""

    def pause(self, namespace: str, now: float) -> None:
        """Let a namespace rest for a long while: its Events are forbidden."""


def encode_event(due: DueEvent, instance: str) -> bytes:
    """Encode an Event, with its series if it was observed more than once."""
    event, seen = due
    namespace = {"namespace": event.key.namespace} if event.key.namespace else {}
    uid = {"uid": event.uid} if event.uid else {}
    regarding = {
        "apiVersion": "v1",
        "kind": KINDS[event.key.kind],
        "name": event.key.name,
        **namespace,
        **uid,
    }
    return msgspec.json.encode(
        {
            "apiVersion": f"{GROUP}/v1",
            "kind": "Event",
            "metadata": {"namespace": event.namespace, "name": event.name},
            "eventTime": _micro_time(seen.first),
            "reportingController": CONTROLLER,
            "reportingInstance": instance[:MOST_INSTANCE],
            "action": event.action,
            "reason": event.reason,
            "regarding": regarding,
            "note": _clipped(event.note),
            "type": "Warning" if event.is_warning else "Normal",
            **(_series(seen) if seen.count > 1 else {}),
        }
    )


def _series(seen: Occurrences) -> dict[str, object]:
    return {"series": {"count": seen.count, "lastObservedTime": _micro_time(seen.last)}}


def _micro_time(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _clipped(note: str) -> str:
    """Return a note that the API takes: it counts bytes."""
    whole = note.encode("utf-8", "replace")
    if len(whole) <= MOST_NOTE:
        return whole.decode()
    ellipsis = "…"
    return whole[: MOST_NOTE - len(ellipsis.encode())].decode("utf-8", "ignore") + ellipsis


class EventSender:
    """Writes Events to the API server, one after the other.

    It shares nothing with the writes to Consul but the event loop: what it waits for delays only Events.
    """

    def __init__(
        self,
        client: KubeClient,
        queue: EventQueue,
        *,
        timing: Timing,
        may_send: Callable[[], bool],
        count: Callable[[EventOutcome], None],
        on_internal_error: Callable[[str, Exception], None],
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._client = client
        self._queue = queue
        self._may_send = may_send
        self._count = count
        self._on_internal_error = on_internal_error
        self._clock, self._wall = clock, wall
        self._instance = socket.gethostname() or CONTROLLER
        self._added = asyncio.Event()
        self._backoff = Backoff(timing)
        # A failure that a right or an object causes is logged once, whatever other Events do.
        self._refusals, self._outage = Failures(), Failures()
        self._is_out = False

    async def run(self) -> None:
        """Write due Events until cancelled; no error ends it."""
        self._queue.on_added = self._added.set
        while True:
            try:
                await self._turn()
            except Exception as error:  # noqa: BLE001 - counted and logged; nothing ends the daemon
                self._on_internal_error("Kubernetes Events", error)
                await self._backoff.wait()

    async def _turn(self) -> None:
        self._added.clear()
        due = self._queue.next(self._clock(), self._wall())
        if isinstance(due, DueEvent):
            self._count(await self._write(due))
        elif due <= 0:
            await asyncio.sleep(0)
        else:
            with suppress(TimeoutError):
                async with asyncio.timeout(None if math.isinf(due) else due):
                    await self._added.wait()

    async def _write(self, due: DueEvent) -> EventOutcome:
        """Write one Event; one that fails for a reason of the moment is tried a few times."""
        for _ in range(ATTEMPTS):
            if not self._may_send():
                return EventOutcome.DROPPED
            try:
                outcome = await self._attempt(*due)
            except ClusterForbidden as error:
                self._queue.not_told(due)
                self._queue.pause(due.event.namespace, self._clock())
                for _, text in self._refusals.fresh([("forbidden", str(error))]):
                    log.warning("Kubernetes Events may not be written", problem=text, remedy=REMEDY)
                return EventOutcome.FORBIDDEN
            except ClusterRefused as error:
                for _, text in self._refusals.fresh([("refused", str(error))]):
                    log.warning("the API server refuses a Kubernetes Event", problem=text)
                return EventOutcome.REFUSED
            except ClusterError as error:
                self._is_out = True
                for _, text in self._outage.fresh([("outage", str(error))]):
                    log.warning("Kubernetes Events cannot be written", problem=text)
                await self._backoff.wait(error)
            else:
                due.seen.is_written = True
                self._recovered()
                return outcome
        self._queue.not_told(due)
        return EventOutcome.FAILED

    def _recovered(self) -> None:
        self._backoff.reset()
        if self._is_out:
            self._is_out = False
            self._outage.fresh([])
            log.info("Kubernetes Events can be written again")

    async def _attempt(self, event: ObjectEvent, seen: Occurrences) -> EventOutcome:
        """Continue the series of an Event that was observed before, or create it; raises a ClusterError."""
        path = f"/apis/{GROUP}/v1/namespaces/{quote(event.namespace, safe='')}/events"
        if seen.is_written:
            action = ApiAction("patch", RESOURCE, event.namespace)
            body = msgspec.json.encode(_series(seen))
            try:
                await self._client.request(
                    action, f"{path}/{quote(event.name, safe='')}", method="PATCH", body=body
                )
            except ClusterRefused as error:
                # An API server forgets Events, after an hour by default.
                if error.status != 404:
                    raise
            else:
                return EventOutcome.REPEATED
        body = encode_event(DueEvent(event, seen), self._instance)
        try:
            await self._client.request(
                ApiAction("create", RESOURCE, event.namespace), path, method="POST", body=body
            )
        except ClusterRefused as error:
            if error.status != 409:
                raise
            return EventOutcome.KNOWN
        return EventOutcome.CREATED
