"""The desired state: claims, rejections and departures of every watched object, as its Store tells them."""

import time
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from k8s_consul_registrar.kube.store import SLICE, Evidence
from k8s_consul_registrar.model import Kind, Node, ObjectKey, Pod, Rejection, Source, Target, Undecodable
from k8s_consul_registrar.registrar import claims
from k8s_consul_registrar.registrar.claims import Change
from k8s_consul_registrar.registrar.decide import Standing
from k8s_consul_registrar.registrar.observed import AsDesired, Observed, Unknown, observe
from k8s_consul_registrar.registrar.ownership import Identity
from support.builders import SCRAPED, annotated, make_node, make_pod, our_pod_service
from support.memory import NODES, PODS, MemoryCluster

LAB = Identity("lab")
_EVENT = Evidence.EVENT
NAMELESS = Undecodable(Kind.POD, None, "x")
ZONE_LABEL = "topology.kubernetes.io/zone"
PORTS_3 = annotated(port="8080,8081,8082")
PORTS_1 = annotated(port="8080")
IDS_3 = ("pod--shop--a", "pod--shop--a--8081", "pod--shop--a--8082")


TARGET = Target(make_pod("a").key, "pod--shop--a", "pod--shop--a", "198.51.100.10", 9102, ())


class World:
    """A cluster, what Consul is known to hold, and every change that was reported."""

    def __init__(self, *sources: Source) -> None:
        self.now = 100.0
        self.cluster = MemoryCluster(sources or (PODS, NODES), clock=lambda: self.now)
        self.desired = self.cluster.desired
        self.observed = self.cluster.observed
        self.store = self.cluster.store
        self.changes: list[Change] = []
        self.desired.subscribe(self.changes.append, lambda _source, _status: None)

    def lists(self, *items: Pod | Node, source: Source = PODS) -> None:
        """Complete a list."""
        self.cluster.put_list(items, source)

    def taken(self) -> list[Change]:
        """Return the changes so far, and begin again."""
        taken, self.changes[:] = list(self.changes), []
        return taken

    def read_consul(self, **records: Observed) -> None:
        """Read everything: the Pods of namespace shop by name, dashes spelt as underscores."""
        generation = self.desired.departure_generation
        self.observed.begin_read()
        for name, record in records.items():
            self.observed.read(f"pod--shop--{name.replace('_', '-')}", record)
        self.observed.finish_read()
        self.desired.settle_by_read(generation)

    def write_all(self) -> None:
        """Note that everything that is asked for is in Consul."""
        generation = self.desired.departure_generation
        self.observed.begin_read()
        for service_id, targets in self.desired.claims.items():
            self.observed.read(service_id, AsDesired(targets[0], "", ""))
        self.observed.finish_read()
        self.desired.settle_by_read(generation)

    def standing(self, service_id: str) -> Standing | None:
        """Return the standing of the object behind the record under an ID."""
        return self.desired.ask(service_id, self.observed.get(service_id)).standing


def synced(*pods: Pod) -> World:
    """Return a world of listed Pods, all of them in Consul."""
    world = World(PODS)
    world.lists(*pods)
    world.write_all()
    world.taken()
    return world


def other(name: str) -> Observed:
    """Return the record that another process left for a Pod."""
    return observe(our_pod_service(name), LAB, "")


# Claims


def test_desired_list_arriving_claims_at_once_and_takes_away_at_its_end() -> None:
    """An object is there from the moment a list shows it, and absent once a complete list lacks it."""
    world = synced(make_pod("gone"))
    world.cluster.start_list([make_pod("a")])
    assert set(world.desired.claims) == {"pod--shop--a", "pod--shop--gone"}
    assert world.standing("pod--shop--gone") is None
    world.store.finish_listing(PODS, 7.0)
    assert set(world.desired.claims) == {"pod--shop--a"}
    assert world.standing("pod--shop--gone") is Standing.ABSENT
    assert world.desired.departures == 0
    assert world.desired.has_absences


def test_desired_list_that_broke_off_takes_nothing_away() -> None:
    """Only what the next complete list lacks is absent."""
    world = synced(make_pod("a"), make_pod("b"))
    world.cluster.start_list([make_pod("a")])
    world.store.fail(PODS, "broke off", "connection")
    assert set(world.desired.claims) == {"pod--shop--a", "pod--shop--b"}
    assert world.desired.ask("pod--shop--a", world.observed.get("pod--shop--a")).standing is None
    world.lists(make_pod("b"))
    assert set(world.desired.claims) == {"pod--shop--b"}


def test_desired_object_that_never_asked_is_not_remembered() -> None:
    """A cluster's short-lived jobs leave no trace, however many they are."""
    world = synced()
    for number in range(1000):
        job = make_pod(f"job-{number}", annotations={})
        world.cluster.put(job)
        world.cluster.remove(job)
    assert (world.taken(), world.desired.departures, len(world.store)) == ([], 0, 0)


@pytest.mark.parametrize("noise", [{"ready": True}, {"labels": {"x": "y"}}, {"phase": "Unknown"}])
def test_desired_object_that_changes_without_its_target_is_no_change(noise: dict[str, Any]) -> None:
    """Neither an ID to decide again nor a new generation."""
    world = synced(make_pod("a"))
    generation = world.desired.generation
    world.cluster.put(make_pod("a", **noise))
    assert (world.taken(), world.desired.generation) == ([], generation)


def test_desired_changed_target_is_told_with_the_moment_of_its_event() -> None:
    """An event says when; a list tells about the past."""
    world = synced(make_pod("a"))
    world.now = 123.0
    world.cluster.put(make_pod("a", ip="198.51.100.99"))
    assert world.taken() == [Change(("pod--shop--a",), (), 123.0)]
    world.lists(make_pod("a"))
    assert world.taken() == [Change(("pod--shop--a",), (), None)]


def test_desired_list_without_news_is_no_change() -> None:
    """Rejected objects included."""
    pods = make_pod("a"), make_pod("b", ip="")
    world = synced(*pods)
    world.lists(*pods)
    assert world.taken() == []


def test_desired_shared_id_has_both_claims() -> None:
    """Two Pods that ask for one ID are both known, and one leaves the other in place."""
    first, second = make_pod("b--c", "a"), make_pod("c", "a--b")
    world = synced(first, second)
    assert len(world.desired.claims["pod--a--b--c"]) == 2
    world.cluster.remove(first)
    assert [target.key for target in world.desired.claims["pod--a--b--c"]] == [second.key]
    assert world.standing("pod--a--b--c") is Standing.DEPARTED


def test_desired_shared_id_whose_holder_is_missing_from_a_list_is_decided_again() -> None:
    """The other Pod asks for it, so it need not wait for a resync."""
    first, second = make_pod("b--c", "a"), make_pod("c", "a--b")
    world = synced(first, second)
    world.lists(second)
    assert world.taken() == [Change(("pod--a--b--c",), (), None)]


def test_desired_equal_parts_of_targets_are_one_object_in_memory() -> None:
    """Pairs of meta are shared, and one claim is the very tuple of the Store."""
    world = synced(make_pod("a"), make_pod("b"))
    (first,), (second,) = world.desired.claims.values()
    pairs = zip(first.meta, second.meta, strict=True)
    assert [one is another for one, another in pairs if one == another] == [True] * 5
    assert world.desired.claims[first.id] is world.store.get(first.key)


# Departures


@pytest.mark.parametrize("change", [{"phase": "Succeeded"}, {"phase": "Failed"}, {"annotations": {}}, None])
def test_desired_object_seen_to_stop_asking_has_departed(change: dict[str, Any] | None) -> None:
    """Deleted, finished or no longer annotated is a fact, seen in an event or in a list."""
    for is_listed in (False, True):
        world = synced(make_pod("a"))
        if change is None:
            world.cluster.remove(make_pod("a"))
        elif is_listed:
            world.lists(make_pod("a", **change))
        else:
            world.cluster.put(make_pod("a", **change))
        assert world.standing("pod--shop--a") is Standing.DEPARTED
        assert [one.dropped for one in world.taken()] == [("pod--shop--a",)]


def test_desired_living_pod_that_drops_ports_departs_from_their_ids() -> None:
    """The IDs of the ports it has left are a fact; the one it keeps is asked for."""
    world = synced(make_pod("a", annotations=PORTS_3))
    world.cluster.put(make_pod("a", annotations=PORTS_1))
    (change,) = world.taken()
    assert (change.asked, set(change.dropped)) == (IDS_3[:1], set(IDS_3[1:]))
    assert [world.standing(one) for one in IDS_3] == [None, Standing.DEPARTED, Standing.DEPARTED]


def test_desired_renumbered_node_departs_from_its_old_address() -> None:
    """Six at once are six facts, and never an absence from a list."""
    world = World(NODES)
    world.lists(*(make_node(f"n{one}", ("InternalIP", f"192.0.2.{one}")) for one in range(6)), source=NODES)
    world.write_all()
    world.lists(*(make_node(f"n{one}", ("InternalIP", f"192.0.2.10{one}")) for one in range(6)), source=NODES)
    assert {world.standing(f"node--192.0.2.{one}") for one in range(6)} == {Standing.DEPARTED}
    assert not world.desired.has_absences


def test_desired_finished_pods_of_the_first_list_have_departed() -> None:
    """Records of an earlier process go as facts: those Pods' addresses may be others' by now."""
    world = World(PODS)
    world.read_consul(**{f"job_{number}": other(f"job-{number}") for number in range(10)})
    world.lists(*(make_pod(f"job-{number}", phase="Succeeded") for number in range(6)))
    assert [world.standing(f"pod--shop--job-{number}") for number in range(10)] == [
        *[Standing.DEPARTED] * 6,
        *[Standing.ABSENT] * 4,
    ]
    assert world.desired.departures == 6


def test_desired_record_of_an_earlier_process_departs_with_the_ports_its_pod_lacks() -> None:
    """A Pod that is listed with one port and recorded with three no longer asks for two."""
    world = World(PODS)
    world.observed.begin_read()
    for service_id in IDS_3:
        record = our_pod_service("a")
        world.observed.read(service_id, observe(record, LAB, ""))
    world.observed.finish_read()
    world.lists(make_pod("a", annotations=PORTS_1))
    (change,) = world.taken()
    assert (change.asked, set(change.dropped)) == (IDS_3[:1], set(IDS_3[1:]))


def test_desired_rejected_pod_that_is_deleted_departs_from_every_id_it_had() -> None:
    """Also from those that its rejection does not name."""
    world = synced(make_pod("a", annotations=PORTS_3))
    world.cluster.put(make_pod("a", annotations=annotated(port="x")))
    assert {world.standing(one) for one in IDS_3} == {Standing.REJECTED}
    world.cluster.remove(make_pod("a"))
    assert {world.standing(one) for one in IDS_3} == {Standing.DEPARTED}
    assert set(world.taken()[-1].dropped) == set(IDS_3)


def test_desired_rejected_node_without_an_address_that_is_deleted_departs() -> None:
    """Its rejection names no ID, and its service goes as a fact all the same."""
    world = World(NODES)
    world.lists(make_node("n"), source=NODES)
    world.write_all()
    world.cluster.put(make_node("n", ("Hostname", "n")))
    assert world.standing("node--192.0.2.10") is Standing.REJECTED
    world.cluster.remove(make_node("n"))
    assert world.standing("node--192.0.2.10") is Standing.DEPARTED


def test_desired_pod_mended_with_fewer_ports_departs_from_the_others() -> None:
    """IDs that it asked for before it was rejected are not forgotten, nor those it dropped before that."""
    for earlier in (PORTS_3, annotated(port="8080,8081")):
        world = synced(make_pod("a", annotations=PORTS_3))
        world.cluster.put(make_pod("a", annotations=earlier))
        world.cluster.put(make_pod("a", annotations=annotated(port="x")))
        world.taken()
        world.cluster.put(make_pod("a", annotations=PORTS_1))
        (change,) = world.taken()
        assert set(change.dropped) == set(IDS_3[1:])
        assert [world.standing(one) for one in IDS_3] == [None, Standing.DEPARTED, Standing.DEPARTED]


def test_desired_pod_missing_from_a_list_and_then_seen_finished_has_departed() -> None:
    """An inference that turns out to be a fact is one, whatever wrote the record."""
    world = synced(make_pod("a"), make_pod("b"))
    world.lists(make_pod("b"))
    assert world.standing("pod--shop--a") is Standing.ABSENT
    world.lists(make_pod("b"), make_pod("a", phase="Succeeded"))
    assert world.standing("pod--shop--a") is Standing.DEPARTED


def test_desired_earlier_ids_are_forgotten_with_their_records() -> None:
    """Memory of what rejected and missing objects asked for follows what Consul holds."""
    world = synced(*(make_pod(f"p{number}") for number in range(20)))
    for number in range(10):
        world.cluster.put(make_pod(f"p{number}", ip=""))
    world.lists()
    assert len(world.desired._departures._earlier) == 20
    world.read_consul(p1=world.observed.get("pod--shop--p1"))
    assert list(world.desired._departures._earlier) == [make_pod("p1").key]


def test_desired_departure_ends_when_its_object_asks_again() -> None:
    """Under another UID as well, and for the ports it asks for only."""
    world = synced(make_pod("a", annotations=PORTS_3))
    world.cluster.remove(make_pod("a"))
    assert world.desired.departures == 3
    world.cluster.put(make_pod("a", uid="newer", annotations=PORTS_1))
    assert world.desired.departures == 2
    assert world.standing("pod--shop--a") is None


def test_desired_departure_ends_by_the_write_of_its_generation() -> None:
    """A write that was decided before it settles nothing: the object came back and left again meanwhile."""
    world = synced(make_pod("a"))
    world.cluster.remove(make_pod("a"))
    decided = world.desired.departure_generation
    world.cluster.put(make_pod("a", ip="198.51.100.99"))
    world.cluster.remove(make_pod("a"))
    world.desired.settle("pod--shop--a", decided)
    assert (world.desired.departures, world.standing("pod--shop--a")) == (1, Standing.DEPARTED)
    world.desired.settle("pod--shop--b", world.desired.departure_generation)
    assert world.desired.departures == 1
    world.desired.settle("pod--shop--a", world.desired.departure_generation)
    assert world.desired.departures == 0


def test_desired_departure_ends_by_a_later_read_that_shows_the_id_absent() -> None:
    """Another registrar, or a hand, removed it."""
    world = synced(make_pod("a"))
    world.cluster.remove(make_pod("a"))
    world.read_consul()
    assert world.desired.departures == 0


def test_desired_departure_ends_by_a_later_read_that_shows_another_objects_record() -> None:
    """Foreign, or of a Pod that shares the ID."""
    shared = make_pod("b--c", "a"), make_pod("c", "a--b")
    world = synced(*shared)
    world.cluster.remove(shared[0])
    assert world.desired.departures == 1
    world.write_all()
    assert world.desired.departures == 0
    world = synced(make_pod("a"))
    world.cluster.remove(make_pod("a"))
    world.read_consul(a=observe(our_pod_service("a", cluster="other"), LAB, ""))
    assert world.desired.departures == 0


def test_desired_departure_of_the_original_programs_node_ends_by_a_later_read() -> None:
    """Though it names no object, an ID that is absent has nothing left of it."""
    world = World(NODES)
    world.desired.depart("node--192.0.2.99", None)
    world.write_all()
    assert world.desired.departures == 0


def test_desired_departure_survives_a_read_that_began_before_it() -> None:
    """The records of that read are older than the departure."""
    world = synced(make_pod("a"))
    before = world.desired.departure_generation
    world.cluster.remove(make_pod("a"))
    world.observed.put("pod--shop--a", None)
    world.desired.settle_by_read(before)
    assert world.desired.departures == 1


def test_desired_departure_survives_a_read_that_shows_the_record_or_does_not_know() -> None:
    """A record of the object is what the departure is about; one that must be looked up proves nothing."""
    world = synced(make_pod("a"), make_pod("b"))
    for name in "ab":
        world.cluster.remove(make_pod(name))
    world.read_consul(a=world.observed.get("pod--shop--a"), b=Unknown())
    assert world.desired.departures == 2


def test_desired_departure_survives_a_source_that_fails_for_a_moment() -> None:
    """Facts seen while something nameless hides others are still facts after the next list, whatever else is written."""
    world = synced(*(make_pod(name) for name in "abcdef"))
    world.store.put(PODS, NAMELESS)
    for name in "abcd":
        world.cluster.remove(make_pod(name))
    world.desired.settle("pod--shop--z", world.desired.departure_generation)
    world.lists(make_pod("e"), make_pod("f"))
    assert {world.standing(f"pod--shop--{name}") for name in "abcd"} == {Standing.DEPARTED}


def test_desired_departure_counts_while_its_source_is_behind() -> None:
    """A fact needs no synced source; an absence does."""
    world = synced(make_pod("a"), make_pod("b"))
    world.lists(make_pod("a"))
    world.cluster.remove(make_pod("a"))
    world.store.resume(PODS, "9")
    assert world.standing("pod--shop--a") is Standing.DEPARTED
    assert world.standing("pod--shop--b") is Standing.STALE
    world.store.caught_up(PODS)
    assert world.standing("pod--shop--b") is Standing.ABSENT


def test_desired_departures_of_another_leaders_time_need_a_synced_source() -> None:
    """The object may have come back while this replica's source was behind."""
    world = synced(make_pod("a"), make_pod("b"))
    world.cluster.remove(make_pod("a"))
    world.store.fail(PODS, "403", "denied")
    world.desired.begin_leading()
    assert world.standing("pod--shop--a") is Standing.STALE
    world.cluster.remove(make_pod("b"))
    assert world.standing("pod--shop--b") is Standing.DEPARTED
    world.lists()
    assert world.standing("pod--shop--a") is Standing.DEPARTED


def test_desired_confirmed_absence_is_a_departure() -> None:
    """Removals that the brake released go like any other fact."""
    world = synced(make_pod("a"))
    world.lists()
    world.desired.depart("pod--shop--a", make_pod("a").key)
    assert world.standing("pod--shop--a") is Standing.DEPARTED


def test_desired_pod_being_deleted_yields_its_endpoint_to_a_living_one() -> None:
    """Yielding is a departure; alone again it asks for its ID as before, and two living ones both stay."""
    world = synced(make_pod("old"), make_pod("new", ip="198.51.100.2"))
    world.cluster.put(make_pod("old", deleted=True))
    assert set(world.desired.claims) == {"pod--shop--old", "pod--shop--new"}
    world.cluster.put(make_pod("new"))
    assert set(world.desired.claims) == {"pod--shop--new"}
    assert world.standing("pod--shop--old") is Standing.DEPARTED
    world.cluster.remove(make_pod("new"))
    assert set(world.desired.claims) == {"pod--shop--old"}
    world.cluster.put(make_pod("new"))
    world.cluster.put(make_pod("old"))
    assert set(world.desired.claims) == {"pod--shop--old", "pod--shop--new"}
    assert (world.desired.departures, len(list(world.desired.endpoints.shared()))) == (0, 1)


def test_desired_pod_that_yields_has_departed_while_its_source_is_behind() -> None:
    """It was seen to be deleted, so this is a fact, at its first event as at each later one."""
    world = synced(make_pod("old"), make_pod("new"))
    world.store.resume(PODS, "9")
    for labels in ({}, {"x": "y"}):
        world.cluster.put(make_pod("old", deleted=True, labels=labels, uid=f"uid-{labels}"))
        assert world.standing("pod--shop--old") is Standing.DEPARTED
        assert world.taken()[-1].dropped == ("pod--shop--old",)


def test_desired_pod_that_begins_to_be_deleted_leaves_nothing_to_decide() -> None:
    """Its service is as it is until the Pod is gone; a mass of them delays no other change."""
    world = synced(make_pod("a"))
    world.cluster.put(make_pod("a", deleted=True))
    assert world.taken() == []
    assert world.observed.get("pod--shop--a") == AsDesired(world.desired.claims["pod--shop--a"][0], "", "")
    world.cluster.remove(make_pod("a", deleted=True))
    assert [one.dropped for one in world.taken()] == [("pod--shop--a",)]


@pytest.mark.parametrize("change", [{"ip": "10.1.1.1"}, {"annotations": PORTS_1}], ids=str)
def test_desired_pod_being_deleted_that_changes_is_decided(change: dict[str, Any]) -> None:
    """Also if Consul's record is not known to be the one that it asked for, and if it is not deleted after all."""
    world = synced(make_pod("a"), make_pod("b", ip="10.1.1.2"))
    world.cluster.put(make_pod("a", deleted=True, **change))
    world.cluster.put(make_pod("a", **change))
    world.observed.doubt("pod--shop--b")
    world.cluster.put(make_pod("b", ip="10.1.1.2", deleted=True))
    assert [one.asked for one in world.taken()] == [("pod--shop--a",), ("pod--shop--a",), ("pod--shop--b",)]
    assert isinstance(world.observed.get("pod--shop--b"), Unknown)


def test_desired_pod_being_deleted_before_its_change_is_written_leaves_the_record_as_it_is() -> None:
    """Consul still holds what the Pod asked for before, so that the change is owed."""
    world = synced(make_pod("a"))
    record = world.observed.get("pod--shop--a")
    world.cluster.put(make_pod("a", annotations=PORTS_1))
    world.cluster.put(make_pod("a", annotations=PORTS_1, deleted=True))
    assert [one.asked for one in world.taken()] == [("pod--shop--a",), ("pod--shop--a",)]
    assert world.observed.get("pod--shop--a") is record


# Growth and cost


def test_desired_standby_keeps_no_departure_of_short_jobs() -> None:
    """Tens of thousands of job Pods come and go: none is in Consul, so none of their departures is kept."""
    world = synced(make_pod("good"))
    for number in range(30_000):
        key = ObjectKey(Kind.POD, "shop", f"job-{number}")
        targets = _target_of(key)
        world.desired.on_object(key, None, targets, _EVENT, 1.0)
        world.desired.on_object(key, targets, None, _EVENT, 1.0)
    assert (world.desired.departures, len(world.desired.claims)) == (0, 1)


def test_desired_standby_forgets_at_its_next_read_what_its_leader_removed() -> None:
    """Departures seen while Consul still held the services end by a read that shows them gone."""
    world = synced(*(make_pod(f"p{number}") for number in range(1000)))
    for number in range(1000):
        world.cluster.remove(make_pod(f"p{number}"))
    assert world.desired.departures == 1000
    world.read_consul()
    assert world.desired.departures == 0


def test_desired_departures_beside_a_refused_service_are_not_kept() -> None:
    """Each ends by its own write, whatever becomes of another ID."""
    world = synced(make_pod("refused"))
    world.cluster.put(make_pod("refused", ip="198.51.100.99"))
    for number in range(2000):
        pod = make_pod(f"job-{number}")
        world.cluster.put(pod)
        service_id = f"pod--shop--job-{number}"
        world.observed.put(service_id, AsDesired(world.desired.claims[service_id][0], "", ""))
        world.cluster.remove(pod)
        world.observed.put(service_id, None)
        world.desired.settle(service_id, world.desired.departure_generation)
    assert world.desired.departures == 0


def test_desired_departures_beyond_the_most_become_inferences() -> None:
    """Before the first read of Consul none can be told from another; the oldest are forgotten, which is safe."""
    world = World(PODS)
    world.lists()
    most = claims.MOST_DEPARTURES
    for number in range(most + 10):
        world.desired.depart(f"id-{number}", make_pod("a").key)
    assert world.desired.departures == most
    record = AsDesired(_target_of(make_pod("a").key)[0], "", "")
    assert world.desired.ask("id-0", record).standing is Standing.ABSENT
    assert world.desired.ask(f"id-{most + 9}", record).standing is Standing.DEPARTED


@pytest.mark.parametrize("beside", ["rejected", "departed"])
def test_desired_change_costs_the_same_beside_many_others(beside: str) -> None:
    """Tens of thousands of rejected objects, or departures, make one change no dearer; the bound is generous."""
    alone, crowded = synced(), synced()
    many = 30_000
    rejection = Rejection(ObjectKey(Kind.POD, "", ""), "no_ip", "no IP", "x")
    for number in range(many):
        key = ObjectKey(Kind.POD, "shop", f"other-{number}")
        if beside == "rejected":
            crowded.desired.on_object(
                key, None, Rejection(key, rejection.reason, "", f"pod--shop--{number}"), _EVENT, 1.0
            )
        else:
            crowded.desired.depart(f"pod--shop--{number}", key)
    crowded.taken()
    assert _fastest(_one_change(crowded)) < 8 * _fastest(_one_change(alone))


def test_desired_change_costs_little_beside_many_pods_at_its_address() -> None:
    """A cluster that reports one address for thousands of Pods is odd, and no reason to stall."""
    alone, crowded = synced(), synced(*(make_pod(f"p{number}") for number in range(2000)))
    crowded.cluster.put(make_pod("elsewhere", ip="198.51.100.77", deleted=True))
    assert _fastest(_one_change(crowded)) < 100 * _fastest(_one_change(alone))


def test_desired_pods_in_a_crowd_at_one_address_give_way_as_two_do() -> None:
    """Beyond `MOST_CLAIMS` each change settles its own Pod; the first living one and the last settle all."""
    count = claims.MOST_CLAIMS + 20
    world = synced(*(make_pod(f"p{number}", deleted=True) for number in range(count)))
    assert len(world.desired.claims) == count
    world.cluster.put(make_pod("living"))
    assert set(world.desired.claims) == {"pod--shop--living"}
    world.cluster.put(make_pod("late", deleted=True))
    assert set(world.desired.claims) == {"pod--shop--living"}
    world.cluster.put(make_pod("second"))
    world.cluster.remove(make_pod("living"))
    world.cluster.put(make_pod("p0"))
    assert set(world.desired.claims) == {"pod--shop--second", "pod--shop--p0"}
    world.cluster.remove(make_pod("second"))
    assert set(world.desired.claims) == {"pod--shop--p0"}
    world.cluster.remove(make_pod("p0"))
    assert len(world.desired.claims) == count
    assert "pod--shop--late" in world.desired.claims


def _one_change(world: World) -> Callable[[], None]:
    pods = make_pod("probe"), make_pod("probe", ip="198.51.100.99"), make_pod("probe", ip="")

    def change() -> None:
        for pod in pods:
            world.cluster.put(pod)
            world.desired.ask("pod--shop--probe", None)
        world.cluster.remove(pods[0])
        world.changes.clear()

    return change


def _fastest(step: Callable[[], None]) -> float:
    durations = []
    for _ in range(50):
        started = time.perf_counter()
        step()
        durations.append(time.perf_counter() - started)
    return min(durations)


# Standings and rejections


def test_desired_rejected_object_protects_what_it_has() -> None:
    """Known by its key, whatever the ID; and gone with the rejection."""
    world = synced(make_pod("a"), make_pod("b"))
    world.cluster.put(make_pod("a", ip=""))
    assert set(world.desired.rejections) == {make_pod("a").key}
    assert world.standing("pod--shop--a") is Standing.REJECTED
    assert world.desired.ask("pod--shop--a--8081", other("a")).standing is Standing.REJECTED
    assert world.desired.departures == 0
    world.cluster.remove(make_pod("a", ip=""))
    assert (dict(world.desired.rejections), world.standing("pod--shop--a")) == ({}, Standing.DEPARTED)


def test_desired_rejected_object_protects_the_id_it_asks_for() -> None:
    """Where the record names another object, and that is gone, the ID tells."""
    rejected = make_pod("b--c", "a", annotations={"prometheus.io/scrape": "true"})
    world = synced(rejected, make_pod("c", "a--b"))
    world.cluster.remove(make_pod("c", "a--b"))
    assert world.standing("pod--a--b--c") is Standing.REJECTED


def test_desired_unreadable_object_is_rejected() -> None:
    """An object of which only the name can be read may still want what it has."""
    world = synced(make_pod("a"))
    world.store.put(PODS, Undecodable(Kind.POD, make_pod("a").key, "x"), is_added=False)
    assert world.standing("pod--shop--a") is Standing.REJECTED
    world.lists()
    assert (dict(world.desired.rejections), world.standing("pod--shop--a")) == ({}, Standing.ABSENT)


def test_desired_rejected_node_without_an_address_protects_the_original_programs_nodes() -> None:
    """Those name no object, so any of them may be this Node's; one with an address protects that alone."""
    world = World(NODES)
    world.lists(make_node("n", ("Hostname", "n")), source=NODES)
    legacy_id, key = "node--192.0.2.99", ObjectKey(Kind.NODE, "", "gone")
    assert world.desired.standing(legacy_id, Kind.NODE, None) is Standing.REJECTED
    assert world.desired.standing(legacy_id, Kind.NODE, key) is Standing.ABSENT
    world.lists(source=NODES)
    assert world.desired.standing(legacy_id, Kind.NODE, None) is Standing.ABSENT
    known = Rejection(make_node("m").key, "meta_too_long", "zone", legacy_id)
    world.desired.on_object(known.key, None, known, _EVENT, 1.0)
    assert world.desired.standing(legacy_id, Kind.NODE, None) is Standing.REJECTED
    assert world.desired.standing("node--192.0.2.98", Kind.NODE, None) is Standing.ABSENT


def test_desired_object_that_no_source_lists_is_unwatched() -> None:
    """Of another kind, another namespace, or a Node of the original program where Nodes are not watched."""
    world = World(Source(Kind.POD, "other"))
    world.lists(source=Source(Kind.POD, "other"))
    for kind, key in ((Kind.POD, make_pod("a").key), (Kind.NODE, None), (Kind.POD, None), (None, None)):
        assert world.desired.standing("x", kind, key) is Standing.UNWATCHED
    assert world.desired.standing("x", Kind.POD, make_pod("a", "other").key) is Standing.ABSENT


@pytest.mark.parametrize("is_deleted", [False, True])
def test_desired_nameless_item_makes_absence_stale_until_a_list_without_one(*, is_deleted: bool) -> None:
    """Any absence may be that object's, seen in an event as in a list."""
    world = synced(make_pod("a"), make_pod("b"))
    world.lists(make_pod("b"))
    if is_deleted:
        world.store.remove(PODS, NAMELESS)
    else:
        world.store.put(PODS, NAMELESS)
    assert world.standing("pod--shop--a") is Standing.STALE
    world.store.start_listing(PODS, 2.0)
    for item in (make_pod("b"), NAMELESS):
        world.store.put(PODS, item)
    world.store.finish_listing(PODS, 2.0)
    assert world.standing("pod--shop--a") is Standing.STALE
    world.lists(make_pod("b"))
    assert world.standing("pod--shop--a") is Standing.ABSENT


def test_desired_source_that_was_never_listed_or_fails_proves_nothing() -> None:
    """And one that is blind blocks only itself."""
    world = World(Source(Kind.POD, "shop"), Source(Kind.POD, "search"))
    key = make_pod("a").key
    assert world.desired.standing("x", Kind.POD, key) is Standing.STALE
    for namespace in ("shop", "search"):
        world.lists(source=Source(Kind.POD, namespace))
    world.store.fail(Source(Kind.POD, "shop"), "403", "denied")
    assert world.desired.standing("x", Kind.POD, key) is Standing.STALE
    assert world.desired.standing("x", Kind.POD, make_pod("a", "search").key) is Standing.ABSENT


def test_desired_absences_taken_in_by_slices_prove_nothing_in_part() -> None:
    """While a list ends its source is still listing, so what is left of it is no absence."""
    world = synced(*(make_pod(f"p-{number}") for number in range(2 * SLICE + 1)))
    world.store.start_listing(PODS, 1.0)
    while world.store.infer_absences(PODS):
        standings = {world.standing(one) for one in world.observed.ids()}
        assert standings == {None, Standing.STALE}
    world.store.finish_listing(PODS, 2.0)
    assert {world.standing(one) for one in world.observed.ids()} == {Standing.ABSENT}


def test_desired_cluster_uid_is_learnt_once() -> None:
    """One that cannot be read today takes nothing back."""
    desired = World().desired
    assert [desired.learn_cluster_uid(uid) for uid in ("", "one", "one", "", "two")] == [
        False,
        True,
        False,
        False,
        True,
    ]
    assert desired.cluster_uid == "two"


# Zones


def in_a_zone(zone: str, name: str = "node-a", address: str = "192.0.2.10") -> Node:
    """Return a Node that is labelled with a zone."""
    return make_node(name, ("InternalIP", address), labels={ZONE_LABEL: zone})


def zones(world: World) -> dict[str, str | None]:
    """Return the zone of each Pod's target, None for no such key."""
    targets = [target for claims in world.desired.claims.values() for target in claims]
    return {one.key.name: dict(one.meta).get("zone") for one in targets if one.key.kind is Kind.POD}


def zoned(*nodes: Node) -> World:
    """Return Pods a1 and a2 on node-a and b1 on node-b, with these Nodes."""
    world = World()
    world.lists(make_pod("a1"), make_pod("a2"), make_pod("b1", node="node-b"))
    world.lists(*nodes, source=NODES)
    world.taken()
    return world


def test_desired_pod_is_in_its_nodes_zone_whichever_is_seen_first() -> None:
    """With every port."""
    world = zoned(in_a_zone("z1"), in_a_zone("z2", "node-b", "192.0.2.11"))
    assert zones(world) == {"a1": "z1", "a2": "z1", "b1": "z2"}
    world.cluster.put(make_pod("late", annotations={**SCRAPED, "prometheus.io/port": "8080,9090"}))
    late = [one for (one,) in world.desired.claims.values() if one.key.name == "late"]
    assert [dict(one.meta)["zone"] for one in late] == ["z1", "z1"]
    assert zones(zoned()) == {"a1": None, "a2": None, "b1": None}


def test_desired_node_in_another_zone_moves_its_own_pods_only() -> None:
    """The same zone again moves none."""
    world = zoned(in_a_zone("z1"), in_a_zone("z2", "node-b", "192.0.2.11"))
    world.cluster.put(in_a_zone("z3"))
    asked = {service_id for change in world.taken() for service_id in change.asked}
    assert asked == {"node--192.0.2.10", "pod--shop--a1", "pod--shop--a2"}
    world.cluster.put(in_a_zone("z3"))
    assert world.taken() == []
    world.cluster.put(make_node())
    assert zones(world) == {"a1": None, "a2": None, "b1": "z2"}
    world.cluster.put(make_pod("a1", node="node-b"))
    assert zones(world)["a1"] == "z2"


def test_desired_zone_outlives_the_sight_of_its_node() -> None:
    """Nodes that fail, vanish from a list, are deleted or rejected take no zone away while Pods are there."""
    world = zoned(in_a_zone("z1"))
    world.store.fail(NODES, "403", "denied")
    world.lists(source=NODES)
    world.cluster.put(in_a_zone("z1"))
    world.cluster.remove(in_a_zone("z1"))
    world.cluster.put(make_pod("a3"))
    assert zones(world) == {"a1": "z1", "a2": "z1", "a3": "z1", "b1": None}
    world.cluster.put(make_node("node-a", ("Hostname", "n"), labels={ZONE_LABEL: "z4"}))
    assert list(world.desired.rejections) == [make_node().key]
    assert zones(world)["a3"] == "z4"


def test_desired_zone_is_forgotten_with_its_node_and_its_last_pod() -> None:
    """Nodes that come and go for years leave nothing behind, in either order."""
    world = zoned(in_a_zone("z1"))
    world.cluster.remove(in_a_zone("z1"))
    for name in ("a1", "a2"):
        world.cluster.remove(make_pod(name))
    world.cluster.put(in_a_zone("z2", "node-b"))
    world.cluster.remove(make_pod("b1", node="node-b"))
    world.lists(source=NODES)
    known = world.desired._inheritance._givers[Kind.NODE]
    assert (known.known, known.heirs, known.gone) == ({}, {}, set())
    world.cluster.put(make_pod("a1"))
    assert zones(world) == {"a1": None}


def test_desired_zone_needs_watched_nodes() -> None:
    """Without them no key appears; with Pods of chosen namespaces each has its Node's."""
    assert zones(synced(make_pod("a"))) == {"a": None}
    sources = (Source(Kind.POD, "shop"), Source(Kind.POD, "search"), NODES)
    world = World(*sources)
    for source in sources[:2]:
        world.lists(make_pod(source.namespace, source.namespace), source=source)
    world.lists(in_a_zone("z1"), source=NODES)
    assert zones(world) == {"shop": "z1", "search": "z1"}


# Whatever happens

_ITEMS = st.builds(
    make_pod,
    st.sampled_from(["a", "b", "a--8081"]),
    ip=st.sampled_from(["198.51.100.1", "198.51.100.2", ""]),
    phase=st.sampled_from(["Running", "Succeeded"]),
    annotations=st.sampled_from([SCRAPED, PORTS_1, PORTS_3, annotated(port="x"), {}]),
)
_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), _ITEMS),
        st.tuples(st.just("remove"), _ITEMS),
        st.tuples(st.just("list"), st.lists(_ITEMS, unique_by=lambda pod: pod.key)),
        st.tuples(st.just("write"), st.none()),
        st.tuples(st.just("fail"), st.none()),
    ),
    max_size=20,
)


@settings(max_examples=60, deadline=None)
@given(_STEPS)
def test_desired_state_after_any_steps_agrees_with_the_objects(steps: list[tuple[str, object]]) -> None:
    """Claims and rejections are those of the objects; no record that is asked for, or protected, has departed."""
    world = synced()
    live: dict[ObjectKey, Pod] = {}
    for step in steps:
        live = _take_step(world, live, *step)
    resolved = {key: world.desired.resolved(pod) for key, pod in live.items()}
    rejected = {key for key, one in resolved.items() if isinstance(one, Rejection)}
    targets = [target for one in resolved.values() if isinstance(one, tuple) for target in one]
    assert set(world.desired.rejections) == rejected
    assert sorted(map(_name_of, _flat(world.desired.claims.values()))) == sorted(map(_name_of, targets))
    for service_id in world.observed.ids():
        record = world.observed.get(service_id)
        assert isinstance(record, AsDesired)
        key = record.target.key
        standing = world.standing(service_id)
        if any(target.key == key for target in world.desired.claims.get(service_id, ())):
            assert standing is None
        elif key in rejected:
            assert standing is Standing.REJECTED
        elif key in live:
            assert standing in (Standing.DEPARTED, Standing.REJECTED)


def _take_step(world: World, live: dict[ObjectKey, Pod], step: str, what: object) -> dict[ObjectKey, Pod]:
    """Take one step; return the objects that are there afterwards."""
    match step, what:
        case "put", Pod() as pod:
            world.cluster.put(pod)
            return {**live, pod.key: pod}
        case "remove", Pod() as pod:
            world.cluster.remove(pod)
            return {key: one for key, one in live.items() if key != pod.key}
        case "list", list() as pods:
            world.lists(*pods)
            return {pod.key: pod for pod in pods}
        case "write", _:
            world.write_all()
        case _:
            world.store.fail(PODS, "403", "denied")
    return live


def _flat(claims: Iterable[tuple[Target, ...]]) -> list[Target]:
    return [target for one in claims for target in one]


def _name_of(target: Target) -> tuple[str, str, str]:
    return target.id, target.key.name, target.address


def _target_of(key: ObjectKey) -> tuple[Target, ...]:
    return (replace(TARGET, key=key, id=f"pod--{key.namespace}--{key.name}"),)
