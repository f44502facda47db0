"""Which Kubernetes Events are due, by moments that the tests choose; and what they say."""

import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
import structlog
from prometheus_client import CollectorRegistry

from k8s_consul_registrar.errors import Reason
from k8s_consul_registrar.kube.events import (
    MOST_NOTE,
    DueEvent,
    EventOutcome,
    ObjectEvent,
    Occurrences,
    encode_event,
)
from k8s_consul_registrar.model import (
    EndpointSlice,
    Kind,
    KubeService,
    Node,
    ObjectKey,
    Pod,
    Rejection,
    SliceEndpoint,
    WriteFailure,
    Written,
)
from k8s_consul_registrar.registrar.brake import Ground, Proof
from k8s_consul_registrar.registrar.decide import Conflict
from k8s_consul_registrar.registrar.desired import DesiredState
from k8s_consul_registrar.registrar.events import (
    SLICE,
    EventLimits,
    EventPlan,
    EventReason,
    EventReporter,
    with_uid,
)
from k8s_consul_registrar.registrar.metrics import RegistrarMetrics
from k8s_consul_registrar.registrar.observed import AsDesired, ObservedState
from k8s_consul_registrar.registrar.service_join import ServiceJoin
from k8s_consul_registrar.registrar.status import Counts, RegistrarStatus
from k8s_consul_registrar.sandbox.event_rules import validate_event_update, validate_new_event
from k8s_consul_registrar.targets.endpoints import resolve_item
from k8s_consul_registrar.targets.resolve import TargetRules
from support.builders import make_kube_service, make_node, make_pod, make_slice
from support.kubernetes_objects import assert_valid
from support.memory import NODES, PODS, SERVICES, SLICES

HOUR = 3600.0
WALL = 1_790_000_000.0
WEB = "pod--shop--web-1"
PLENTY = EventLimits(rate=1e6, burst=10**6)


def event(name: str = "web-1", namespace: str = "shop", **changes: Any) -> ObjectEvent:
    """Return an Event about a rejected Pod unless changed."""
    fields: dict[str, Any] = {
        "uid": f"uid-{name}",
        "reason": EventReason.REJECTED,
        "action": "Resolve",
        "note": "no_port: no port is annotated",
        "cause": "no_port",
    }
    return ObjectEvent(ObjectKey(Kind.POD, namespace, name), **{**fields, **changes})


def taken(plan: EventPlan, now: float) -> list[tuple[str, int]]:
    """Take everything that may be written at a moment; return the objects with their counts."""
    found = []
    while not isinstance(due := plan.next(now, WALL + now), float) or due == 0:
        if isinstance(due, DueEvent):
            found.append((due.event.key.name, due.seen.count))
    return found


def test_plan_tells_the_same_of_an_object_once_an_hour_with_its_count() -> None:
    """Repeats within the hour only count; the first after it continues the series."""
    plan = EventPlan()
    for second in range(10):
        assert plan.add(event(), now=second, wall=WALL)
        taken(plan, second)
    assert plan.add(event(), HOUR - 1, WALL)
    assert taken(plan, HOUR - 1) == []
    assert plan.add(event(), HOUR, WALL)
    assert taken(plan, HOUR) == [("web-1", 12)]


@pytest.mark.parametrize(
    "other",
    [event("web-2"), event(uid="another"), event(cause="no_ip"), event(reason=EventReason.CONFLICT)],
    ids=["object", "uid", "cause", "reason"],
)
def test_plan_tells_something_else_at_once(other: ObjectEvent) -> None:
    """Another object, its replacement of the same name, another cause and another reason are reported apart."""
    plan = EventPlan()
    for one in (event(), other):
        plan.add(one, 0.0, WALL)
    assert [count for _, count in taken(plan, 0.0)] == [1, 1]


def test_plan_tells_a_changed_text_of_one_cause_no_more_often() -> None:
    """A text that changes all the time is no way round the bound."""
    plan = EventPlan()
    for number in range(100):
        plan.add(event(note=f"no_port: {number}"), 0.0, WALL)
    assert taken(plan, 0.0) == [("web-1", 100)]


def test_plan_writes_a_burst_and_then_ten_a_second() -> None:
    """The bucket is a function of time: in each second after the burst there are ten, however often it is asked."""
    plan = EventPlan()
    for number in range(200):
        plan.add(event(f"web-{number}"), 0.0, WALL)
    assert len(taken(plan, 0.0)) == 50
    wait = plan.next(0.0, WALL)
    assert wait == pytest.approx(0.1)
    written = sum(len(taken(plan, step / 100)) for step in range(1, 501))
    assert written in (49, 50)
    assert len(taken(plan, 1000.0)) == 50, "no more than the burst is saved up"


def test_plan_drops_what_finds_the_queue_full() -> None:
    """The queue is bounded; what waits already takes no further place."""
    plan = EventPlan(EventLimits(most_waiting=2))
    assert [plan.add(event(f"web-{number}"), 0.0, WALL) for number in range(3)] == [True, True, False]
    assert plan.add(event("web-1"), 0.0, WALL)


def test_plan_remembers_as_many_as_can_be_written_in_the_interval() -> None:
    """Memory is bounded, and what is forgotten was reported longer ago than the interval."""
    limits = EventLimits(interval=10, rate=10, burst=5, most_waiting=10**6)
    plan = EventPlan(limits)
    told: dict[str, float] = {}
    for step in range(3000):
        now = step / 100
        plan.add(event(f"web-{step % 700}"), now, WALL)
        for name, _ in taken(plan, now):
            assert now - told.get(name, -math.inf) >= limits.interval
            told[name] = now
        assert len(plan) <= limits.most_known == 105


def test_plan_lets_a_forbidden_namespace_rest_and_others_go_on() -> None:
    """After the pause it is tried again, as if it had not been told."""
    plan = EventPlan()
    plan.add(event(), 0.0, WALL)
    due = plan.next(0.0, WALL)
    assert isinstance(due, DueEvent)
    plan.not_told(due)
    plan.pause("shop", 0.0)
    plan.add(event(), 599.0, WALL)
    plan.add(event(namespace="billing"), 599.0, WALL)
    assert taken(plan, 599.0) == [("web-1", 1)]
    plan.add(event(), 600.0, WALL)
    assert taken(plan, 600.0) == [("web-1", 3)]


def test_plan_tells_everything_that_stands_in_turn() -> None:
    """Offered again and again, each has its turn before the first is reported again; new occurrences go first."""
    limits = EventLimits(interval=10, rate=10, burst=10)
    plan = EventPlan(limits)
    names = [f"web-{number}" for number in range(500)]
    told: list[str] = []
    for step in range(1, 601):
        plan.stand(event(name) for name in names)
        told += [name for name, _ in taken(plan, step / 10)]
    assert len(told) >= 500
    assert set(told[:500]) == set(names)
    plan.stand(event(name) for name in names)
    plan.add(event("urgent"), 70.0, WALL)
    assert taken(plan, 70.0)[0] == ("urgent", 1)


def test_plan_looks_at_few_of_those_that_stand_at_once() -> None:
    """A hundred thousand that were told already keep the loop for no longer than a slice takes."""
    looked: list[str] = []

    def standing() -> Iterator[ObjectEvent]:
        for number in range(2 * SLICE):
            looked.append(f"web-{number}")
            yield event(f"web-{number}")

    plan = EventPlan(PLENTY)
    plan.stand(standing())
    assert len(taken(plan, 0.0)) == 2 * SLICE
    looked.clear()
    plan.stand(standing())
    assert plan.next(1.0, WALL) == 0.0
    assert len(looked) == SLICE


def test_plan_that_is_cleared_has_nothing_to_tell() -> None:
    """Another replica leads: what waits and what stands is that one's."""
    plan = EventPlan()
    plan.add(event(), 0.0, WALL)
    plan.stand(iter([event("web-2")]))
    plan.clear()
    assert plan.next(0.0, WALL) == math.inf


# What an Event is


@pytest.mark.parametrize(
    "note",
    ["short", "x" * 5000, "é" * 600, "🙂" * 300, "\ud800lone"],
    ids=["short", "long", "two", "four", "lone"],
)
@pytest.mark.parametrize(
    "key",
    [
        ObjectKey(Kind.POD, "shop", "web-1"),
        ObjectKey(Kind.NODE, "", "ip-192-0-2-1.eu.internal"),
        ObjectKey(Kind.ENDPOINT, "shop", "web"),
        ObjectKey(Kind.POD, "shop", "p" * 235 + "." + "q" * 17),
    ],
    ids=["pod", "node", "service", "long"],
)
def test_event_passes_the_rules_of_an_api_server(key: ObjectKey, note: str) -> None:
    """Whatever it is about and says, new and as a series."""
    seen = Occurrences(WALL, WALL + 1, 0.0, count=1)
    about = ObjectEvent(key, "uid-1", EventReason.REJECTED, "Resolve", note)
    first = json.loads(encode_event(DueEvent(about, seen), "registrar-7d9f"))
    validate_new_event(first["metadata"]["name"], first)
    assert_valid(first)
    assert len(first["note"].encode()) <= MOST_NOTE
    seen.count = 7
    again = json.loads(encode_event(DueEvent(about, seen), "i" * 300))
    validate_new_event(again["metadata"]["name"], again)
    assert_valid(again)
    assert again["series"] == {"count": 7, "lastObservedTime": "2026-09-21T14:13:21.000000Z"}
    validate_event_update(first, {**first, "series": again["series"]})


def test_event_of_a_node_lies_in_the_namespace_default() -> None:
    """A Node has no namespace, and its Event none of its own either."""
    about = ObjectEvent(ObjectKey(Kind.NODE, "", "node-a"), "uid-1", EventReason.REJECTED, "Resolve", "x")
    body = json.loads(encode_event(DueEvent(about, Occurrences(WALL, WALL, 0.0, 1)), "host"))
    assert body["metadata"]["namespace"] == "default"
    assert body["regarding"] == {"apiVersion": "v1", "kind": "Node", "name": "node-a", "uid": "uid-1"}


def test_event_has_one_name_in_every_process() -> None:
    """So the API server refuses the same Event of another leader; another cause has another name."""
    assert event().name == event(note="another text").name == "web-1.ef5bb6a21fcb40f1"
    assert event().name != event(cause="no_ip").name


# What the reporter makes of it


class Desk:
    """A reporter of Events over a cluster that a test fills, and what it has to tell."""

    def __init__(self, *, tells_all: bool = False) -> None:
        self.now = 100.0
        self.status = RegistrarStatus()
        self.registry = CollectorRegistry()
        self.plan = EventPlan(EventLimits(most_waiting=3))
        rules = TargetRules()
        self.desired = DesiredState(
            (PODS, NODES, SERVICES, SLICES),
            with_uid(lambda item: resolve_item(item, rules)),
            ObservedState(),
            join=ServiceJoin(rules),
        )
        self.reporter = EventReporter(
            RegistrarMetrics(self.registry),
            self.status,
            self.plan,
            self.desired,
            tells_all=tells_all,
            clock=lambda: self.now,
            wall=lambda: WALL,
        )
        self.reporter.leads()

    def put(self, item: Pod | Node | KubeService | EndpointSlice) -> None:
        """Have the API server tell of an object."""
        source = self.desired.store.source_of(item.key)
        assert source is not None
        self.desired.store.put(source, item)

    def resynced(self) -> None:
        """Report a resync, as one does with what is rejected."""
        self.reporter.resynced(
            Counts(), was_read=True, kept={}, held=(), rejections=tuple(self.desired.rejections.values())
        )

    def told(self) -> list[ObjectEvent]:
        """Return what is to be told now."""
        found = []
        while not isinstance(due := self.plan.next(self.now, WALL), float) or due == 0:
            if isinstance(due, DueEvent):
                found.append(due.event)
        return found


@pytest.fixture
def desk() -> Iterator[Desk]:
    """Return a reporter whose log lines go nowhere."""
    with structlog.testing.capture_logs():
        yield Desk()


def test_reporter_tells_of_each_kind_of_rejected_object_with_its_uid(desk: Desk) -> None:
    """A Pod, a Node and a Service: `kubectl describe` finds an Event by the UID of its object."""
    desk.put(make_pod(ip=""))
    desk.put(make_node("node-b", ("Hostname", "node-b")))
    desk.put(make_kube_service(type="ExternalName"))
    desk.resynced()
    told = {one.key.kind: (one.uid, one.reason, one.cause, one.is_warning) for one in desk.told()}
    assert told == {
        Kind.POD: ("uid-shop-web-1", "ScrapeRejected", "no_ip", True),
        Kind.NODE: ("uid-node-b", "ScrapeRejected", "no_address", True),
        Kind.ENDPOINT: ("uid-shop-web", "ScrapeRejected", "no_address", True),
    }


def test_reporter_tells_the_words_of_the_log(desk: Desk) -> None:
    """Reason and detail of a rejection, as the log line has them."""
    with structlog.testing.capture_logs() as lines:
        desk.put(make_pod(ip=""))
        desk.resynced()
    (line,) = [one for one in lines if one["event"] == "rejected"]
    assert [one.note for one in desk.told()] == [line["reason"]]


def test_reporter_tells_of_an_endpoint_by_its_service(desk: Desk) -> None:
    """A rejection that an EndpointSlice causes is about the Service, with the Service's UID."""
    desk.put(make_kube_service())
    desk.put(make_slice("web-1", SliceEndpoint("web.example"), family="FQDN"))
    desk.resynced()
    assert [(one.key.name, one.uid, one.cause) for one in desk.told()] == [
        ("web", "uid-shop-web", "invalid_ip")
    ]


def test_reporter_tells_of_conflicts_and_refused_writes(desk: Desk) -> None:
    """Each is about the object that asks for the service; a refused removal is about none."""
    desk.put(make_pod())
    desk.reporter.conflict(WEB, Conflict(make_pod().key, "another program"))
    desk.reporter.refused("register", WEB, "no quota")
    desk.reporter.refused("deregister", "pod--shop--gone", "no")
    assert [(one.reason, one.action, one.uid, one.note) for one in desk.told()] == [
        (
            "ScrapeConflict",
            "Register",
            "uid-shop-web-1",
            f"the service ID {WEB} is not ours to write: held by another program",
        ),
        (
            "ScrapeWriteFailed",
            "Register",
            "uid-shop-web-1",
            f"Consul refuses to register the service {WEB}: no quota",
        ),
    ]


def test_reporter_tells_of_a_pod_that_lost_its_id_with_its_own_uid(desk: Desk) -> None:
    """A rejection that a decision makes carries no UID: the Store has it."""
    desk.put(make_pod())
    desk.reporter.lost(WEB, (Rejection(make_pod().key, Reason.ID_TAKEN, "it belongs to another"),))
    assert [(one.uid, one.cause) for one in desk.told()] == [("uid-shop-web-1", "id_taken")]


def test_reporter_on_a_standby_tells_nothing(desk: Desk) -> None:
    """Events pending when the lead was lost are left to the other replica."""
    desk.put(make_pod(ip=""))
    rejection = desk.desired.rejections[make_pod().key]
    desk.reporter.rejected(rejection)
    desk.reporter.stands_by()
    desk.reporter.rejected(rejection)
    desk.resynced()
    assert desk.told() == []
    desk.reporter.leads()
    desk.resynced()
    assert len(desk.told()) == 1


def test_reporter_tells_no_more_of_what_no_longer_stands(desk: Desk) -> None:
    """A Pod that was repaired before its turn came is left out."""
    desk.put(make_pod(ip=""))
    desk.resynced()
    desk.put(make_pod())
    assert desk.told() == []


def test_reporter_tells_of_registrations_only_if_wanted_and_after_the_first_sync() -> None:
    """With `all`, each service that was written; those of the first fill and refused ones are left out."""
    for tells_all, has_synced, names in ((True, True, ["web-1"]), (True, False, []), (False, True, [])):
        desk = Desk(tells_all=tells_all)
        desk.status.has_synced = has_synced
        pods = [make_pod(), make_pod("web-2")]
        for pod in pods:
            desk.put(pod)
        services = [(one[0].id, one[0]) for one in desk.desired.claims.values()]
        desk.reporter.wrote("register", services, Written(1, (WriteFailure("pod--shop--web-2", "no"),)))
        told = desk.told()
        assert [one.key.name for one in told] == names
        assert {(one.reason, one.is_warning) for one in told} <= {("ScrapeRegistered", False)}


def test_reporter_tells_of_removals_only_if_wanted_and_of_no_pod_that_is_being_deleted() -> None:
    """With the UID of the object as it was, which the store may have no more."""
    because = {
        Ground.EVENT: "nothing asks for it any more",
        Ground.QUOTA: "its namespace has more targets than MAX_TARGETS_PER_NAMESPACE",
    }
    for ground, why in because.items():
        for tells_all, is_terminating, count in ((True, False, 1), (True, True, 0), (False, False, 0)):
            desk = Desk(tells_all=tells_all)
            desk.status.has_synced = True
            desk.put(make_pod(deleted=is_terminating))
            ((target,),) = desk.desired.claims.values()
            desk.put(make_pod(annotations={}))
            desk.reporter.removed(WEB, AsDesired(target, "", ""), Proof(ground))
            told = desk.told()
            assert len(told) == count
            for one in told:
                assert (one.key, one.uid, one.reason) == (target.key, "uid-shop-web-1", "ScrapeDeregistered")
                assert (one.note, one.is_warning) == (
                    f"the service {WEB} was removed from Consul: {why}",
                    False,
                )


def test_reporter_counts_what_it_drops(desk: Desk) -> None:
    """A full queue loses Events of new occurrences, and the metric shows how many."""
    for number in range(5):
        desk.reporter.rejected(Rejection(ObjectKey(Kind.POD, "shop", f"web-{number}"), Reason.NO_IP, "no IP"))
    name = "k8s_consul_registrar_kubernetes_events_total"
    assert desk.registry.get_sample_value(name, {"outcome": EventOutcome.DROPPED.value}) == 2
