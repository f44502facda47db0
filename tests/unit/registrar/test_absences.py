"""An absence becomes a fact only by a read that began after Consul's record was read."""

from collections.abc import Sequence

import pytest
from msgspec.structs import replace

from k8s_consul_registrar.model import Kind, Node, ObjectKey, Pod, Service, Source, Undecodable
from k8s_consul_registrar.registrar.absences import (
    MOST_BY_NAME,
    PATIENCE_WITH_FAILED,
    RETRY_UNCONFIRMED,
    Absences,
    Findings,
    Judged,
)
from k8s_consul_registrar.registrar.brake import BrakeRules
from k8s_consul_registrar.registrar.decide import Infer, Rules, decide
from k8s_consul_registrar.registrar.observed import AsDesired, Other, observe
from k8s_consul_registrar.registrar.ownership import Identity
from k8s_consul_registrar.targets.service_names import RandomShards
from support.builders import annotated, make_node, make_pod, make_service, our_pod_service
from support.memory import NODES, PODS, MemoryCluster

LAB = Identity("lab")
LEGACY = make_service("node--192.0.2.99", {"cluster": "lab"})


class World:
    """A cluster, what Consul holds, and the absences that its resyncs judge."""

    def __init__(
        self,
        *services: Service,
        sources: Sequence[Source] = (PODS, NODES),
        is_same_selection: bool = False,
        brake: BrakeRules = BrakeRules(confirm=60, confirm_start=600),  # noqa: B008 - an immutable value
    ) -> None:
        self.now = 1000.0
        self.cluster = MemoryCluster(sources, clock=lambda: self.now)
        self.desired, self.store = self.cluster.desired, self.cluster.store
        self.services = {service.id: service for service in services}
        self.absences = Absences(
            self.desired,
            self.cluster,
            brake,
            is_same_selection=lambda: is_same_selection,
            clock=lambda: self.now,
        )

    def lists(self, *items: Pod | Node) -> None:
        """Complete a list of every source; the Pods' Node is there unless other Nodes are given."""
        if not any(isinstance(item, Node) for item in items):
            items = (*items, make_node("node-a"))
        for source in self.store.statuses():
            self.cluster.put_list(
                [item for item in items if self.store.source_of(item.key) == source], source
            )

    async def resync(self, read_at: float | None = None) -> Judged:
        """Read Consul and judge what is absent; what was released is gone afterwards."""
        observed = self.cluster.observed
        observed.begin_read()
        for service in self.services.values():
            observed.read(service.id, observe(service, LAB, self.desired.cluster_uid))
        observed.finish_read()
        findings = Findings()
        for service_id in observed.ids():
            record = observed.get(service_id)
            if not isinstance(record, (AsDesired, Other)):
                continue
            key = record.target.key if isinstance(record, AsDesired) else record.key
            kind = record.target.key.kind if isinstance(record, AsDesired) else record.kind
            source = self.desired.source_of(kind, key)
            assert source is not None
            findings.held[source] += 1
            asked = self.desired.ask(service_id, record)
            if isinstance(decide(asked, record, Rules(LAB, RandomShards())), Infer):
                findings.add(service_id, source, record)
        judged = await self.absences.judge(findings, self.now if read_at is None else read_at)
        for service_id in judged.released:
            del self.services[service_id]
        return judged


def ids(*names: str) -> set[str]:
    """Return the service IDs of Pods of namespace shop."""
    return {f"pod--shop--{name}" for name in names}


def held_by(judged: Judged) -> dict[str, float]:
    """Return how long the brake holds each service."""
    return {one: held.due - held.since for held in judged.held for one in held.ids}


def pods(count: int, **meta: str) -> list[Service]:
    """Return the services of that many Pods."""
    return [
        our_pod_service(f"p{number}", **{key: value for key, value in meta.items() if value})
        for number in range(count)
    ]


async def test_absence_confirmed_by_name_goes() -> None:
    """One read of the Pod that began after Consul's record was read is enough, without another list."""
    world = World(our_pod_service("gone"), our_pod_service("here"))
    world.lists(make_pod("here"))
    world.now += 50
    judged = await world.resync()
    assert dict(judged.released) == {"pod--shop--gone": make_pod("gone").key}
    assert world.cluster.reads[0] == make_pod("gone").key
    assert (judged.again_at, world.cluster.relists) == (None, [])


async def test_absence_of_an_object_that_exists_and_is_selected_is_none() -> None:
    """The list was wrong, for however long: the service stays, and the source is listed again."""
    world = World(*(our_pod_service(name) for name in ("lost", "here")))
    world.lists(make_pod("here"))
    world.cluster.objects[make_pod("lost").key] = make_pod("lost")
    for _ in range(3):
        judged = await world.resync()
        assert (dict(judged.released), held_by(judged)) == ({}, {})
        assert judged.again_at == world.now + 30
        assert world.cluster.relists.pop() == (PODS, world.now + 5)
        world.now += 600


async def test_absence_of_an_object_that_is_no_longer_selected_is_kept() -> None:
    """It waits, however few such there are."""
    world = World(*(our_pod_service(name) for name in ("lost", "here")))
    world.lists(make_pod("here"))
    world.cluster.objects[make_pod("lost").key] = make_pod("lost")
    world.cluster.unselected.add(make_pod("lost").key)
    judged = await world.resync()
    assert (dict(judged.released), held_by(judged)) == ({}, {"pod--shop--lost": 600})
    assert judged.again_at == world.now + 600
    world.now += 600
    assert set((await world.resync()).released) == ids("lost")


async def test_services_of_a_newly_excluded_namespace_wait_however_few_they_are() -> None:
    """More than are asked for by name, and too few for a mass removal: a list cannot tell why they are missing."""
    here = [f"here-{number}" for number in range(4 * MOST_BY_NAME)]
    gone = [our_pod_service(f"p{number}", "ci") for number in range(MOST_BY_NAME + 1)]
    world = World(*map(our_pod_service, here), *gone)
    world.cluster.excluded_namespaces.add("ci")
    world.lists(*map(make_pod, here))
    for _ in range(2):
        world.now += 50
        judged = await world.resync(read_at=world.now - 50)
        world.lists(*map(make_pod, here))
    assert (dict(judged.released), set(held_by(judged).values())) == ({}, {600.0})
    world.now += 600
    world.lists(*map(make_pod, here))
    assert set((await world.resync()).released) == {one.id for one in gone}


@pytest.mark.parametrize(
    "pod", [make_pod("job", phase="Succeeded"), make_pod("job", annotations={})], ids=["finished", "asks not"]
)
async def test_absence_of_an_object_that_asks_for_nothing_is_a_fact(pod: Pod) -> None:
    """However many there are at a start: their addresses may be others' by now."""
    names = [f"job-{number}" for number in range(10)]
    world = World(*map(our_pod_service, names))
    world.lists()
    for name in names:
        changed = make_pod(name, phase=pod.phase, annotations=pod.annotations)
        world.cluster.objects[changed.key] = changed
    judged = await world.resync()
    assert (set(judged.released), judged.held) == (ids(*names), ())


async def test_absence_of_an_object_that_asks_for_other_ids_is_a_fact() -> None:
    """A Pod that is not listed and has one port fewer than Consul knows."""
    key = make_pod("a").key
    services = [our_pod_service("a"), make_service("pod--shop--a--8081", dict(our_pod_service("a").meta))]
    world = World(*services)
    world.lists()
    world.cluster.objects[key] = make_pod("a", annotations=annotated(port="9102"))
    judged = await world.resync()
    assert set(judged.released) == {"pod--shop--a--8081"}
    assert held_by(judged) == {}


@pytest.mark.parametrize(
    "item",
    [
        make_pod("a", ip=""),
        make_pod("a", annotations=annotated(port="x")),
        Undecodable(Kind.POD, make_pod("a").key, "x"),
    ],
    ids=["no address", "odd port", "unreadable"],
)
async def test_absence_of_a_rejected_object_is_none(item: Pod | Undecodable) -> None:
    """It exists and may want what it has: it is neither removed nor held, nor does it count."""
    world = World(our_pod_service("a"))
    world.lists()
    world.cluster.objects[make_pod("a").key] = item
    for _ in range(2):
        judged = await world.resync()
        assert (dict(judged.released), judged.held) == ({}, ())
        world.now += 10_000


async def test_absence_is_unconfirmed_while_the_api_server_is_down() -> None:
    """Nothing goes, and it is asked for again soon, however few there are."""
    world = World(our_pod_service("gone"))
    world.lists()
    world.cluster.is_down = True
    world.now += 50
    judged = await world.resync()
    assert (dict(judged.released), judged.held) == ({}, ())
    assert judged.again_at == world.now + RETRY_UNCONFIRMED
    world.cluster.is_down = False
    assert set((await world.resync()).released) == ids("gone")


async def test_absence_that_only_a_list_confirms_waits_as_of_an_unselected_object() -> None:
    """While reads by name fail a list is wrong perhaps, or lacks an object that is no longer selected."""
    world = World(our_pod_service("a"), our_pod_service("here"))
    world.lists(make_pod("here"))
    world.cluster.is_down = True
    await world.resync()
    for _ in range(3):
        world.now += 100
        world.lists(make_pod("here"))
        judged = await world.resync()
        assert (dict(judged.released), held_by(judged)) == ({}, {"pod--shop--a": 600})
    world.cluster.is_down = False
    assert set((await world.resync()).released) == ids("a")


@pytest.mark.parametrize("count", [MOST_BY_NAME, MOST_BY_NAME + 1])
async def test_absences_beyond_a_hundred_need_one_new_list(count: int) -> None:
    """Up to a hundred objects are read by name; more by a list that began after Consul was read."""
    world = World(*pods(count), brake=BrakeRules(allow_mass=True))
    world.lists()
    world.now += 50
    judged = await world.resync()
    if count == MOST_BY_NAME:
        assert (len(judged.released), len(world.cluster.reads), world.cluster.relists) == (count, count, [])
        return
    assert (dict(judged.released), world.cluster.reads) == ({}, [])
    assert world.cluster.relists == [(PODS, world.now)]
    assert (judged.relisting, judged.again_at) == (frozenset({PODS}), None)
    world.now += 5
    world.lists()
    world.now += 5
    assert len((await world.resync()).released) == count


async def test_absence_is_not_confirmed_by_a_list_begun_before_consuls_record_was_read() -> None:
    """The service may have been registered after that list, by a leader whose Pod is newer."""
    world = World(*pods(MOST_BY_NAME + 1), brake=BrakeRules(allow_mass=True))
    world.store.start_listing(PODS, world.now)
    world.now += 5
    read_at = world.now
    world.now += 5
    world.store.finish_listing(PODS, world.now)
    world.cluster.put_list([], NODES)
    judged = await world.resync(read_at)
    assert dict(judged.released) == {}
    assert world.cluster.relists == [(PODS, world.now)]


async def test_absence_of_a_record_that_changed_needs_another_list() -> None:
    """Another version is another record, read later."""
    services = [our_pod_service(f"p{number}") for number in range(MOST_BY_NAME + 1)]
    world = World(*services, brake=BrakeRules(allow_mass=True))
    world.lists()
    world.now += 5
    await world.resync()
    world.now += 5
    world.lists()
    world.now += 5
    changed = replace(services[0], index=9)
    world.services[changed.id] = changed
    judged = await world.resync()
    assert changed.id not in judged.released
    assert len(judged.released) == MOST_BY_NAME


async def test_absence_of_the_original_programs_node_needs_a_list() -> None:
    """It names no object that could be read by name."""
    world = World(LEGACY)
    world.lists()
    world.now += 50
    judged = await world.resync()
    assert (dict(judged.released), world.cluster.reads) == ({}, [])
    assert (world.cluster.relists, judged.relisting) == ([(NODES, world.now)], frozenset({NODES}))
    world.now += 5
    world.lists(make_node("other"))
    judged = await world.resync()
    assert dict(judged.released) == {LEGACY.id: None}


async def test_absence_of_the_original_programs_node_does_not_hold_pods_up() -> None:
    """Those that have names are read by name meanwhile."""
    world = World(LEGACY, our_pod_service("gone"))
    world.lists()
    world.now += 50
    judged = await world.resync()
    assert set(judged.released) == ids("gone")


async def test_mass_absence_at_a_start_is_held_and_judged_again() -> None:
    """Each was confirmed by name, and it is still a mass removal."""
    world = World(*pods(10))
    world.lists(make_pod("p0"))
    judged = await world.resync()
    assert (dict(judged.released), len(held_by(judged))) == ({}, 9)
    assert judged.again_at == world.now + 600
    world.now += 599
    assert dict((await world.resync()).released) == {}
    world.now += 1
    assert len((await world.resync()).released) == 9


async def test_mass_absence_beyond_a_hundred_is_judged_by_later_lists() -> None:
    """A list at the moment when the brake wants one."""
    world = World(*pods(MOST_BY_NAME + 50))
    world.lists(make_pod("p0"))
    world.now += 1
    await world.resync()
    world.now += 1
    world.lists(make_pod("p0"))
    began = world.now
    world.now += 1
    judged = await world.resync()
    assert set(held_by(judged).values()) == {600}
    assert world.cluster.relists[-1] == (PODS, began + 600)
    world.now = began + 600
    world.lists(make_pod("p0"))
    assert len((await world.resync()).released) == MOST_BY_NAME + 49


async def test_mass_absence_in_the_same_cluster_waits_less() -> None:
    """The cluster's UID is the recorded one, the selection is the same, and the source is not empty."""
    for uid, is_same, expected in (("one", True, 60), ("one", False, 600), ("", True, 600)):
        world = World(*pods(10, cluster_uid="one"), is_same_selection=is_same)
        world.desired.learn_cluster_uid(uid)
        world.lists(make_pod("p0"))
        judged = await world.resync()
        assert set(held_by(judged).values()) == {expected}


async def test_mass_absence_of_an_empty_source_waits_long_in_the_same_cluster_too() -> None:
    """A list that shows nothing at all proves no less by a UID."""
    world = World(*pods(10, cluster_uid="one"), is_same_selection=True)
    world.desired.learn_cluster_uid("one")
    world.lists()
    assert set(held_by(await world.resync()).values()) == {600}


async def test_mass_absence_of_a_deleted_nodes_pods_waits_less() -> None:
    """A drained node leaves dead targets for a minute, not for ten."""
    for is_deleted, expected in ((True, 60), (False, 600)):
        world = World(*pods(10, cluster_uid="one"))
        world.desired.learn_cluster_uid("one")
        world.lists(make_pod("p0"), make_node("node-b"))
        if not is_deleted:
            world.cluster.objects[make_node("node-a").key] = make_node("node-a")
        assert set(held_by(await world.resync()).values()) == {expected}


async def test_mass_absence_in_what_may_be_another_cluster_waits_long() -> None:
    """With a wrong kubeconfig no Node of the right cluster exists either."""
    for recorded, uid in (("", "two"), ("one", ""), ("", "")):
        world = World(*pods(10, cluster_uid=recorded), is_same_selection=True)
        world.desired.learn_cluster_uid(uid)
        world.lists(make_pod("of-another"), make_node("node-b"))
        assert set(held_by(await world.resync()).values()) == {600}


async def test_mass_absence_of_pods_says_nothing_of_nodes_that_are_not_synced() -> None:
    """A Node that may exist is no deleted one, and nor is one where Nodes are not watched."""
    for sources in ((PODS, NODES), (PODS,)):
        world = World(*pods(10, cluster_uid="one"), sources=sources)
        world.desired.learn_cluster_uid("one")
        world.cluster.put_list([make_pod("p0")])
        if NODES in sources:
            world.cluster.put_list([make_node("node-b")], NODES)
            world.store.fail(NODES, "403", "denied")
        assert set(held_by(await world.resync()).values()) == {600}


async def test_absence_at_a_start_waits_for_every_source_of_its_kind() -> None:
    """Until the others were listed, or have failed for a minute, nothing inferred goes."""
    one, other = Source(Kind.POD, "shop"), Source(Kind.POD, "search")
    world = World(our_pod_service("gone"), sources=(one, other))
    world.cluster.put_list([], one)
    world.store.fail(other, "403", "denied")
    judged = await world.resync()
    assert dict(judged.released) == {}
    assert judged.again_at is not None
    assert judged.again_at <= world.now + PATIENCE_WITH_FAILED
    world.now += PATIENCE_WITH_FAILED
    assert set((await world.resync()).released) == ids("gone")


async def test_absence_at_a_start_waits_for_a_slow_list() -> None:
    """A source that is still being listed has not failed, however long it takes."""
    one, other = Source(Kind.POD, "shop"), Source(Kind.POD, "search")
    world = World(our_pod_service("gone"), sources=(one, other))
    world.cluster.put_list([], one)
    world.now += 10 * PATIENCE_WITH_FAILED
    assert dict((await world.resync()).released) == {}
    world.cluster.put_list([], other)
    assert set((await world.resync()).released) == ids("gone")


async def test_absence_in_many_namespaces_is_judged_as_a_whole() -> None:
    """With a wrong kubeconfig each namespace is empty: 24 of 24 services stay."""
    sources = [Source(Kind.POD, f"team-{number}") for number in range(12)]
    world = World(
        *(our_pod_service(name, source.namespace) for source in sources for name in "ab"), sources=sources
    )
    world.lists()
    judged = await world.resync()
    assert (dict(judged.released), len(held_by(judged))) == ({}, 24)


async def test_absence_of_a_pod_that_comes_back_starts_again() -> None:
    """The wait is that of one uninterrupted absence."""
    world = World(*pods(10))
    world.lists()
    await world.resync()
    world.now += 599
    world.lists(*(make_pod(f"p{number}") for number in range(5)))
    await world.resync()
    world.now += 1
    world.lists()
    judged = await world.resync()
    assert set(judged.released) == ids(*(f"p{number}" for number in range(5, 10)))
    assert set(held_by(judged)) == ids(*(f"p{number}" for number in range(5)))


def test_candidate_names_its_object_and_node() -> None:
    """It holds whether the record is known as desired or only read."""
    findings = Findings()
    cluster = MemoryCluster()
    cluster.put_list([make_pod("a")])
    (claims,) = cluster.desired.claims.values()
    findings.add("a", PODS, AsDesired(claims[0], "", "one", 7))
    record = observe(our_pod_service("a"), LAB, "")
    assert isinstance(record, Other)
    findings.add("b", PODS, record)
    key = ObjectKey(Kind.POD, "shop", "a")
    assert [tuple(one) for one in findings.candidates] == [
        ("a", PODS, key, 7, "one", "node-a"),
        ("b", PODS, key, 0, "", "node-a"),
    ]
