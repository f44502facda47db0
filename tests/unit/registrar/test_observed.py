"""The observed state: what Consul is known to hold under each ID."""

from collections.abc import Callable

import pytest
from msgspec.structs import replace

from k8s_consul_registrar.model import UNSYNCED, Kind, ObjectKey, Target
from k8s_consul_registrar.registrar.observed import (
    AsDesired,
    Foreign,
    Observed,
    ObservedState,
    Other,
    Unknown,
    observe,
)
from k8s_consul_registrar.registrar.ownership import Claim, Identity
from k8s_consul_registrar.targets.meta import Inherited
from k8s_consul_registrar.targets.resolve import TargetRules, resolve
from support.builders import make_pod, make_service, our_pod_service

LAB = Identity("lab")
FOREIGN = Foreign("a service without our meta")


def written(name: str = "a", shard: str = "s1", version: int = 7) -> AsDesired:
    """Return what is known after the service of a Pod was written."""
    resolved = resolve(make_pod(name), TargetRules())
    assert isinstance(resolved, tuple)
    (target,) = resolved
    return AsDesired(target, shard, "", version)


def other(name: str = "a", **meta: str) -> Other:
    """Return what is known of a service that another process wrote."""
    record = observe(our_pod_service(name, **meta), LAB, "")
    assert isinstance(record, Other)
    return record


def read(state: ObservedState, records: dict[str, Observed], **lost_shards: str) -> set[str]:
    """Read everything; return the IDs that the read says nothing of."""
    state.begin_read()
    for service_id, record in records.items():
        state.read(service_id, record)
    return state.finish_read(lost_shards)


def holding(**records: Observed) -> ObservedState:
    """Return a state that was read completely."""
    state = ObservedState()
    read(state, dict(records))
    return state


def test_observed_service_of_a_target_is_made_again_from_it() -> None:
    """The target, the shard and the cluster's UID are the whole record."""
    record = written()
    service = record.service(LAB)
    assert (record.id, record.name, service.index) == ("pod--shop--a", "pod--shop--a", 7)
    assert service == our_pod_service("a", shard_path="s1")
    seen = observe(service, LAB, "")
    assert isinstance(seen, Other)
    assert seen.digest == hash(service)


def test_observed_record_is_reduced_to_what_decisions_need() -> None:
    """Its object, claim, shard, zone and version; the whole record only where it is to be shown."""
    service = replace(
        our_pod_service("a", shard_path="s2", zone="z1", cluster_uid="one", note="by hand"), index=42
    )
    record = observe(service, LAB, "")
    assert record == Other(
        digest=hash(service),
        kind=Kind.POD,
        key=make_pod("a").key,
        claim=Claim.OURS,
        name="pod--shop--a",
        shard="s2",
        cluster_uid="one",
        inherited=Inherited("shop", "node-a", (("zone", "z1"),)),
        version=42,
    )
    shown = observe(service, LAB, "", keep=True)
    assert isinstance(shown, Other)
    assert shown.service == service


def test_observed_record_that_the_catalog_lacks_is_unsynced() -> None:
    """An agent believes that it registered it; its index is no version."""
    record = observe(replace(our_pod_service("a"), index=UNSYNCED), LAB, "")
    assert isinstance(record, Other)
    assert (record.is_unsynced, record.version) == (True, 0)


@pytest.mark.parametrize(
    ("meta", "holder"),
    [
        ({"team": "x"}, "a service without our meta"),
        (
            {"managed_by": "k8s-consul-registrar", "cluster": "other"},
            "managed_by=k8s-consul-registrar, cluster=other",
        ),
    ],
)
def test_observed_foreign_record_says_whose_it_is(meta: dict[str, str], holder: str) -> None:
    """By the meta that tells services apart."""
    assert observe(make_service("pod--shop--a", meta), LAB, "") == Foreign(holder)


def test_observed_record_with_another_cluster_uid_is_foreign() -> None:
    """Its cluster has the same name, or the kubeconfig leads to another cluster."""
    service = our_pod_service("a", cluster_uid="one")
    assert isinstance(observe(service, LAB, "two"), Foreign)
    assert isinstance(observe(service, LAB, "one"), Other)
    assert isinstance(observe(service, LAB, ""), Other)


def test_observed_id_is_absent_only_after_a_complete_read() -> None:
    """Before it a missing ID says nothing."""
    state = ObservedState()
    assert not state.is_absent("a")
    read(state, {"b": FOREIGN})
    assert (state.is_absent("a"), state.is_absent("b")) == (True, False)


def test_observed_read_replaces_everything_at_its_end() -> None:
    """Not before: a read is in part of another time than the rest."""
    state = holding(a=written(), b=other("b"))
    state.begin_read()
    state.read("b", written("b"))
    assert (state.get("a"), state.get("b")) == (written(), other("b"))
    assert state.finish_read() == set()
    assert (state.get("a"), state.get("b"), state.is_absent("a")) == (None, written("b"), True)


def test_observed_read_that_failed_proves_nothing() -> None:
    """Everything stays as it was known, and the first complete read is still to come."""
    state = holding(a=written())
    state.begin_read()
    state.read("b", other("b"))
    state.drop_read()
    assert (state.get("a"), state.get("b"), state.is_absent("c")) == (written(), None, True)
    never = ObservedState()
    never.begin_read()
    never.drop_read()
    assert not never.is_complete


@pytest.mark.parametrize(
    "write",
    [
        lambda state: state.put("a", written(version=9)),
        lambda state: state.put("a", None),
        lambda state: state.doubt("a"),
    ],
    ids=["put", "removed", "doubt"],
)
def test_observed_read_leaves_alone_what_was_written_meanwhile(
    write: Callable[[ObservedState], None],
) -> None:
    """A record of such an ID is older than the known state."""
    state = holding(a=written(), b=written("b"))
    state.begin_read()
    state.read("a", other("a"))
    write(state)
    known = state.get("a")
    state.read("a", other("a"))
    state.read("b", other("b"))
    assert state.finish_read() == {"a"}
    assert (state.get("a"), state.get("b")) == (known, other("b"))


@pytest.mark.parametrize("moment", ["before", "during", "across"])
def test_observed_read_says_nothing_of_writes_in_flight(moment: str) -> None:
    """Begun before the read or during it, ended or not: the record may be of either side of the write."""
    state = holding()
    if moment == "before":
        state.begin_write(["a"])
    state.begin_read()
    if moment != "before":
        state.begin_write(["a"])
    if moment != "across":
        state.end_write(["a"])
    assert state.finish_read() == {"a"}


def test_observed_id_with_a_write_in_flight_is_not_absent() -> None:
    """A service may be there at any moment."""
    state = holding()
    state.begin_write(["a"])
    assert not state.is_absent("a")
    state.end_write(["a"])
    assert state.is_absent("a")


def test_observed_write_before_a_read_does_not_shield_an_id() -> None:
    """Only what was written while the read went on is newer than it."""
    state = holding()
    state.begin_write(["a"])
    state.end_write(["a"])
    state.put("a", written())
    assert read(state, {"a": other("a")}) == set()
    assert state.get("a") == other("a")


def test_observed_doubtful_id_remembers_its_shard() -> None:
    """A write without an answer leaves nothing to rely on but that."""
    state = holding(a=written(shard="s1"))
    state.doubt("a")
    assert (state.get("a"), state.shard("a"), state.is_absent("a")) == (
        Unknown("s1", Inherited("shop", "node-a")),
        "s1",
        False,
    )
    state.doubt("a")
    assert state.shard("a") == "s1"


def test_observed_desired_id_that_turns_out_absent_keeps_its_shard_until_it_is_written() -> None:
    """A rename that was interrupted has removed the record, and its shard is on record nowhere."""
    state = holding(a=written(shard="s1"))
    state.doubt("a")
    state.lose("a")
    assert (state.is_absent("a"), state.shard("a")) == (True, "s1")
    state.lose("a")
    assert state.shard("a") == "s1"


def test_observed_shard_is_recalled_after_its_service_was_lost() -> None:
    """Shards that an agent lost with its data are still in the catalog; those of foreign services do not count."""
    state = ObservedState()
    read(
        state,
        {"b": FOREIGN, "c": other("c"), "d": other("d", shard_path="s4")},
        a="s1",
        b="s2",
        c="s3",
        d="s9",
    )
    assert [state.shard(one) for one in "abcde"] == ["s1", "s2", "s3", "s4", ""]
    state.doubt("a")
    assert state.shard("a") == "s1"
    read(state, {})
    assert [state.shard(one) for one in "ad"] == ["s1", "s4"]
    state.begin_read()
    state.finish_read(is_desired=lambda service_id: service_id != "a")
    assert [state.shard(one) for one in "ad"] == ["", "s4"]


def test_observed_doubtful_id_remembers_the_zone_of_its_node() -> None:
    """Its target may not know the zone, and must not take it away."""
    state = holding(a=other("a", zone="z1"))
    state.doubt("a")
    assert state.get("a") == Unknown("", Inherited("shop", "node-a", (("zone", "z1"),)))
    state.doubt("a")
    assert state.get("a") == Unknown("", Inherited("shop", "node-a", (("zone", "z1"),)))


def test_observed_records_are_found_by_object() -> None:
    """Those that are not known to be as desired: the others are found by what the object asks for."""
    key = make_pod("a").key
    first, second = other("a"), other("a", note="x")
    state = holding(one=first, two=second, three=written("a"), four=other("b"))
    assert state.ids_of(key) == ("one", "two")
    state.put("one", written("a"))
    assert state.ids_of(key) == ("two",)
    state.put("two", None)
    assert state.ids_of(key) == ()
    state.put("four", first)
    assert (state.ids_of(key), state.ids_of(make_pod("b").key)) == (("four",), ())
    read(state, {"five": first})
    assert state.ids_of(key) == ("five",)


def test_observed_counts_follow_every_change() -> None:
    """Services as desired, and others of this registrar."""
    state = holding(a=written(), b=other("b"), c=FOREIGN, d=Unknown())
    assert (state.registered, state.others) == (1, 1)
    state.put("a", None)
    state.put("b", written("b"))
    state.put("c", other("c"))
    assert (state.registered, state.others) == (1, 1)
    state.doubt("b")
    state.doubt("c")
    assert (state.registered, state.others) == (0, 0)
    assert sorted(state.ids()) == ["b", "c", "d"]


def test_observed_state_that_expired_proves_nothing() -> None:
    """Another replica may have written: absent is nothing until everything was read again."""
    state = holding(a=written())
    state.begin_read()
    state.expire()
    assert (state.is_complete, state.is_absent("b")) == (False, False)
    assert state.shard("a") == "s1"
    read(state, {})
    assert state.is_absent("a")


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.put("a", written()),
        lambda state: state.put("a", None),
        lambda state: state.doubt("a"),
        lambda state: read(state, {}),
        lambda state: state.expire(),
    ],
    ids=["put", "removed", "doubt", "read", "expire"],
)
def test_observed_generation_moves_with_every_change(change: Callable[[ObservedState], object]) -> None:
    """Caches of what is shown see by it that something else is there now."""
    state = holding(a=other("a"))
    before = state.generation
    change(state)
    assert state.generation > before


def test_observed_ids_can_be_walked_while_records_change() -> None:
    """A comparison takes turns with writes."""
    state = holding(a=written(), b=FOREIGN)
    for service_id in state.ids():
        state.put(service_id, None)
        state.put(f"new-{service_id}", FOREIGN)
    assert sorted(state.ids()) == ["new-a", "new-b"]


def test_observed_target_is_the_very_value_of_the_store() -> None:
    """A record as desired costs a few words, not a copy of a service."""
    target = Target(ObjectKey(Kind.POD, "shop", "a"), "a", "a", "198.51.100.10", 9102, ())
    state = holding(a=AsDesired(target, "", ""))
    record = state.get("a")
    assert isinstance(record, AsDesired)
    assert record.target is target
