"""The plan: what is written, what is left alone, and what can never happen."""

import dataclasses
from collections.abc import Iterable, Mapping

from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from builders import make_node, make_pod, make_service, our_pod_service
from k8s_consul_registrar.model import (
    UNSYNCED,
    Kind,
    Node,
    ObjectKey,
    Pod,
    Rejection,
    Service,
    Source,
    Target,
)
from k8s_consul_registrar.registrar.brake import BrakeRules
from k8s_consul_registrar.registrar.ledger import Entry
from k8s_consul_registrar.registrar.ownership import Identity
from k8s_consul_registrar.registrar.plan import Kept, Plan
from k8s_consul_registrar.registrar.planner import Planner
from k8s_consul_registrar.targets.reasons import Reason
from k8s_consul_registrar.targets.resolve import TargetRules, resolve
from k8s_consul_registrar.targets.service_names import parse_name
from k8s_consul_registrar.targets.sharding import RandomShards
from k8s_consul_registrar.targets.wanted import SourceState, Wanted
from planning import plan

LAB = Identity("lab")
PODS, NODES = Source(Kind.POD), Source(Kind.NODE)
SEEN = SourceState(listed_at=100.0, is_followed=True, objects=10)
ALL_SEEN = {PODS: SEEN, NODES: SEEN}


def wanting(
    *items: Pod | Node,
    sources: Mapping[Source, SourceState] | None = None,
    departed: Iterable[ObjectKey] = (),
    uid: str = "",
) -> Wanted:
    """Return what a cluster with these objects wants."""
    claims: dict[str, list[Target]] = {}
    rejections: dict[ObjectKey, Rejection] = {}
    for item in items:
        verdict = resolve(item, TargetRules())
        if isinstance(verdict, Rejection):
            rejections[item.key] = verdict
        else:
            for target in verdict or ():
                claims.setdefault(target.id, []).append(target)
    return Wanted(claims, rejections, ALL_SEEN if sources is None else sources, frozenset(departed), uid)


def ids(writes: Iterable[Service | Entry]) -> list[str]:
    """Return the IDs of services, sorted."""
    return sorted(write.id for write in writes)


def written(entries: Iterable[Entry]) -> list[Service]:
    """Return the services that are to be written."""
    return [entry.service(LAB) for entry in entries]


def test_new_targets_are_registered() -> None:
    """What Consul lacks is registered, with everything the cluster says of it."""
    made = plan(wanting(make_pod("a"), make_node()), [], LAB)
    assert ids(made.register) == ["node--192.0.2.10", "pod--shop--a"]
    assert our_pod_service("a") in written(made.register)
    assert made.writes == 2


def test_equal_services_are_left_alone() -> None:
    """A second pass over what the first one wrote writes nothing."""
    wanted = wanting(make_pod("a"), make_node())
    again = plan(wanted, written(plan(wanted, [], LAB).register), LAB)
    assert (again.writes, again.unchanged) == (0, 2)


def test_changed_address_is_updated_in_place() -> None:
    """A new IP is an update of the same ID, its shard kept."""
    held = our_pod_service("a", shard_path="s2")
    made = plan(wanting(make_pod("a", ip="198.51.100.99")), [held], LAB, shards=RandomShards(("s1", "s2")))
    (update,) = written(made.update)
    assert (update.address, update.value("shard_path")) == ("198.51.100.99", "s2")
    assert not made.register
    assert not made.deregister


def test_a_write_names_the_version_it_replaces() -> None:
    """An update carries the index of the record it was planned over, a new service none."""
    held = our_pod_service("a", note="mine")
    made = plan(wanting(make_pod("a"), make_pod("b")), [replace(held, index=42)], LAB)
    assert [service.index for service in written(made.update)] == [42]
    assert [service.index for service in written(made.register)] == [0]


def test_a_service_the_catalog_lacks_is_registered_again() -> None:
    """An agent may believe a service in sync that the catalog lacks: it is written though it is equal."""
    made = plan(wanting(make_pod("a")), [replace(our_pod_service("a"), index=UNSYNCED)], LAB)
    assert ids(made.update) == ["pod--shop--a"]


def test_hand_edit_is_repaired() -> None:
    """Meta that somebody added is taken away again."""
    made = plan(wanting(make_pod("a")), [our_pod_service("a", note="mine")], LAB)
    assert written(made.update) == [our_pod_service("a")]


def test_retired_shard_moves_and_no_shard_is_taken_away() -> None:
    """A shard that is no longer on offer is replaced; without shards none is written."""
    held = our_pod_service("a", shard_path="old")
    moved = plan(wanting(make_pod("a")), [held], LAB, shards=RandomShards(("new",)))
    assert written(moved.update)[0].value("shard_path") == "new"
    assert written(plan(wanting(make_pod("a")), [held], LAB).update) == [our_pod_service("a")]


def test_gone_pod_is_deregistered() -> None:
    """A service of ours whose Pod is not in a complete list goes."""
    assert ids(plan(wanting(), [our_pod_service("a")], LAB).deregister) == ["pod--shop--a"]


def test_foreign_services_are_never_touched() -> None:
    """Another cluster's, another tool's and hand-made services stay, whatever their IDs look like."""
    foreign = [
        our_pod_service("a", cluster="other"),
        our_pod_service("b", instance="blue"),
        make_service("pod--shop--c"),
        make_service("web", {"cluster": "lab"}),
        make_service("consul"),
    ]
    made = plan(wanting(), foreign, LAB)
    assert (made.writes, made.kept) == (0, {})


def test_an_id_that_is_not_ours_is_a_conflict() -> None:
    """A wanted ID that somebody else holds is reported, not overwritten."""
    made = plan(wanting(make_pod("a")), [our_pod_service("a", cluster="other")], LAB)
    assert made.writes == 0
    (conflict,) = made.conflicts
    assert conflict.id == "pod--shop--a"
    assert conflict.holder == "managed_by=k8s-consul-registrar, cluster=other"
    bare = plan(wanting(make_pod("a")), [make_service("pod--shop--a")], LAB)
    assert [one.holder for one in bare.conflicts] == ["a service without our meta"]


def test_wrong_cluster_with_the_right_name_is_a_conflict() -> None:
    """A kubeconfig that leads to another cluster removes nothing and overwrites nothing."""
    held = [our_pod_service(name, cluster_uid="one") for name in "abcd"]
    made = plan(wanting(make_pod("a"), uid="two"), held, LAB)
    assert made.writes == 0
    assert [conflict.id for conflict in made.conflicts] == ["pod--shop--a"]


def test_uid_that_cannot_be_read_today_is_kept() -> None:
    """A UID already recorded is not taken away because it cannot be read now, and is added once known."""
    recorded = our_pod_service("a", cluster_uid="one")
    assert plan(wanting(make_pod("a")), [recorded], LAB).unchanged == 1
    assert plan(wanting(make_pod("a"), uid="one"), [our_pod_service("a")], LAB).update[0].cluster_uid == "one"


def test_original_programs_service_is_adopted() -> None:
    """A service of the original program that we want is updated in place, its shard kept."""
    legacy = make_service(
        "pod--shop--a",
        {"cluster": "lab", "namespace": "shop", "metrics_path": "/metrics", "shard_path": "s2"},
    )
    (update,) = written(plan(wanting(make_pod("a")), [legacy], LAB, shards=RandomShards(("s1", "s2"))).update)
    assert update == our_pod_service("a", shard_path="s2")


def test_original_programs_leftover_goes_only_when_we_speak_for_the_cluster() -> None:
    """A service of the original program that nobody wants is removed by the one registrar of a cluster."""
    legacy = make_service("node--192.0.2.99", {"cluster": "lab"})
    assert ids(plan(wanting(), [legacy], LAB).deregister) == ["node--192.0.2.99"]
    narrow = plan(wanting(), [legacy], Identity("lab", speaks_for_cluster=False))
    assert (narrow.writes, narrow.kept[Kept.UNPROVEN]) == (0, 1)


def test_default_cluster_name_removes_nothing_unproven() -> None:
    """While the name is the default only the UID allows a removal."""
    identity = Identity("lab", has_default_name=True)
    held = [our_pod_service("a"), our_pod_service("b", cluster_uid="one")]
    made = plan(wanting(uid="one"), held, identity)
    assert ids(made.deregister) == ["pod--shop--b"]
    assert made.kept[Kept.UNPROVEN] == 1


def test_a_blind_source_blocks_only_itself() -> None:
    """Pods that cannot be listed keep their services; Nodes go on."""
    denied = SourceState(listed_at=100.0, is_followed=False, problem="403")
    node = make_service(
        "node--192.0.2.99",
        {"cluster": "lab", "managed_by": "k8s-consul-registrar", "kind": "node", "node": "gone"},
    )
    made = plan(wanting(sources={PODS: denied, NODES: SEEN}), [our_pod_service("a"), node], LAB)
    assert ids(made.deregister) == ["node--192.0.2.99"]
    assert made.kept[Kept.BLIND] == 1


def test_never_listed_and_opaque_sources_prove_nothing() -> None:
    """Before the first list, and while an item has no readable name, absence proves nothing."""
    for state in (SourceState(), SourceState(listed_at=1.0, is_followed=True, is_opaque=True)):
        made = plan(wanting(sources={PODS: state}), [our_pod_service("a")], LAB)
        assert (made.writes, made.kept[Kept.BLIND]) == (0, 1)


def test_a_departed_object_of_a_blind_source_stays_for_now() -> None:
    """Even a fact waits until its source is followed again, and is remembered until then."""
    denied = SourceState(listed_at=100.0, is_followed=False)
    key = make_pod("a").key
    made = plan(wanting(sources={PODS: denied}, departed=[key]), [our_pod_service("a")], LAB)
    assert (made.writes, made.kept_objects) == (0, frozenset({key}))


def test_unfollowed_kind_is_left_alone() -> None:
    """A service whose kind or namespace we do not follow stays."""
    made = plan(wanting(sources={Source(Kind.POD, "other"): SEEN}), [our_pod_service("a")], LAB)
    assert (made.writes, made.kept[Kept.UNFOLLOWED]) == (0, 1)
    own = plan(wanting(sources={Source(Kind.POD, "shop"): SEEN}), [our_pod_service("a")], LAB)
    assert ids(own.deregister) == ["pod--shop--a"]


def test_the_original_programs_nodes_stay_where_nodes_are_not_followed() -> None:
    """They name no object, so their kind alone says that no source of ours would list it."""
    legacy = make_service("node--192.0.2.99", {"cluster": "lab"})
    made = plan(wanting(sources={PODS: SEEN}), [legacy], LAB)
    assert (made.writes, made.kept[Kept.UNFOLLOWED]) == (0, 1)


def test_rejected_pod_keeps_what_it_has() -> None:
    """A Pod that is there with a broken annotation loses nothing, and is not overwritten either."""
    broken = make_pod("a", annotations={"prometheus.io/scrape": "true", "prometheus.io/port": "x"})
    made = plan(wanting(broken), [our_pod_service("a")], LAB)
    assert (made.writes, made.kept[Kept.REJECTED]) == (0, 1)


def test_a_rejected_pod_keeps_every_port_and_protects_no_other_pod() -> None:
    """Its object tells, whatever the ID; and where the object is another one, the ID does."""
    broken = make_pod("a", annotations={"prometheus.io/scrape": "true", "prometheus.io/port": "x"})
    ports = [replace(our_pod_service("a"), id=one) for one in ("pod--shop--a", "pod--shop--a--8081")]
    made = plan(wanting(broken), [*ports, our_pod_service("gone")], LAB)
    assert (ids(made.deregister), made.kept[Kept.REJECTED]) == (["pod--shop--gone"], 2)
    rejected = make_pod("b--c", "a", annotations={"prometheus.io/scrape": "true"})
    (of_another,) = written(plan(wanting(make_pod("c", "a--b")), [], LAB).register)
    made = plan(wanting(rejected), [of_another], LAB)
    assert (made.writes, made.kept[Kept.REJECTED]) == (0, 1)


def node_service(name: str, address: str = "192.0.2.99") -> Service:
    """Return what a registrar of cluster `lab` wrote for a Node."""
    meta = {"cluster": "lab", "managed_by": "k8s-consul-registrar", "kind": "node", "node": name}
    return make_service(f"node--{address}", meta)


def test_rejected_node_protects_the_original_programs_nodes() -> None:
    """The original wrote no Node's name, so a Node without an address may be any of its services."""
    nameless = make_node("n", ("Hostname", "n"))
    legacy = make_service("node--192.0.2.99", {"cluster": "lab"})
    assert plan(wanting(nameless), [legacy], LAB).kept[Kept.REJECTED] == 1
    assert ids(plan(wanting(nameless), [node_service("gone")], LAB).deregister) == ["node--192.0.2.99"]


def test_a_rejected_node_whose_address_is_known_protects_that_alone() -> None:
    """Of the original program's services the one with its ID stays, the others go."""
    known = Rejection(ObjectKey(Kind.NODE, "", "n"), Reason.META_TOO_LONG, "zone", "node--192.0.2.99")
    wanted = dataclasses.replace(wanting(), rejections={known.key: known})
    legacy = [make_service(f"node--192.0.2.{last}", {"cluster": "lab"}) for last in (98, 99)]
    made = plan(wanted, legacy, LAB)
    assert (ids(made.deregister), made.kept[Kept.REJECTED]) == (["node--192.0.2.98"], 1)


def test_the_original_programs_node_is_adopted() -> None:
    """It names no object, and is updated in place."""
    legacy = make_service("node--192.0.2.10", {"cluster": "lab"})
    assert ids(plan(wanting(make_node()), [legacy], LAB).update) == ["node--192.0.2.10"]


def test_an_address_goes_to_the_node_that_has_it() -> None:
    """Also while Nodes are out of sight: two at one address are not there at once."""
    denied = {PODS: SEEN, NODES: SourceState(listed_at=100.0, is_followed=False)}
    held = node_service("old", "192.0.2.10")
    assert ids(plan(wanting(make_node("new"), sources=denied), [held], LAB).update) == ["node--192.0.2.10"]


def test_shared_id_stays_with_its_holder_and_never_flaps() -> None:
    """Two Pods that ask for one ID: the holder keeps it at every pass, the other is rejected."""
    older = make_pod("b--c", "a", created="2026-01-01T00:00:00Z")
    younger = make_pod("c", "a--b", created="2026-02-01T00:00:00Z")
    (held,) = written(plan(wanting(younger), [], LAB).register)
    for _ in range(3):
        made = plan(wanting(older, younger), [held], LAB)
        assert (made.writes, made.unchanged) == (0, 1)
        assert [(one.key, one.reason) for one in made.rejections] == [(older.key, Reason.ID_TAKEN)]
    (taken,) = written(plan(wanting(older), [held], LAB).update)
    assert taken.value("namespace") == "a"


def test_shared_id_is_not_taken_from_a_holder_that_cannot_be_seen() -> None:
    """While the holder's namespace is blind, or the holder rejected, the ID stays with it."""
    older = make_pod("b--c", "a")
    (held,) = written(plan(wanting(make_pod("c", "a--b")), [], LAB).register)
    sources = {Source(Kind.POD, "a"): SEEN, Source(Kind.POD, "a--b"): SourceState()}
    for where in (sources, {Source(Kind.POD, "a"): SEEN}):
        blind = plan(wanting(older, sources=where), [held], LAB)
        assert (blind.writes, blind.kept[Kept.BLIND]) == (0, 1)
        assert [(one.key, one.reason) for one in blind.rejections] == [(older.key, Reason.ID_TAKEN)]
    broken = make_pod("c", "a--b", annotations={"prometheus.io/scrape": "true"})
    assert plan(wanting(older, broken), [held], LAB).writes == 0


def test_mass_absence_is_held_and_single_departures_are_not() -> None:
    """A list that misses most of a source removes nothing yet, except what is known to be gone."""
    held = [our_pod_service(f"p{number}") for number in range(10)]
    gone = make_pod("p0").key
    made = plan(wanting(departed=[gone]), held, LAB)
    assert ids(made.deregister) == ["pod--shop--p0"]
    assert [len(one.ids) for one in made.held] == [9]
    later = {PODS: SourceState(800.0, is_followed=True, objects=10), NODES: SEEN}
    confirmed = plan(wanting(sources=later), held[1:], LAB, memory=made.memory)
    assert len(confirmed.deregister) == 9


def test_a_blind_source_neither_forgets_nor_counts_as_listed() -> None:
    """The brake goes on from what the last list said that proves something; the first such is still a first."""
    held = [our_pod_service(f"p{number}") for number in range(10)]
    blind = {PODS: SourceState(listed_at=200.0, is_followed=False, objects=10)}
    assert plan(wanting(sources=blind), held, LAB).memory == {}
    first = plan(wanting(sources={PODS: SEEN}), held, LAB)
    assert [one.wait for one in first.held] == [BrakeRules().confirm_start]
    meanwhile = plan(wanting(sources=blind), held, LAB, memory=first.memory)
    assert meanwhile.memory == first.memory


def test_a_few_of_many_go_at_once() -> None:
    """What is still wanted counts among what a source holds."""
    held = [our_pod_service(f"p{number}") for number in range(20)]
    there = [make_pod(f"p{number}") for number in range(15)]
    made = plan(wanting(*there), held, LAB)
    assert (len(made.deregister), made.held, made.unchanged) == (5, (), 15)


def test_what_is_to_be_left_is_left_whatever_was_decided() -> None:
    """Somebody wrote it meanwhile: no update, new name, removal, absence or conflict of it counts any more."""
    rules = TargetRules(pod_name=parse_name("pods-{namespace}", Kind.POD))
    renamed = resolve(make_pod("renamed"), rules)
    assert isinstance(renamed, tuple)
    wanted = wanting(make_pod("edited"), make_pod("taken"), departed=[make_pod("departed").key])
    wanted = dataclasses.replace(wanted, claims={**wanted.claims, "pod--shop--renamed": list(renamed)})
    planner = Planner(wanted, LAB, RandomShards())
    names = ["edited", "renamed", "departed", "absent"]
    held = [*map(our_pod_service, names), our_pod_service("taken", cluster="other")]
    for one in held:
        planner.consider(replace(one, port=1))
    planner.leave({one.id for one in held})
    for _ in planner.complete():
        pass
    made = planner.plan(*planner.brake(BrakeRules(), {}))
    assert (made.writes, made.conflicts, made.held) == (0, (), ())


def test_departures_act_at_once_however_many() -> None:
    """Facts are not held: a namespace that was deleted goes at once."""
    held = [our_pod_service(f"p{number}") for number in range(50)]
    departed = [make_pod(f"p{number}").key for number in range(50)]
    assert len(plan(wanting(departed=departed), held, LAB).deregister) == 50


_NAMES = st.sampled_from([f"p{number}" for number in range(8)])
_SERVICES = st.builds(
    our_pod_service,
    _NAMES,
    st.sampled_from(["shop", "a", "a--p1"]),
    cluster=st.sampled_from(["lab", "other"]),
    instance=st.sampled_from(["blue", "green"]) | st.just(""),
    cluster_uid=st.sampled_from(["", "one", "two"]),
    shard_path=st.sampled_from(["", "s1", "gone"]),
)
_PODS = st.builds(
    make_pod,
    _NAMES,
    st.sampled_from(["shop", "a", "a--p1"]),
    ip=st.sampled_from(["198.51.100.10", "198.51.100.11", ""]),
)
_STATES = st.sampled_from(
    [SEEN, SourceState(), SourceState(5.0, is_followed=False), SourceState(5.0, is_followed=True)]
)


def apply(services: Mapping[str, Service], made: Plan) -> dict[str, Service]:
    """Carry a plan out on a dictionary that stands for Consul."""
    after = {**services, **{one.id: one for one in written((*made.register, *made.update))}}
    for one in made.deregister:
        del after[one.id]
    return after


@given(
    st.lists(_PODS, unique_by=lambda pod: pod.key),
    st.lists(_SERVICES, unique_by=lambda service: service.id),
    _STATES,
    st.sampled_from(["", "one"]),
)
def test_invariants(pods: list[Pod], services: list[Service], state: SourceState, uid: str) -> None:
    """Foreign services are untouched, a blind source loses nothing, and a second pass writes nothing."""
    wanted = wanting(*pods, sources={PODS: state}, uid=uid)
    before = {service.id: service for service in services}
    shards = RandomShards(("s1", "s2"))
    made = plan(wanted, services, LAB, shards=shards, rules=BrakeRules(allow_mass=True))
    after = apply(before, made)
    touched = {*ids(made.register), *ids(made.update), *ids(made.deregister)}
    assert len(touched) == made.writes
    assert not set(ids(made.register)) & before.keys()
    for service in services:
        is_foreign = (
            service.value("cluster") != "lab"
            or service.value("instance") != ""
            or (uid != "" and service.value("cluster_uid") not in ("", uid))
        )
        if is_foreign:
            assert after[service.id] is service
    if not state.proves_absence:
        assert not made.deregister
    again = plan(wanted, after.values(), LAB, shards=shards, rules=BrakeRules(allow_mass=True))
    assert again.writes == 0
