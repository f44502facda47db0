"""The decision about one service ID, for every desired and observed state."""

from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from k8s_consul_registrar.errors import Reason
from k8s_consul_registrar.model import UNSYNCED, Kind, Node, ObjectKey, Pod, Service, Source, Target
from k8s_consul_registrar.registrar.decide import (
    Action,
    AwaitProxy,
    CheckName,
    Conflict,
    Deregister,
    Desired,
    Infer,
    InSync,
    Keep,
    Kept,
    LookUp,
    Moves,
    Names,
    NameStatus,
    Nothing,
    Register,
    Reject,
    Rules,
    Standing,
    Update,
    Withheld,
    comparable_name,
    decide,
    settle,
)
from k8s_consul_registrar.registrar.observed import AsDesired, Foreign, Observed, Other, Unknown, observe
from k8s_consul_registrar.registrar.ownership import Claim, Identity, Policy
from k8s_consul_registrar.targets.meta import GivenMeta, inherit
from k8s_consul_registrar.targets.resolve import TargetRules, resolve
from k8s_consul_registrar.targets.service_names import HashShards, RandomShards, parse_name, parse_tag
from support.builders import annotated, make_node, make_pod, make_service, our_pod_service
from support.memory import NODES, PODS, MemoryCluster

LAB = Identity("lab")
RULES = Rules(LAB, RandomShards())
SHARDED = Rules(LAB, RandomShards(("s1", "s2")))
FOREIGN = Foreign("a service without our meta")
GROUPED = TargetRules(cluster="lab", pod_name=parse_name("{cluster}-pods", Kind.POD))


def target(item: Pod | Node, rules: TargetRules | None = None) -> Target:
    """Return the one target of an item."""
    resolved = resolve(item, rules or TargetRules())
    assert isinstance(resolved, tuple)
    return resolved[0]


def seen(service: Service, *, uid: str = "") -> Other | Foreign:
    """Return what is known of a record that another process wrote."""
    return observe(service, LAB, uid)


POD = target(make_pod("a"))
HELD = our_pod_service("a")
NODE_SERVICE = make_service(
    "node--192.0.2.99",
    {"cluster": "lab", "managed_by": "k8s-consul-registrar", "kind": "node", "node": "gone"},
)
LEGACY_NODE = make_service("node--192.0.2.99", {"cluster": "lab"})


def in_zone(target: Target, zone: str) -> Target:
    """Return a Pod's target whose Node is known to be in a zone, or in none."""
    return inherit(target, {Kind.NODE: GivenMeta((("zone", zone),) if zone else ())})


def asking(*claims: Target, **changes: Any) -> Desired:
    """Return the desired state of an ID that these targets ask for."""
    return Desired(claims[0].id, claims, **changes)


def unclaimed(standing: Standing | None, *, uid: str = "", service_id: str = "pod--shop--a") -> Desired:
    """Return the desired state of an ID that nothing asks for."""
    return Desired(service_id, standing=standing, cluster_uid=uid)


def written(action: Action) -> Service:
    """Return the service that an action writes."""
    assert isinstance(action, (Register, Update)), action
    return action.entry.service(LAB)


# Every combination of what is observed, asked for, and known of the object behind the record.

_OBSERVED: dict[str, Observed] = {
    "absent": None,
    "as desired": AsDesired(POD, "", "", 7),
    "ours": seen(replace(our_pod_service("a", note="by hand"), index=7)),
    "legacy": seen(
        make_service("pod--shop--a", {"cluster": "lab", "namespace": "shop", "metrics_path": "/metrics"})
    ),
    "foreign": FOREIGN,
    "unknown": Unknown(),
}
_KEPT = {
    Standing.REJECTED: Kept.REJECTED,
    Standing.STALE: Kept.BLIND,
    Standing.UNWATCHED: Kept.UNFOLLOWED,
}


@pytest.mark.parametrize(("observed", "standing"), list(product(_OBSERVED, [*Standing, None])))
def test_decide_id_that_nothing_asks_for(observed: str, standing: Standing | None) -> None:
    """Only a fact removes; an inference is left to the brake, and whatever may exist stays."""
    action = decide(unclaimed(standing), _OBSERVED[observed], RULES)
    match observed:
        case "unknown":
            assert action == LookUp()
        case "absent" | "foreign":
            assert action == Nothing()
        case _ if standing in _KEPT:
            assert action == Keep(_KEPT[standing])
        case _ if standing is Standing.ABSENT:
            assert action == Infer()
        case _:
            version = 0 if observed == "legacy" else 7
            assert action == Deregister("pod--shop--a", "pod--shop--a", version)


@pytest.mark.parametrize(("observed", "standing"), list(product(_OBSERVED, [*Standing, None])))
@pytest.mark.parametrize("is_contested", [False, True])
def test_decide_id_that_a_pod_asks_for(
    observed: str, standing: Standing | None, *, is_contested: bool
) -> None:
    """A free ID is registered, a record of another object that may exist is kept, and a foreign one is a conflict."""
    record = _OBSERVED[observed]
    holder = None if standing is None else ObjectKey(Kind.POD, "a", "other")
    desired = asking(POD, holder=holder, standing=standing, is_contested=is_contested)
    action = decide(desired, record, RULES)
    match observed:
        case "unknown":
            assert action == LookUp()
        case "absent":
            assert action == Register(AsDesired(POD, "", ""))
        case "foreign":
            assert action == Conflict(POD.key, FOREIGN.holder)
        case _ if standing in _KEPT:
            assert isinstance(action, Keep)
            assert (action.reason, [one.key for one in action.losers]) == (_KEPT[standing], [POD.key])
        case "as desired":
            assert action == InSync(AsDesired(POD, "", "", 7))
        case _ if is_contested:
            assert isinstance(action, Conflict)
        case _:
            assert action == Update(AsDesired(POD, "", "", 0 if observed == "legacy" else 7))


# What is written


@pytest.mark.parametrize(
    ("policy", "withheld"),
    [
        (Policy.SYNC, set()),
        (Policy.UPSERT_ONLY, {Deregister}),
        (Policy.OBSERVE, {Register, Update, Deregister}),
    ],
)
def test_decide_withholds_what_the_policy_does_not_allow(policy: Policy, withheld: set[type[Action]]) -> None:
    """The write itself is the same under each policy; what writes nothing is as it was."""
    rules = replace(RULES, policy=policy)
    other = seen(replace(HELD, address="198.51.100.99"))
    cases: list[tuple[Desired, Observed]] = [
        (asking(POD), None),
        (asking(POD, holder=POD.key), other),
        (unclaimed(Standing.DEPARTED), other),
        (unclaimed(Standing.REJECTED), other),
        (unclaimed(Standing.ABSENT), other),
        (asking(POD), FOREIGN),
        (asking(POD), Unknown()),
    ]
    for desired, observed in cases:
        action = decide(desired, observed, RULES)
        expected = Withheld(action) if type(action) in withheld else action  # type: ignore[arg-type]
        assert decide(desired, observed, rules) == expected


def test_decide_new_service_has_everything_the_cluster_says() -> None:
    """And no version, since there is none to replace."""
    service = written(decide(asking(POD, cluster_uid="one"), None, RULES))
    assert service == our_pod_service("a", cluster_uid="one")
    assert service.index == 0


def test_decide_write_names_the_version_it_replaces() -> None:
    """An update and a removal carry the index of the record that was observed."""
    record = seen(replace(our_pod_service("a", note="mine"), index=42))
    assert written(decide(asking(POD), record, RULES)).index == 42
    removal = decide(unclaimed(Standing.DEPARTED), record, RULES)
    assert isinstance(removal, Deregister)
    assert removal.version == 42


def test_decide_record_of_an_earlier_process_that_is_equal_is_in_sync() -> None:
    """A start over what the last process wrote writes nothing."""
    assert isinstance(decide(asking(POD), seen(HELD), RULES), InSync)


@pytest.mark.parametrize(
    "change",
    [
        {"address": "198.51.100.99"},
        {"port": 1},
        {"tags": ("by-hand",)},
        {"ready": True},
        {"name": "by-hand"},
        {"index": UNSYNCED},
    ],
    ids=str,
)
def test_decide_record_that_a_hand_changed_is_repaired(change: dict[str, Any]) -> None:
    """Also one that the agent has and the catalog lacks."""
    action = decide(asking(POD), seen(replace(HELD, **change)), RULES)
    assert isinstance(action, Update)
    assert written(action) == HELD


def test_decide_meta_that_a_hand_changed_is_repaired() -> None:
    """Added, changed or taken away."""
    for wrong in (our_pod_service("a", note="mine"), our_pod_service("a", scheme="https")):
        assert written(decide(asking(POD), seen(wrong), RULES)) == HELD


@pytest.mark.parametrize(
    "change",
    [{"rank": (1, "", "")}, {"is_terminating": True}, {"has_own_address": False}],
    ids=str,
)
def test_decide_target_that_differs_in_nothing_a_record_shows_writes_nothing(
    change: dict[str, Any],
) -> None:
    """Its rank or that it is being deleted: the record would be the same; what is known takes it over."""
    changed = replace(POD, **change)
    assert decide(asking(changed), AsDesired(POD, "", "", 7), RULES) == InSync(AsDesired(changed, "", "", 7))
    assert decide(asking(changed), seen(HELD), RULES) == InSync(AsDesired(changed, "", ""))


def test_decide_readiness_is_written_where_it_is_reported() -> None:
    """None, not ready and ready are three records."""
    for before, after in product((None, False, True), repeat=2):
        record = AsDesired(replace(POD, ready=before), "", "")
        action = decide(asking(replace(POD, ready=after)), record, RULES)
        assert isinstance(action, InSync if before is after else Update)


# Ownership


def test_decide_default_cluster_name_removes_only_what_the_uid_proves() -> None:
    """Another cluster may carry the same default, so the name alone proves nothing."""
    rules = Rules(Identity("lab", has_default_name=True), RandomShards())
    for recorded, uid, is_removed in (
        ("", "", False),
        ("one", "", False),
        ("", "one", False),
        ("one", "one", True),
    ):
        record = AsDesired(POD, "", recorded)
        action = decide(unclaimed(Standing.DEPARTED, uid=uid), record, rules)
        assert isinstance(action, Deregister) is is_removed
        assert is_removed or action == Keep(Kept.UNPROVEN)
        changed = target(make_pod("a", ip="198.51.100.99"))
        assert isinstance(decide(asking(changed, cluster_uid=uid), record, rules), Update)


def test_decide_unproven_absence_is_not_even_inferred() -> None:
    """It never reaches the brake, nor counts there."""
    rules = Rules(Identity("lab", has_default_name=True), RandomShards())
    assert decide(unclaimed(Standing.ABSENT), AsDesired(POD, "", ""), rules) == Keep(Kept.UNPROVEN)


def test_decide_original_programs_service_is_removed_only_for_a_whole_cluster() -> None:
    """A registrar of a part of the cluster cannot know that nothing wants it."""
    record = seen(LEGACY_NODE)
    desired = unclaimed(Standing.DEPARTED, service_id=LEGACY_NODE.id)
    assert isinstance(decide(desired, record, RULES), Deregister)
    narrow = Rules(Identity("lab", covers_cluster=False), RandomShards())
    assert decide(desired, record, narrow) == Keep(Kept.UNPROVEN)


def test_decide_original_programs_service_is_adopted_with_its_shard() -> None:
    """Updated in place, a Pod's and a Node's, which names no object."""
    legacy = make_service(
        "pod--shop--a",
        {"cluster": "lab", "namespace": "shop", "metrics_path": "/metrics", "shard_path": "s2"},
    )
    assert written(decide(asking(POD), seen(legacy), SHARDED)) == our_pod_service("a", shard_path="s2")
    node = target(make_node())
    record = seen(make_service(node.id, {"cluster": "lab"}))
    for standing in Standing:
        assert isinstance(decide(asking(node, standing=standing), record, RULES), Update)


def test_decide_cluster_uid_is_added_and_never_taken_away() -> None:
    """One that cannot be read today stays as it is recorded."""
    recorded = our_pod_service("a", cluster_uid="one")
    assert isinstance(decide(asking(POD), seen(recorded), RULES), InSync)
    assert isinstance(decide(asking(POD), AsDesired(POD, "", "one"), RULES), InSync)
    for record in (seen(HELD), AsDesired(POD, "", "")):
        assert written(decide(asking(POD, cluster_uid="one"), record, RULES)) == recorded


def test_decide_record_of_another_cluster_with_the_same_name_is_a_conflict() -> None:
    """A kubeconfig that leads elsewhere overwrites nothing and removes nothing."""
    record = seen(our_pod_service("a", cluster_uid="one"), uid="two")
    assert isinstance(decide(asking(POD, cluster_uid="two"), record, RULES), Conflict)
    assert decide(unclaimed(Standing.DEPARTED, uid="two"), record, RULES) == Nothing()


@pytest.mark.parametrize("is_as_desired", [True, False])
def test_decide_record_read_before_another_cluster_answered_is_not_ours(is_as_desired: bool) -> None:
    """The API server's address led to another cluster since: nothing of the first is written over or removed."""
    service = our_pod_service("a", cluster_uid="one")
    record = AsDesired(POD, "", "one") if is_as_desired else seen(service, uid="one")
    changed = target(make_pod("a", ip="198.51.100.99"))
    assert isinstance(decide(asking(changed, cluster_uid="two"), record, RULES), Conflict)
    assert isinstance(decide(asking(changed, cluster_uid="one"), record, RULES), Update)
    for standing in (Standing.DEPARTED, Standing.ABSENT):
        assert decide(unclaimed(standing, uid="two"), record, RULES) == Nothing()


@pytest.mark.parametrize(
    "service",
    [
        our_pod_service("a", cluster="other"),
        our_pod_service("a", instance="blue"),
        make_service("pod--shop--a"),
        make_service("web", {"cluster": "lab"}),
        make_service("consul"),
        make_service("pod--shop--a", {"cluster": "lab", "managed_by": "consul-k8s"}),
    ],
    ids=lambda service: str(dict(service.meta).get("cluster")),
)
def test_decide_foreign_record_is_never_touched(service: Service) -> None:
    """Another cluster's, another instance's, another tool's and a hand's, whatever their IDs look like."""
    record = seen(service)
    for standing in (None, *Standing):
        assert decide(unclaimed(standing), record, RULES) == Nothing()
        assert isinstance(decide(asking(POD, standing=standing), record, RULES), Conflict)


# Claims of several objects

FIRST = target(make_pod("b--c", "a", created="2026-01-01T00:00:00Z"))
SECOND = target(make_pod("c", "a--b", created="2026-01-02T00:00:00Z"))


def test_settle_free_id_goes_to_the_older_pod() -> None:
    """The other is rejected by reason."""
    assert FIRST.id == SECOND.id
    winner, losers = settle([SECOND, FIRST], None)
    assert winner == FIRST
    assert [(loser.key, loser.reason) for loser in losers] == [(SECOND.key, Reason.ID_TAKEN)]


def test_settle_pod_that_holds_the_id_keeps_it() -> None:
    """An ID that changed hands at each write would be worse."""
    winner, losers = settle([FIRST, SECOND], SECOND.key)
    assert (winner, [loser.key for loser in losers]) == (SECOND, [FIRST.key])
    assert settle([FIRST, SECOND], make_pod("gone").key)[0] == FIRST


def test_settle_ready_node_counts_before_an_older_one_that_holds_the_address() -> None:
    """With both Ready the older one counts."""
    gone = target(make_node("gone", ready=False, created="2026-01-01T00:00:00Z"))
    here = target(make_node("here", ready=True, created="2026-02-01T00:00:00Z"))
    winner, losers = settle([gone, here], gone.key)
    assert (winner, losers[0].reason) == (here, Reason.ADDRESS_TAKEN)
    older = target(make_node("older", created="2026-01-15T00:00:00Z"))
    assert settle([here, older], here.key)[0] == older


def test_decide_shared_id_stays_with_its_holder() -> None:
    """At every decision, with the other one told why."""
    for record in (AsDesired(SECOND, "", ""), seen(SECOND_SERVICE)):
        action = decide(asking(FIRST, SECOND, holder=SECOND.key), record, RULES)
        assert isinstance(action, InSync)
        assert [(one.key, one.reason) for one in action.losers] == [(FIRST.key, Reason.ID_TAKEN)]


def test_decide_shared_id_of_a_holder_that_left_goes_to_the_other() -> None:
    """Departed, or absent from a synced source."""
    for standing in (Standing.DEPARTED, Standing.ABSENT):
        desired = asking(FIRST, holder=SECOND.key, standing=standing)
        assert written(decide(desired, AsDesired(SECOND, "", ""), RULES)).value("namespace") == "a"


def test_decide_address_goes_to_the_node_that_has_it() -> None:
    """Also while Nodes are not synced: two at one address do not exist at once."""
    node = target(make_node("new"))
    old = target(make_node("old"))
    for standing in Standing:
        desired = asking(node, holder=old.key, standing=standing)
        assert isinstance(decide(desired, AsDesired(old, "", ""), RULES), Update)


SECOND_SERVICE = AsDesired(SECOND, "", "").service(LAB)


# Shards


def test_decide_shard_is_kept_and_a_retired_one_is_replaced() -> None:
    """Without shards none is written."""
    moved = target(make_pod("a", ip="198.51.100.99"))
    held = our_pod_service("a", shard_path="s2")
    assert written(decide(asking(moved), seen(held), SHARDED)).value("shard_path") == "s2"
    assert isinstance(decide(asking(POD), seen(held), SHARDED), InSync)
    only = Rules(LAB, RandomShards(("new",)))
    assert written(decide(asking(POD), seen(held), only)).value("shard_path") == "new"
    assert written(decide(asking(POD), seen(held), RULES)) == HELD


def test_decide_shard_of_a_service_that_was_lost_is_recalled() -> None:
    """A service comes back to the shard that it had."""
    for shard in ("s1", "s2"):
        assert written(decide(asking(POD, shard=shard), None, SHARDED)).value("shard_path") == shard


def test_decide_shard_fills_the_name_and_the_tags() -> None:
    """And they follow it when it changes."""
    rules = TargetRules(
        cluster="lab",
        pod_name=parse_name("{cluster}-{shard_path}", Kind.POD),
        tags=(parse_tag("z"), parse_tag("shard_path={shard_path}"), parse_tag("s={shard_path}")),
        longest_shard=2,
    )
    pod = target(make_pod("a"), rules)
    made = written(decide(asking(pod), None, Rules(LAB, RandomShards(("s1",)))))
    assert (made.name, made.tags) == ("lab-s1", ("s=s1", "shard_path=s1", "z"))
    assert isinstance(decide(asking(pod), seen(made), SHARDED), InSync)
    moved = written(decide(asking(pod), seen(made), Rules(LAB, RandomShards(("s2",)))))
    assert (moved.name, moved.tags) == ("lab-s2", ("s=s2", "shard_path=s2", "z"))


def test_decide_hash_moves_a_service_to_its_own_shard() -> None:
    """From another shard by an update, and then no more."""
    rules = Rules(LAB, HashShards(("s1", "s2")))
    made = written(decide(asking(POD), None, rules))
    other = {"s1": "s2", "s2": "s1"}[made.value("shard_path")]
    assert written(decide(asking(POD), seen(our_pod_service("a", shard_path=other)), rules)) == made
    assert isinstance(decide(asking(POD), seen(made), rules), InSync)


# Zones

ZONED = our_pod_service("a", zone="z1")


def test_decide_zone_that_is_not_known_is_kept() -> None:
    """Also when something else of the service is to be written."""
    assert isinstance(decide(asking(POD), seen(ZONED), RULES), InSync)
    moved = target(make_pod("a", ip="198.51.100.77"))
    for record in (seen(ZONED), AsDesired(in_zone(POD, "z1"), "", "")):
        service = written(decide(asking(moved), record, RULES))
        assert (service.address, service.value("zone")) == ("198.51.100.77", "z1")
    by_hand = our_pod_service("a", zone="z1", note="by hand")
    assert written(decide(asking(POD), seen(by_hand), RULES)) == ZONED


def test_decide_zone_that_is_known_is_repaired() -> None:
    """Meta that was added or removed by hand, and a zone where the Node has none."""
    for wrong in (our_pod_service("a", zone="z9"), HELD):
        assert written(decide(asking(in_zone(POD, "z1")), seen(wrong), RULES)) == ZONED
    assert written(decide(asking(in_zone(POD, "")), seen(ZONED), RULES)) == HELD


def test_decide_zone_of_another_node_is_not_kept() -> None:
    """A Pod that came back under its name elsewhere has its new Node's zone or none."""
    elsewhere = target(make_pod("a", node="node-b"))
    for record in (seen(ZONED), AsDesired(in_zone(POD, "z1"), "", "")):
        service = written(decide(asking(elsewhere), record, RULES))
        assert (service.value("node"), service.value("zone")) == ("node-b", "")


# Names


def naming(status: NameStatus) -> Rules:
    """Return rules under which every name that these tests give is so."""
    compared = frozenset(comparable_name(name) for name in ("lab-pods", POD.name, FIRST.name))
    taken = compared if status is NameStatus.TAKEN else frozenset()
    checked = frozenset(Kind) if status is NameStatus.UNCHECKED else frozenset[Kind]()
    return Rules(LAB, RandomShards(), Names(checked, taken))


def test_decide_name_of_others_is_refused() -> None:
    """Neither a new service nor a renamed one joins it; the default name is no exception."""
    grouped = target(make_pod("a"), GROUPED)
    for one, record in (
        (POD, None),
        (grouped, None),
        (grouped, seen(HELD)),
        (grouped, AsDesired(POD, "", "")),
    ):
        action = decide(asking(one), record, naming(NameStatus.TAKEN))
        assert isinstance(action, Reject)
        assert (action.rejection.key, action.rejection.reason, action.rejection.id) == (
            POD.key,
            Reason.NAME_TAKEN,
            POD.id,
        )


def test_decide_name_that_is_not_checked_is_looked_up_first() -> None:
    """Once for a new service and once for a new name."""
    grouped = target(make_pod("a"), GROUPED)
    for record in (None, seen(HELD)):
        assert decide(asking(grouped), record, naming(NameStatus.UNCHECKED)) == CheckName("lab-pods")


@pytest.mark.parametrize("status", [NameStatus.TAKEN, NameStatus.UNCHECKED])
def test_decide_name_that_a_service_has_is_kept(status: NameStatus) -> None:
    """A service of others that comes later with the name neither ends ours nor keeps it from changing."""
    moved = target(make_pod("a", ip="198.51.100.99"), GROUPED)
    for name in ("lab-pods", "LAB-pods"):
        held = replace(HELD, name=name)
        assert written(decide(asking(moved), seen(held), naming(status))).address == "198.51.100.99"


def test_decide_refused_name_tells_the_losers_of_the_id_too() -> None:
    """Two Pods ask for one ID, and the one that gets it cannot have its name."""
    action = decide(asking(FIRST, SECOND), None, naming(NameStatus.TAKEN))
    assert isinstance(action, Reject)
    assert [one.key for one in action.losers] == [SECOND.key]


# Contested records


@pytest.mark.parametrize("are_allowed", [False, True])
def test_decide_pod_moves_to_the_proxy_only_once_that_serves_pods(*, are_allowed: bool) -> None:
    """Its service waits at the Pod's own address; what is new, at the proxy already or a Node's does not wait."""
    rules = Rules(LAB, RandomShards(), moves=Moves(are_allowed))
    through = TargetRules(pods_through_proxy=True, proxy_node_port=31112)
    pod = make_pod(host_ip="192.0.2.1", annotations=annotated(port="8080"))
    direct, proxied = target(pod), target(pod, through)
    other_port = target(pod, replace(through, proxy_node_port=31113))
    at_pod = seen(AsDesired(direct, "", "").service(LAB))
    move = decide(asking(proxied), at_pod, rules)
    assert move == (Update(AsDesired(proxied, "", "")) if are_allowed else AwaitProxy(proxied))
    assert isinstance(
        decide(asking(proxied), AsDesired(direct, "", ""), rules), Update if are_allowed else AwaitProxy
    )
    assert isinstance(decide(asking(proxied), None, rules), Register)
    at_proxy = seen(AsDesired(proxied, "", "").service(LAB))
    assert isinstance(decide(asking(proxied), at_proxy, rules), InSync)
    assert isinstance(decide(asking(other_port), at_proxy, rules), Update)
    assert isinstance(decide(asking(direct), at_proxy, rules), Update)
    gone = Desired(proxied.id, standing=Standing.DEPARTED)
    assert isinstance(decide(gone, at_pod, rules), Deregister)
    node = target(make_node())
    changed = seen(make_service(node.id, dict(AsDesired(node, "", "").service(LAB).meta), port=1))
    assert isinstance(decide(asking(node), changed, rules), Update)


def test_decide_contested_record_is_left_alone_until_it_is_as_desired() -> None:
    """A record that another writer of this identity keeps changing is a conflict; its removal is not."""
    changed = seen(our_pod_service("a", scheme="https"))
    assert isinstance(decide(asking(POD, is_contested=True), changed, RULES), Conflict)
    assert isinstance(decide(asking(POD, is_contested=True), seen(HELD), RULES), InSync)
    gone = Desired(POD.id, standing=Standing.DEPARTED, is_contested=True)
    assert isinstance(decide(gone, changed, RULES), Deregister)


# Whatever is held and asked for

_NAMES = st.sampled_from([f"p{number}" for number in range(6)])
_NAMESPACES = st.sampled_from(["shop", "a", "a--p1"])
_SERVICES = st.builds(
    our_pod_service,
    _NAMES,
    _NAMESPACES,
    cluster=st.sampled_from(["lab", "other"]),
    instance=st.sampled_from(["blue", "green"]) | st.just(""),
    cluster_uid=st.sampled_from(["", "one", "two"]),
    shard_path=st.sampled_from(["", "s1", "gone"]),
)
_PODS = st.builds(
    make_pod,
    _NAMES,
    _NAMESPACES,
    ip=st.sampled_from(["198.51.100.10", "198.51.100.11", ""]),
    annotations=st.sampled_from([annotated(port="9102"), annotated(port="9102,9103"), {}]),
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(_PODS, unique_by=lambda pod: pod.key),
    st.lists(_SERVICES, unique_by=lambda service: service.id),
    st.booleans(),
    st.sampled_from(["", "one"]),
)
def test_decide_all_twice_writes_nothing_the_second_time(
    pods: list[Pod], services: list[Service], is_synced: bool, uid: str
) -> None:
    """Foreign services are untouched, a source that is not synced loses nothing, and every write is the last."""
    cluster = MemoryCluster((PODS, NODES))
    cluster.desired.learn_cluster_uid(uid)
    held = {service.id: service for service in services}
    foreign = {one.id for one in services if isinstance(seen(one, uid=uid), Foreign)}
    cluster.put_list(pods)
    if not is_synced:
        cluster.store.fail(Source(Kind.POD), "403", "denied")
    for attempt in range(2):
        for service_id in sorted({*held, *cluster.desired.claims}):
            before = held.get(service_id)
            record = None if before is None else seen(before, uid=uid)
            action = decide(cluster.desired.ask(service_id, record), record, SHARDED)
            is_write = isinstance(action, (Register, Update, Deregister))
            assert not (is_write and attempt)
            assert not (is_write and service_id in foreign)
            assert not (isinstance(action, Deregister) and not is_synced)
            assert isinstance(action, Register) <= (before is None)
            if isinstance(action, (Register, Update)):
                held[service_id] = written(action)
            elif isinstance(action, Deregister):
                del held[service_id]


def test_decide_claim_of_a_record_as_desired_is_ours() -> None:
    """It was written by this process, so it may be removed like any of this registrar's."""
    assert LAB.may_remove(Claim.OURS, "", "")
    assert isinstance(decide(unclaimed(Standing.DEPARTED), AsDesired(POD, "", ""), RULES), Deregister)
