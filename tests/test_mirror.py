"""The mirror: what sources ask for, with facts told apart from mere absence."""

import asyncio
from collections.abc import Iterable

import pytest

from builders import make_node, make_pod
from k8s_consul_registrar.kube.mirror import Mirror, Verdict
from k8s_consul_registrar.kube.objects import Item
from k8s_consul_registrar.model import Kind, ObjectKey, Source, Undecodable
from k8s_consul_registrar.targets.targets import TargetRules, judge

PODS, NODES = Source(Kind.POD), Source(Kind.NODE)


def verdict(item: Item) -> Verdict | None:
    """Judge as the daemon does."""
    return judge(item, TargetRules())


def new_mirror() -> Mirror:
    """Return a mirror of Pods and Nodes."""
    return Mirror((PODS, NODES), verdict)


def put_list(mirror: Mirror, source: Source, items: Iterable[Item], at: float = 1.0) -> None:
    """Take in one complete list."""
    listing = mirror.start_listing()
    mirror.add_page(source, listing, items)
    mirror.finish_listing(source, listing, at)


def test_a_list_counts_only_when_complete() -> None:
    """Pages that arrived change nothing until the last one has."""
    mirror = new_mirror()
    listing = mirror.start_listing()
    mirror.add_page(PODS, listing, [make_pod("a")])
    assert mirror.wanted().claims == {}
    assert mirror.wanted().sources[PODS].listed_at is None
    mirror.finish_listing(PODS, listing, 7.0)
    wanted = mirror.wanted()
    assert list(wanted.claims) == ["pod--shop--a"]
    assert wanted.sources[PODS].proves_absence
    assert (wanted.sources[PODS].listed_at, wanted.sources[PODS].objects) == (7.0, 1)
    assert not wanted.sources[NODES].proves_absence


def test_absence_is_no_departure_but_losing_the_annotation_is() -> None:
    """A Pod that is listed without asking has departed; one that is not listed is merely absent."""
    mirror = new_mirror()
    put_list(mirror, PODS, [make_pod("a"), make_pod("b"), make_pod("c")])
    put_list(mirror, PODS, [make_pod("a"), make_pod("b", annotations={})])
    wanted = mirror.wanted()
    assert list(wanted.claims) == ["pod--shop--a"]
    assert wanted.departed == {make_pod("b").key}
    put_list(mirror, PODS, [make_pod("a"), make_pod("b")])
    assert mirror.wanted().departed == frozenset()


def test_finished_pod_has_departed() -> None:
    """A Pod that left Running has departed: its IP may be another's."""
    mirror = new_mirror()
    put_list(mirror, PODS, [make_pod("a")])
    put_list(mirror, PODS, [make_pod("a", phase="Succeeded")])
    assert mirror.wanted().departed == {make_pod("a").key}
    mirror.settled({make_pod("a").key})
    assert mirror.wanted().departed == frozenset()


def test_failure_keeps_what_was_known() -> None:
    """A source that cannot be read keeps its targets and stops proving absences."""
    mirror = new_mirror()
    put_list(mirror, PODS, [make_pod("a")])
    mirror.fail(PODS, "403")
    wanted = mirror.wanted()
    assert list(wanted.claims) == ["pod--shop--a"]
    state = wanted.sources[PODS]
    assert (state.proves_absence, state.problem, state.listed_at) == (False, "403", 1.0)
    put_list(mirror, PODS, [], 2.0)
    assert mirror.wanted().sources[PODS].proves_absence


def test_rejections_and_unreadable_items() -> None:
    """A rejection is kept by object; an item without a name makes the whole source opaque."""
    mirror = new_mirror()
    key = ObjectKey(Kind.POD, "shop", "odd")
    put_list(mirror, PODS, [make_pod("a", ip=""), Undecodable(Kind.POD, key, "x")])
    wanted = mirror.wanted()
    assert set(wanted.rejections) == {make_pod("a").key, key}
    assert wanted.sources[PODS].proves_absence
    put_list(mirror, PODS, [Undecodable(Kind.POD, None, "x")])
    assert not mirror.wanted().sources[PODS].proves_absence


def test_shared_ids_are_kept_side_by_side() -> None:
    """Two Pods that ask for one ID are both known, and one leaves the other in place."""
    mirror = new_mirror()
    first, second = make_pod("b--c", "a"), make_pod("c", "a--b")
    put_list(mirror, PODS, [first, second])
    assert len(mirror.wanted().claims["pod--a--b--c"]) == 2
    put_list(mirror, PODS, [second])
    assert [target.key for target in mirror.wanted().claims["pod--a--b--c"]] == [second.key]


def test_wanted_is_a_value() -> None:
    """Later changes do not touch what was handed out."""
    mirror = new_mirror()
    put_list(mirror, PODS, [make_pod("a")])
    before = mirror.wanted()
    put_list(mirror, PODS, [make_pod("b")])
    assert list(before.claims) == ["pod--shop--a"]


async def test_changes_wake() -> None:
    """A list, a failure and a cluster UID wake whoever waits; the same again does not."""
    mirror = new_mirror()

    async def has_changed() -> bool:
        try:
            async with asyncio.timeout(0.01):
                await mirror.changed()
        except TimeoutError:
            return False
        mirror.wanted()
        return True

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
