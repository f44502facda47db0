"""The running controller: changes of the cluster reach Consul, and nothing else does."""

import asyncio
import dataclasses

import pytest
from msgspec.structs import replace

from k8s_consul_registrar.model import Node
from support.builders import annotated, make_node, make_pod, our_pod_service
from support.controller_lab import ControllerLab
from support.memory import NODES
from support.scripted import QUICK

on_both = pytest.mark.parametrize("checks_versions", [True, False], ids=["catalog", "agent"])


def renumbered(node: Node, address: str) -> Node:
    """Return a Node with another address."""
    return make_node(node.name, ("InternalIP", address))


@on_both
async def test_lists_that_follow_each_other_are_followed(checks_versions: bool) -> None:
    """New Pods are registered, changed ones updated and missing ones deregistered, as lists complete."""
    lab = ControllerLab(checks_versions=checks_versions)
    async with lab.running():
        await lab.synced("a", "b")
        lab.cluster.put_list([make_pod("b", ip="198.51.100.77")])
        await lab.until("b")
        await lab.until_so(lambda: lab.consul.held["pod--shop--b"].address == "198.51.100.77")
    assert lab.status.readiness() == ""
    assert lab.value("writes_total", verb="deregister", outcome="success") == 1
    assert lab.value("internal_errors_total") == 0


@on_both
async def test_events_after_the_first_sync_cost_no_full_read(checks_versions: bool) -> None:
    """Additions, changes, deletions and lost annotations are written by ID; an agent is looked at before."""
    lab = ControllerLab(checks_versions=checks_versions)
    async with lab.running():
        await lab.synced("a", "b")
        reads, lookups = lab.consul.reads, len(lab.consul.lookups)
        lab.cluster.put(make_pod("c"))
        await lab.until("a", "b", "c")
        lab.cluster.put(make_pod("c", ip="198.51.100.99"))
        await lab.until_so(lambda: lab.consul.held["pod--shop--c"].address == "198.51.100.99")
        lab.cluster.remove(make_pod("a"))
        lab.cluster.put(make_pod("b", annotations={}))
        await lab.until("c")
        await lab.until_so(lambda: lab.desired.departures == 0)
    assert lab.consul.reads == reads
    assert (len(lab.consul.lookups) > lookups) is not checks_versions


async def test_events_that_touch_no_target_cause_no_traffic() -> None:
    """A Pod that changes in ways no service shows is nothing to Consul."""
    lab = ControllerLab()
    async with lab.running():
        await lab.synced("a")
        before = (len(lab.consul.writes), lab.consul.reads, len(lab.consul.lookups))
        for number in range(20):
            lab.cluster.put(make_pod("a", ready=True, host_ip=f"192.0.2.{number}"))
            await asyncio.sleep(0.002)
        lab.cluster.put(make_pod("b"))
        await lab.until("a", "b")
    assert (len(lab.consul.writes), lab.consul.reads, len(lab.consul.lookups)) == (
        before[0] + 1,
        *before[1:],
    )


@on_both
@pytest.mark.parametrize(
    ("before", "after", "kept"),
    [
        (annotated(port="8080,8081,8082"), annotated(port="8080"), {"8080"}),
        (annotated(port="8080,8081"), annotated(port="9090,9091"), {"9090", "9091"}),
        (annotated(port="8080,8081,8082"), annotated(port="8082,8081"), {"8081", "8082"}),
    ],
    ids=["fewer ports", "other ports", "one port fewer"],
)
async def test_ports_that_a_living_pod_drops_go_like_any_change(
    checks_versions: bool, before: dict[str, str], after: dict[str, str], kept: set[str]
) -> None:
    """The service of a port that is no longer asked for goes at once, without a resync."""
    lab = ControllerLab(checks_versions=checks_versions)
    lab.cluster.put_list([make_pod("a", annotations=before)])
    async with lab.running():
        await lab.until_so(lambda: lab.status.has_synced)
        reads = lab.consul.reads
        lab.cluster.put(make_pod("a", annotations=after))
        await lab.until_so(lambda: {str(one.port) for one in lab.consul.held.values()} == kept)
        await lab.until_so(lambda: lab.desired.departures == 0)
    assert lab.consul.reads == reads
    assert lab.value("brake_held_services") == 0
    assert lab.cluster.reads == []


@on_both
@pytest.mark.parametrize("count", [1, 6])
@pytest.mark.parametrize("by_list", [False, True], ids=["event", "list"])
async def test_nodes_that_are_renumbered_lose_their_old_service(
    checks_versions: bool, count: int, by_list: bool
) -> None:
    """Even all at once they are never missing from a list: each is there and asks for another ID."""
    lab = ControllerLab(checks_versions=checks_versions, sources=(NODES,))
    nodes = [make_node(f"n{number}", ("InternalIP", f"192.0.2.{number}")) for number in range(count)]
    lab.cluster.put_list(nodes, NODES)
    async with lab.running():
        await lab.until_so(lambda: lab.status.has_synced and len(lab.consul.held) == count)
        moved = [renumbered(node, f"192.0.2.{100 + number}") for number, node in enumerate(nodes)]
        if by_list:
            lab.cluster.put_list(moved, NODES)
        else:
            for node in moved:
                lab.cluster.put(node)
        expected = {f"node--192.0.2.{100 + number}" for number in range(count)}
        await lab.until_so(lambda: set(lab.consul.held) == expected)
        await lab.until_so(lambda: lab.desired.departures == 0)
    assert lab.value("brake_held_services") == 0
    verbs = [verb for verb, _ in lab.consul.writes[-2 * count :]]
    assert verbs.count("deregister") == count


@on_both
async def test_nodes_that_swap_addresses_keep_both_services(checks_versions: bool) -> None:
    """An ID that one object drops and another asks for changes hands, and is never removed."""
    lab = ControllerLab(checks_versions=checks_versions, sources=(NODES,))
    first, second = make_node("a", ("InternalIP", "192.0.2.1")), make_node("b", ("InternalIP", "192.0.2.2"))
    lab.cluster.put_list([first, second], NODES)
    async with lab.running():
        await lab.until_so(lambda: lab.status.has_synced and len(lab.consul.held) == 2)
        lab.cluster.put(renumbered(first, "192.0.2.2"))
        lab.cluster.put(renumbered(second, "192.0.2.1"))
        held = lab.consul.held
        await lab.until_so(
            lambda: (
                held["node--192.0.2.1"].value("node") == "b" and held["node--192.0.2.2"].value("node") == "a"
            )
        )
        await lab.resynced()
    assert set(lab.consul.held) == {"node--192.0.2.1", "node--192.0.2.2"}
    assert all(verb == "register" for verb, _ in lab.consul.writes)


@on_both
async def test_removals_of_an_object_follow_its_registrations(checks_versions: bool) -> None:
    """A renumbered Node never has no service: the new one is written before the old one goes."""
    lab = ControllerLab(checks_versions=checks_versions, sources=(NODES,))
    node = make_node("a", ("InternalIP", "192.0.2.1"))
    lab.cluster.put_list([node], NODES)
    async with lab.running():
        await lab.until_so(lambda: lab.status.has_synced and len(lab.consul.held) == 1)
        lab.consul.write_seconds = 0.02
        lab.cluster.put(renumbered(node, "192.0.2.2"))
        await lab.until_so(lambda: set(lab.consul.held) == {"node--192.0.2.2"})
    assert lab.consul.writes[1:] == [("register", "node--192.0.2.2"), ("deregister", "node--192.0.2.1")]


@on_both
async def test_object_that_flaps_does_not_starve_others(checks_versions: bool) -> None:
    """One Pod that changes 50 times a second is written now and then, and a new Pod is written at once."""
    lab = ControllerLab(checks_versions=checks_versions)
    async with lab.running():
        await lab.synced("hot")
        written = len(lab.consul.writes)
        flaps = 0

        async def flap() -> None:
            nonlocal flaps
            while True:
                flaps += 1
                lab.cluster.put(make_pod("hot", ip=f"10.0.{flaps // 250 % 250}.{flaps % 250}"))
                await asyncio.sleep(0.02)

        flapping = asyncio.create_task(flap())
        for number in range(5):
            lab.cluster.put(make_pod(f"n{number}"))
            await lab.until_so(lambda: f"n{number}" in lab.names_held)  # noqa: B023 - awaited in the turn
            await asyncio.sleep(0.05)
        flapping.cancel()
        final = f"10.0.{flaps // 250 % 250}.{flaps % 250}"
        await lab.until_so(lambda: lab.consul.held["pod--shop--hot"].address == final)
    hot = lab.consul.writes[written:].count(("register", "pod--shop--hot"))
    assert hot <= flaps
    assert lab.queue.in_flight == 0


async def test_flapping_object_is_written_at_most_once_an_interval() -> None:
    """Two writes of one ID are at least the interval apart, and the last state is written in the end."""
    lab = ControllerLab(timing=dataclasses.replace(QUICK, write_interval=0.3))
    async with lab.running():
        await lab.synced("hot")
        written = len(lab.consul.writes)
        started = asyncio.get_running_loop().time()
        for number in range(40):
            lab.cluster.put(make_pod("hot", ip=f"10.0.0.{number}"))
            await asyncio.sleep(0.01)
        await lab.until_so(lambda: lab.consul.held["pod--shop--hot"].address == "10.0.0.39")
        seconds = asyncio.get_running_loop().time() - started
    assert len(lab.consul.writes) - written <= seconds / 0.3 + 1


@on_both
async def test_lag_of_events_is_counted_once_written(checks_versions: bool) -> None:
    """Each service that an event led to counts once, from the event to the write; a list does not count."""
    lab = ControllerLab(checks_versions=checks_versions)
    async with lab.running():
        await lab.synced("a", "b")
        assert lab.value("event_lag_seconds_count") == 0
        lab.cluster.put(make_pod("c"))
        lab.cluster.remove(make_pod("a"))
        await lab.until_so(lambda: lab.value("event_lag_seconds_count") == 2)
        lab.consul.refused = {"pod--shop--slow"}
        lab.cluster.put(make_pod("slow"))
        lab.cluster.put(make_pod("x", ip=""))
        await lab.until_so(lambda: "pod--shop--slow" in lab.status.refused)
        await asyncio.sleep(0.2)
        assert lab.value("event_lag_seconds_count") == 2
        lab.consul.refused.clear()
        await lab.until_so(lambda: lab.value("event_lag_seconds_count") == 3)
        assert lab.value("event_lag_seconds_sum") >= 0.2


async def test_lag_counts_from_the_first_of_several_events() -> None:
    """A service that changed again before it was written waits since its first change."""
    lab = ControllerLab()
    async with lab.running():
        await lab.synced("a")
        lab.consul.is_down = True
        lab.cluster.put(make_pod("b"))
        await lab.until_so(lambda: lab.value("consul_up") == 0)
        await asyncio.sleep(0.2)
        lab.cluster.put(make_pod("b", ip="10.1.1.1"))
        lab.consul.is_down = False
        await lab.until_so(lambda: lab.value("event_lag_seconds_count") == 1)
    assert lab.value("event_lag_seconds_sum") >= 0.2


@on_both
async def test_id_that_another_took_is_not_removed_with_its_pod(checks_versions: bool) -> None:
    """A Pod goes whose service another cluster overwrote: that service stays."""
    lab = ControllerLab(checks_versions=checks_versions)
    async with lab.running():
        await lab.synced("a", "b")
        lab.consul.put_by_hand(our_pod_service("b", cluster="other"), is_noticed=False)
        lab.cluster.remove(make_pod("b"))
        lab.cluster.remove(make_pod("a"))
        await lab.until("b")
        await lab.until_so(lambda: lab.desired.departures == 0)
    assert lab.consul.held["pod--shop--b"].value("cluster") == "other"


@on_both
async def test_service_edited_before_its_pod_changes_is_still_updated(checks_versions: bool) -> None:
    """A service that was edited by hand unnoticed is looked up, and written over, by the next change."""
    lab = ControllerLab(checks_versions=checks_versions)
    async with lab.running():
        await lab.synced("a")
        edited = replace(lab.consul.held["pod--shop--a"], port=1)
        lab.consul.put_by_hand(edited, is_noticed=False)
        lab.cluster.put(make_pod("a", ip="10.1.1.1"))
        await lab.until_so(
            lambda: (
                (lab.consul.held["pod--shop--a"].address, lab.consul.held["pod--shop--a"].port)
                == ("10.1.1.1", 9102)
            )
        )
