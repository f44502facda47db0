"""Records that others write: conflicts, contests between writers of one identity, IDs and names that are taken."""

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest
import structlog

from k8s_consul_registrar.model import Kind, Service
from k8s_consul_registrar.registrar.schedule import ScheduleRules
from k8s_consul_registrar.targets.resolve import TargetRules
from k8s_consul_registrar.targets.service_names import parse_name
from support.builders import annotated, make_node, make_pod, make_service, our_pod_service
from support.controller_lab import ControllerLab
from support.memory import NODES
from support.scripted import QUICK

on_both = pytest.mark.parametrize("checks_versions", [True, False], ids=["catalog", "agent"])
WEB = "pod--shop--a"


def theirs(name: str = "a") -> Service:
    """Return what another cluster's registrar wrote under a Pod's ID."""
    return our_pod_service(name, cluster="other")


@on_both
async def test_conflicts_come_and_go(checks_versions: bool) -> None:
    """An ID that belongs to something else is reported and left alone; it is taken once it is free."""
    lab = ControllerLab(checks_versions=checks_versions)
    lab.consul.put_by_hand(theirs())
    with structlog.testing.capture_logs() as lines:
        async with lab.running():
            lab.cluster.put_list([make_pod("a"), make_pod("b")])
            await lab.until("a", "b")
            await lab.until_so(lambda: lab.value("conflicts") == 1)
            await lab.resynced()
            assert lab.consul.held[WEB].value("cluster") == "other"
            assert set(lab.status.conflicts) == {WEB}
            lab.consul.remove_by_hand(WEB)
            await lab.until_so(lambda: WEB in lab.consul.held)
            await lab.until_so(lambda: lab.value("conflicts") == 0)
            assert lab.consul.held[WEB].value("cluster") == "lab"
            lab.consul.put_by_hand(theirs())
            await lab.until_so(lambda: lab.value("conflicts") == 1)
            lab.cluster.remove(make_pod("a"))
            await lab.until_so(lambda: lab.value("conflicts") == 0)
            await lab.resynced()
    assert lab.consul.held[WEB].value("cluster") == "other"
    assert len([line for line in lines if line["event"].startswith("conflict")]) == 2


@on_both
async def test_conflict_is_over_once_the_service_is_as_desired(checks_versions: bool) -> None:
    """Another writer may put it right: then nothing is written, and the conflict is no longer reported."""
    lab = ControllerLab(checks_versions=checks_versions)
    lab.consul.put_by_hand(theirs())
    async with lab.running():
        lab.cluster.put_list([make_pod("a")])
        await lab.until_so(lambda: lab.value("conflicts") == 1)
        lab.consul.put_by_hand(our_pod_service("a"))
        await lab.until_so(lambda: lab.value("conflicts") == 0)
        await lab.resynced()
        assert (lab.status.conflicts, lab.observed.registered) == ({}, 1)
    assert lab.consul.writes == []


@on_both
async def test_service_registered_between_read_and_write_is_not_overwritten(
    checks_versions: bool,
) -> None:
    """The catalog compares versions; an agent is looked at immediately before the write."""
    lab = ControllerLab(checks_versions=checks_versions)
    async with lab.running():
        await lab.until_so(lambda: lab.observed.is_complete)
        lab.consul.put_by_hand(theirs("p4"), is_noticed=False)
        lab.cluster.put_list([make_pod(f"p{number}") for number in range(5)])
        await lab.until_so(lambda: len(lab.consul.held) == 5 and bool(lab.status.conflicts))
        await lab.until_so(lambda: lab.status.has_synced)
        lab.consul.put_by_hand(theirs("q"), is_noticed=False)
        lab.cluster.put(make_pod("q"))
        await lab.until_so(lambda: len(lab.status.conflicts) == 2)
    for name in ("p4", "q"):
        assert lab.consul.held[f"pod--shop--{name}"].value("cluster") == "other"
        assert ("register", f"pod--shop--{name}") not in lab.consul.writes


@on_both
async def test_repair_does_not_overwrite_what_came_after_the_read(checks_versions: bool) -> None:
    """A resync finds a difference; before the write another cluster takes the ID."""
    lab = ControllerLab(checks_versions=checks_versions)
    lookup, is_due = lab.consul.lookup, False

    def meddle() -> None:
        nonlocal is_due
        if is_due:
            is_due = False
            lab.consul.put_by_hand(theirs(), is_noticed=False)

    def look(ids: Sequence[str]) -> AsyncIterator[Service]:
        meddle()
        return lookup(ids)

    if checks_versions:
        lab.consul.before_write = meddle
    else:
        lab.consul.lookup = look  # type: ignore[method-assign] # the last moment that an agent can show
    async with lab.running():
        await lab.synced("a", "b")
        is_due = True
        lab.consul.put_by_hand(our_pod_service("a", note="x"))
        await lab.until_so(lambda: WEB in lab.status.conflicts)
    assert lab.consul.held[WEB].value("cluster") == "other"


def rival(note: str) -> Service:
    """Return what another writer with this registrar's identity makes of a service."""
    return our_pod_service("a", note=note)


@on_both
async def test_two_writers_of_one_identity_are_reported_and_not_fought(checks_versions: bool) -> None:
    """The first change is repaired, the second is left alone, and a quiet period ends it."""
    schedule = ScheduleRules(period=600, probe=QUICK.probe, gap=0)
    lab = ControllerLab(checks_versions=checks_versions, schedule=schedule)
    with structlog.testing.capture_logs() as lines:
        async with lab.running():
            await lab.synced("a", "b")
            lab.consul.put_by_hand(rival("first"))
            await lab.until_so(lambda: lab.consul.held[WEB].value("note") == "")
            lab.consul.put_by_hand(rival("second"))
            await lab.until_so(lambda: WEB in lab.status.conflicts)
            writes = len(lab.consul.writes)
            for number in range(5):
                lab.consul.put_by_hand(rival(f"{number}"))
                await lab.resynced()
            assert lab.consul.held[WEB].value("note") == "4"
            assert len(lab.consul.writes) == writes
            assert "another writer" in lab.status.conflicts[WEB].holder
            # Everything else is written meanwhile.
            lab.cluster.put(make_pod("c"))
            await lab.until("a", "b", "c")
            lab.clock.skip(601)
            await lab.until_so(lambda: lab.consul.held[WEB].value("note") == "")
            await lab.until_so(lambda: not lab.status.conflicts)
    assert [line["service"] for line in lines if line["event"].startswith("conflict")] == [WEB]
    assert lab.value("internal_errors_total") == 0


@on_both
async def test_hand_that_edits_now_and_then_is_always_repaired(checks_versions: bool) -> None:
    """Changes a quiet period apart are accidents, not a writer."""
    schedule = ScheduleRules(period=50, probe=QUICK.probe, gap=0)
    lab = ControllerLab(checks_versions=checks_versions, schedule=schedule)
    async with lab.running():
        await lab.synced("a")
        for number in range(4):
            lab.consul.put_by_hand(rival(f"{number}"))
            await lab.until_so(lambda: lab.consul.held[WEB].value("note") == "")
            lab.clock.skip(51)
            await lab.resynced()
    assert lab.status.conflicts == {}


@on_both
async def test_loser_of_an_id_is_reported_and_gets_it_when_the_winner_goes(checks_versions: bool) -> None:
    """Two Nodes with one address: the older has the ID, the other is rejected until then."""
    lab = ControllerLab(checks_versions=checks_versions, sources=(NODES,))
    first = make_node("first", created="2026-11-22T10:00:00Z")
    second = make_node("second", created="2026-11-22T11:00:00Z")
    lab.cluster.put_list([first, second], NODES)
    async with lab.running():
        await lab.until_so(lambda: bool(lab.status.lost))
        assert [(one.key.name, one.reason) for one in lab.status.lost_rejections()] == [
            ("second", "address_taken")
        ]
        lab.cluster.remove(first)
        await lab.until_so(lambda: lab.consul.held["node--192.0.2.10"].value("node") == "second")
        await lab.until_so(lambda: not lab.status.lost)
    assert [verb for verb, _ in lab.consul.writes] == ["register", "register"]


@on_both
async def test_pod_whose_id_another_pod_holds_is_reported(checks_versions: bool) -> None:
    """Two Pods that ask for one ID: the one that holds it keeps it, and the other is named."""
    lab = ControllerLab(checks_versions=checks_versions)
    # The service of the second port of Pod `a` has the ID of a Pod named `a--2`.
    both, other = make_pod("a", annotations=annotated(port="1,2")), make_pod("a--2")
    lab.cluster.put_list([both])
    async with lab.running():
        await lab.until_so(lambda: lab.status.has_synced)
        lab.cluster.put(other)
        await lab.until_so(lambda: bool(lab.status.lost))
        assert [one.key.name for one in lab.status.lost_rejections()] == ["a--2"]
        lab.cluster.remove(both)
        await lab.until_so(lambda: not lab.status.lost)
        assert lab.consul.held["pod--shop--a--2"].value("pod") == "a--2"


@on_both
async def test_name_from_a_label_is_checked_in_the_whole_catalog(checks_versions: bool) -> None:
    """A Pod does not join a service that no registrar wrote, wherever in the catalog that is."""
    rules = TargetRules(pod_name=parse_name("lab-{label:app}", Kind.POD))
    lab = ControllerLab(checks_versions=checks_versions, checked_names=True, target_rules=rules)
    lab.consul.taken_names = {"lab-payments"}
    evil = make_pod("evil", labels={"app": "payments"})
    good = [make_pod(f"g{number}", labels={"app": "web"}) for number in range(5)]
    async with lab.running():
        lab.cluster.put_list([evil, *good])
        await lab.until(*(pod.name for pod in good))
        await lab.until_so(lambda: bool(lab.status.lost))
        assert [one.reason for one in lab.status.lost_rejections()] == ["name_taken"]
        assert sorted(lab.consul.names_checked) == ["lab-payments", "lab-web"], "each name once"
        # A Pod that has a name already and is moved to a taken one keeps the one it has.
        lab.cluster.put(make_pod("g0", labels={"app": "payments"}))
        await lab.until_so(lambda: len(lab.status.lost) == 2)
        assert lab.consul.held["pod--shop--g0"].name == "lab-web"
        # The next resync forgets the answers.
        lab.consul.taken_names = set()
        await lab.resynced()
        await lab.until("evil", *(pod.name for pod in good))
        await lab.until_so(lambda: not lab.status.lost)
    assert lab.consul.held["pod--shop--evil"].name == "lab-payments"


@on_both
async def test_default_names_are_not_looked_up(checks_versions: bool) -> None:
    """They contain the Pod's own name; the resync's view of our own node is enough."""
    lab = ControllerLab(checks_versions=checks_versions)
    async with lab.running():
        await lab.synced("a", "b")
        lab.cluster.put(make_pod("c"))
        await lab.until("a", "b", "c")
    assert lab.consul.names_checked == []


@on_both
async def test_foreign_service_that_takes_a_new_name_at_our_node_keeps_it(checks_versions: bool) -> None:
    """The resync's view refuses the name though it is a default one; case does not count."""
    lab = ControllerLab(checks_versions=checks_versions)
    async with lab.running():
        await lab.synced("a")
        lab.consul.put_by_hand(make_service("by-hand", name="Pod--Shop--b"))
        await lab.resynced()
        lab.cluster.put(make_pod("b"))
        await lab.until_so(lambda: bool(lab.status.lost))
        assert "pod--shop--b" not in lab.consul.held
        lab.consul.remove_by_hand("by-hand")
        await lab.until("a", "b")


@on_both
async def test_outage_while_a_name_is_checked_delays_the_write(checks_versions: bool) -> None:
    """No new name is given without the look at the catalog."""
    rules = TargetRules(pod_name=parse_name("lab-{label:app}", Kind.POD))
    lab = ControllerLab(checks_versions=checks_versions, checked_names=True, target_rules=rules)
    lab.consul.taken_names = {"lab-payments"}
    async with lab.running():
        lab.cluster.put_list([])
        await lab.until_so(lambda: lab.status.has_synced)
        lab.consul.is_down = True
        lab.cluster.put(make_pod("evil", labels={"app": "payments"}))
        await lab.until_so(lambda: lab.value("consul_up") == 0)
        await asyncio.sleep(0.05)
        lab.consul.is_down = False
        await lab.until_so(lambda: bool(lab.status.lost))
    assert lab.consul.held == {}
