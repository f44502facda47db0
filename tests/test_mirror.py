"""The mirror: what sources ask for, with facts told apart from mere absence, and what changed."""

import asyncio
from collections.abc import Iterable
from typing import Any

import pytest

from builders import make_node, make_pod
from k8s_consul_registrar.kube.known import Verdict
from k8s_consul_registrar.kube.mirror import SLICE, Mirror
from k8s_consul_registrar.kube.objects import Item
from k8s_consul_registrar.model import Kind, ObjectKey, Source, Undecodable
from k8s_consul_registrar.targets.resolve import TargetRules, resolve

PODS, NODES = Source(Kind.POD), Source(Kind.NODE)
NAMELESS = Undecodable(Kind.POD, None, "x")


def verdict(item: Item) -> Verdict | None:
    """Judge as the daemon does."""
    return resolve(item, TargetRules())


def new_mirror() -> Mirror:
    """Return a mirror of Pods and Nodes."""
    return Mirror((PODS, NODES), verdict)


def put_list(mirror: Mirror, source: Source, items: Iterable[Item], at: float = 1.0) -> None:
    """Take in one complete list."""
    mirror.start_listing(source)
    for item in items:
        mirror.put(source, item)
    mirror.finish_listing(source, at)


async def is_woken(mirror: Mirror) -> bool:
    """Tell whether whoever waits for a change is woken, without taking it."""
    try:
        async with asyncio.timeout(0.01):
            await mirror.changed()
    except TimeoutError:
        return False
    return True


def quiet(*pods: Item) -> Mirror:
    """Return a mirror of Pods alone that listed these, all of it taken."""
    mirror = Mirror((PODS,), verdict)
    put_list(mirror, PODS, pods)
    mirror.wanted()
    return mirror


def test_claims_count_at_once_and_absence_at_the_end() -> None:
    """What a list shows is there from that moment on; what it does not show is absent when it is complete."""
    mirror = new_mirror()
    put_list(mirror, PODS, [make_pod("gone")])
    mirror.start_listing(PODS)
    mirror.put(PODS, make_pod("a"))
    wanted = mirror.wanted()
    assert set(wanted.claims) == {"pod--shop--a", "pod--shop--gone"}
    assert wanted.sources[PODS].listed_at == 1.0
    mirror.finish_listing(PODS, 7.0)
    wanted = mirror.wanted()
    assert list(wanted.claims) == ["pod--shop--a"]
    assert wanted.departed == frozenset()
    assert (wanted.sources[PODS].listed_at, wanted.sources[PODS].objects) == (7.0, 1)
    assert wanted.sources[PODS].proves_absence
    assert not wanted.sources[NODES].proves_absence


def test_a_list_that_broke_off_infers_nothing() -> None:
    """The next one begins anew: only what that one does not show is absent."""
    mirror = quiet(make_pod("a"), make_pod("b"))
    mirror.start_listing(PODS)
    mirror.put(PODS, make_pod("a"))
    mirror.put(PODS, NAMELESS)
    mirror.fail(PODS, "broke off")
    mirror.resume(PODS)
    assert not mirror.wanted().sources[PODS].is_followed
    put_list(mirror, PODS, [make_pod("b")], 2.0)
    wanted = mirror.wanted()
    assert list(wanted.claims) == ["pod--shop--b"]
    assert (wanted.sources[PODS].objects, wanted.sources[PODS].proves_absence) == (1, True)


def test_absence_is_no_departure_but_losing_the_annotation_is() -> None:
    """A Pod that is listed without asking has departed; one that is not listed is merely absent."""
    mirror = quiet(make_pod("a"), make_pod("b"), make_pod("c"))
    put_list(mirror, PODS, [make_pod("a"), make_pod("b", annotations={})])
    wanted = mirror.wanted()
    assert list(wanted.claims) == ["pod--shop--a"]
    assert wanted.departed == {make_pod("b").key}
    put_list(mirror, PODS, [make_pod("a"), make_pod("b")])
    assert mirror.wanted().departed == frozenset()


@pytest.mark.parametrize("change", [{"phase": "Succeeded"}, {"annotations": {}}, None])
def test_events_depart_for_a_fact(change: dict[str, Any] | None) -> None:
    """Deleted, finished or no longer annotated: the ID is dirty, nobody claims it, the object departed."""
    mirror = quiet(make_pod("a"))
    if change is None:
        mirror.remove(PODS, make_pod("a"))
    else:
        mirror.put(PODS, make_pod("a", **change), is_added=False)
    changes = mirror.changes()
    assert changes.claims == {"pod--shop--a": ()}
    assert changes.departed == {make_pod("a").key}
    mirror.settled({make_pod("a").key})
    assert mirror.wanted().departed == frozenset()


async def test_what_never_asked_departs_unnoticed() -> None:
    """A cluster's short-lived jobs leave no trace, however many they are."""
    mirror = quiet()
    for number in range(100):
        job = make_pod(f"job-{number}", annotations={})
        mirror.put(PODS, job)
        mirror.remove(PODS, job)
    assert not await is_woken(mirror)
    assert mirror.wanted().departed == frozenset()


async def test_status_noise_is_nothing() -> None:
    """What changes of an object without changing its target wakes nobody."""
    mirror = quiet(make_pod("a"))
    for noise in ({"ready": True}, {"labels": {"x": "y"}}, {"phase": "Unknown"}):
        mirror.put(PODS, make_pod("a", **noise), is_added=False)
    assert not await is_woken(mirror)
    assert mirror.changes().claims == {}


async def test_a_changed_value_is_dirty_once() -> None:
    """Its ID is in the next changes, and in no later ones."""
    mirror = quiet(make_pod("a"), make_pod("b"))
    mirror.put(PODS, make_pod("a", ip="198.51.100.99"), is_added=False)
    assert await is_woken(mirror)
    assert not mirror.needs_full_pass()
    ((service_id, (target,)),) = mirror.changes().claims.items()
    assert (service_id, target.address) == ("pod--shop--a", "198.51.100.99")
    assert not await is_woken(mirror)
    assert mirror.changes().claims == {}


def test_a_relist_without_news_makes_nothing_dirty() -> None:
    """It asks for a full pass, as each complete list does, and changes no value."""
    mirror = quiet(make_pod("a"), make_pod("b", ip=""))
    put_list(mirror, PODS, [make_pod("a"), make_pod("b", ip="")])
    assert mirror.needs_full_pass()
    assert mirror.changes().claims == {}
    mirror.wanted()
    assert not mirror.needs_full_pass()


def test_another_uid_under_the_same_name_is_another_target() -> None:
    """Even where the deletion in between was missed; and the departure of the old one is taken back."""
    mirror = quiet(make_pod("a", uid="old"))
    mirror.put(PODS, make_pod("a", uid="new"))
    assert list(mirror.changes().claims) == ["pod--shop--a"]
    mirror.remove(PODS, make_pod("a", uid="new"))
    mirror.put(PODS, make_pod("a", uid="newer"))
    changes = mirror.changes()
    assert changes.departed == frozenset()
    assert len(changes.claims["pod--shop--a"]) == 1


def test_failure_keeps_what_was_known_until_the_source_is_followed_again() -> None:
    """Its targets stay and its absences prove nothing, until it is resumed or listed."""
    mirror = quiet(make_pod("a"))
    mirror.fail(PODS, "403")
    assert mirror.needs_full_pass()
    wanted = mirror.wanted()
    assert list(wanted.claims) == ["pod--shop--a"]
    state = wanted.sources[PODS]
    assert (state.proves_absence, state.problem, state.listed_at) == (False, "403", 1.0)
    mirror.resume(PODS)
    assert mirror.needs_full_pass()
    state = mirror.wanted().sources[PODS]
    assert (state.proves_absence, state.problem, state.listed_at) == (True, "", 1.0)
    mirror.resume(PODS)
    assert not mirror.needs_full_pass()


def test_nothing_is_resumed_that_was_never_listed() -> None:
    """A watch alone proves no absence."""
    mirror = new_mirror()
    mirror.fail(PODS, "x")
    mirror.resume(PODS)
    assert not mirror.wanted().sources[PODS].is_followed


def test_rejections_come_and_go() -> None:
    """A rejection is kept by object, its ID is dirty, and it vanishes with its object."""
    mirror = quiet(make_pod("a"))
    odd = Undecodable(Kind.POD, ObjectKey(Kind.POD, "shop", "a"), "x")
    mirror.put(PODS, odd, is_added=False)
    changes = mirror.changes()
    assert changes.claims == {"pod--shop--a": ()}
    assert set(changes.rejections) == {odd.key}
    assert changes.departed == frozenset()
    mirror.remove(PODS, odd)
    after = mirror.changes()
    assert after.claims == {"pod--shop--a": ()}
    assert after.rejections == {}
    assert set(changes.rejections) == {odd.key}
    put_list(mirror, PODS, [make_pod("b", ip="")])
    put_list(mirror, PODS, [])
    assert mirror.wanted().rejections == {}


@pytest.mark.parametrize("is_deleted", [False, True])
def test_something_nameless_makes_its_source_opaque_until_the_next_list(is_deleted: bool) -> None:
    """By an event as by a list; others are not touched, and a list without such ends it."""
    mirror = quiet(make_pod("a"))
    if is_deleted:
        mirror.remove(PODS, NAMELESS)
    else:
        mirror.put(PODS, NAMELESS)
    assert mirror.needs_full_pass()
    assert mirror.is_opaque(PODS)
    assert not mirror.wanted().sources[PODS].proves_absence
    put_list(mirror, PODS, [make_pod("a"), NAMELESS])
    assert not mirror.wanted().sources[PODS].proves_absence
    put_list(mirror, PODS, [make_pod("a")])
    assert mirror.wanted().sources[PODS].proves_absence
    assert not mirror.is_opaque(PODS)


def test_objects_are_counted_as_they_come_and_go() -> None:
    """Those that ask for nothing included; while a list arrives the count stays that of before."""
    mirror = quiet(make_pod("a"), make_pod("b", annotations={}))
    mirror.put(PODS, make_pod("c"))
    mirror.put(PODS, make_pod("c", ip="198.51.100.1"), is_added=False)
    mirror.remove(PODS, make_pod("b", annotations={}))
    mirror.put(PODS, make_pod("d"))
    assert mirror.wanted().sources[PODS].objects == 3
    mirror.start_listing(PODS)
    mirror.put(PODS, make_pod("a"))
    mirror.put(PODS, make_pod("c"))
    mirror.remove(PODS, make_pod("c"))
    assert mirror.wanted().sources[PODS].objects == 3
    mirror.finish_listing(PODS, 2.0)
    assert mirror.wanted().sources[PODS].objects == 1


def test_shared_ids_are_kept_side_by_side() -> None:
    """Two Pods that ask for one ID are both known, and one leaves the other in place."""
    first, second = make_pod("b--c", "a"), make_pod("c", "a--b")
    mirror = quiet(first, second)
    assert len(mirror.wanted().claims["pod--a--b--c"]) == 2
    mirror.remove(PODS, first)
    assert [target.key for target in mirror.changes().claims["pod--a--b--c"]] == [second.key]


def test_what_was_handed_out_does_not_change() -> None:
    """Later changes do not touch a value."""
    mirror = quiet(make_pod("a"), make_pod("odd", ip=""))
    before = mirror.wanted()
    mirror.put(PODS, make_pod("b"))
    changes = mirror.changes()
    put_list(mirror, PODS, [])
    assert list(before.claims) == ["pod--shop--a"]
    assert [key.name for key in before.rejections] == ["odd"]
    assert list(changes.claims) == ["pod--shop--b"]


def test_a_start_waits_for_every_source_before_it_compares_everything() -> None:
    """A full pass is asked for once each source was listed or has failed, not after the first of them."""
    mirror = new_mirror()
    put_list(mirror, NODES, [])
    assert not mirror.needs_full_pass()
    mirror.fail(PODS, "403")
    assert mirror.needs_full_pass()


def test_changes_may_be_asked_for_again() -> None:
    """Service IDs that a pass did not get through are shown with what is new."""
    mirror = quiet(make_pod("a"))
    again = mirror.changes(frozenset({"pod--shop--a", "pod--shop--gone"}))
    assert {service_id: len(claims) for service_id, claims in again.claims.items()} == {
        "pod--shop--a": 1,
        "pod--shop--gone": 0,
    }


async def test_changes_wake() -> None:
    """A list, a failure and a cluster UID wake whoever waits; the same again does not."""
    mirror = Mirror((NODES,), verdict)

    async def has_changed() -> bool:
        woken = await is_woken(mirror)
        assert woken == mirror.needs_full_pass()
        mirror.wanted()
        return woken

    assert not await has_changed()
    put_list(mirror, NODES, [make_node()])
    assert await has_changed()
    mirror.fail(NODES, "x")
    assert await has_changed()
    mirror.fail(NODES, "x")
    assert not await has_changed()
    mirror.learn_cluster_uid("uid")
    assert await has_changed()
    assert mirror.wanted().cluster_uid == "uid"
    mirror.learn_cluster_uid("")
    mirror.learn_cluster_uid("uid")
    assert not await has_changed()


@pytest.mark.parametrize("kind", list(Kind))
def test_two_kinds_do_not_mix(kind: Kind) -> None:
    """A list of one kind leaves the other as it was."""
    mirror = new_mirror()
    put_list(mirror, PODS, [make_pod("a")])
    put_list(mirror, NODES, [make_node()])
    put_list(mirror, Source(kind), [])
    (left,) = mirror.wanted().claims
    assert left.startswith("node" if kind is Kind.POD else "pod")


def test_many_absences_neither_stall_the_loop_nor_show_in_part() -> None:
    """Whoever looks while they are taken in sees a source that proves nothing."""
    mirror = quiet(*(make_pod(f"p-{number}") for number in range(3 * SLICE)))
    mirror.start_listing(PODS)
    left = []
    while mirror.infer_absences(PODS):
        wanted = mirror.wanted()
        left.append(len(wanted.claims))
        assert not wanted.sources[PODS].proves_absence
    assert left == [2 * SLICE, SLICE]
    mirror.finish_listing(PODS, 2.0)
    wanted = mirror.wanted()
    assert (len(wanted.claims), wanted.sources[PODS].proves_absence) == (0, True)


def test_few_absences_are_taken_in_at_once() -> None:
    """A source does not blink for them."""
    mirror = quiet(*(make_pod(f"p-{number}") for number in range(SLICE)))
    mirror.start_listing(PODS)
    assert not mirror.infer_absences(PODS)
    wanted = mirror.wanted()
    assert (len(wanted.claims), wanted.sources[PODS].proves_absence) == (SLICE, True)


def test_equal_parts_of_targets_are_one_object_in_memory() -> None:
    """Pairs of meta are shared between targets, and one claim is the very tuple of its verdict."""
    mirror = quiet(make_pod("a"), make_pod("b"))
    (first,), (second,) = mirror.wanted().claims.values()
    shared = [one is other for one, other in zip(first.meta, second.meta, strict=True) if one == other]
    assert shared == [True] * 5
    known = mirror._known[PODS].verdicts
    assert mirror.wanted().claims[first.id] is known[first.key]
