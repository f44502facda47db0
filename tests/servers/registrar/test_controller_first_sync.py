"""The first sync: Consul is streamed beside the lists, and what it lacks is written before they are complete."""

import asyncio
from collections.abc import Sequence

import pytest
from msgspec.structs import replace

from k8s_consul_registrar.model import Kind, Service, Source, Written
from k8s_consul_registrar.registrar.brake import BrakeRules
from support.builders import make_pod, make_service, our_pod_service
from support.controller_lab import FREE_READS, ControllerLab
from support.memory import PODS

on_both = pytest.mark.parametrize("checks_versions", [True, False], ids=["catalog", "agent"])
NAMES = [f"p{number}" for number in range(20)]


def registered(lab: ControllerLab) -> list[str]:
    """Return the Pods that were written, in order."""
    return [service_id.removeprefix("pod--shop--") for verb, service_id in lab.consul.writes]


@on_both
async def test_nothing_is_written_before_consul_was_read(checks_versions: bool) -> None:
    """Until then it is not known what is under an ID, so what the lists show waits."""
    lab = ControllerLab(checks_versions=checks_versions)
    lab.consul.may_read_on.clear()
    async with lab.running():
        lab.cluster.put_list([make_pod("a")])
        await lab.until_so(lambda: lab.consul.reads > 0)
        lab.cluster.put(make_pod("b"))
        await asyncio.sleep(0.05)
        assert (lab.consul.writes, lab.consul.lookups) == ([], [])
        assert not lab.status.has_synced
        lab.consul.may_read_on.set()
        await lab.until("a", "b")


@on_both
async def test_pods_are_registered_while_the_first_list_still_arrives(checks_versions: bool) -> None:
    """New targets are written at once; nothing is removed before the list is complete."""
    lab = ControllerLab(checks_versions=checks_versions)
    lab.consul.put_by_hand(our_pod_service("old"))
    lab.consul.put_by_hand(our_pod_service("kept"))
    async with lab.running():
        lab.cluster.start_list([make_pod("a"), make_pod("kept")])
        await lab.until("a", "old", "kept")
        await lab.resynced()
        assert lab.consul.writes == [("register", "pod--shop--a")]
        assert not lab.status.has_synced
        lab.cluster.store.finish_listing(PODS, lab.clock())
        await lab.until("a", "kept")
    assert lab.consul.writes == [("register", "pod--shop--a"), ("deregister", "pod--shop--old")]


@on_both
async def test_first_fill_reads_consul_once(checks_versions: bool) -> None:
    """In the catalog an unseen ID is created at index 0 without a lookup; at an agent each write is preceded by one."""
    lab = ControllerLab(checks_versions=checks_versions)
    sent: list[Service] = []
    register = lab.consul.register

    async def noting(services: Sequence[Service]) -> Written:
        sent.extend(services)
        return await register(services)

    lab.consul.register = noting  # type: ignore[method-assign] # to see what is written
    lab.cluster.start_list([make_pod(name) for name in NAMES[:10]])
    async with lab.running():
        await lab.until(*NAMES[:10])
        for name in NAMES[10:]:
            lab.cluster.store.put(PODS, make_pod(name))
        await lab.until(*NAMES)
    assert sorted(registered(lab)) == sorted(NAMES)
    if checks_versions:
        assert lab.consul.lookups == []
        assert {one.index for one in sent} == {0}
    else:
        assert sorted(lab.consul.lookups) == sorted(f"pod--shop--{name}" for name in NAMES)
    assert lab.consul.reads == 1


@on_both
async def test_agent_is_looked_at_before_every_write(checks_versions: bool) -> None:
    """Updates and removals alike; the catalog compares versions instead."""
    lab = ControllerLab(checks_versions=checks_versions)
    async with lab.running():
        await lab.synced("a", "b")
        lab.consul.lookups.clear()
        lab.cluster.put(make_pod("a", ip="10.1.1.1"))
        lab.cluster.remove(make_pod("b"))
        await lab.until("a")
        await lab.until_so(lambda: lab.consul.held["pod--shop--a"].address == "10.1.1.1")
    expected = [] if checks_versions else ["pod--shop--a", "pod--shop--b"]
    assert sorted(lab.consul.lookups) == expected


@on_both
async def test_service_that_changes_while_written_is_written_again(checks_versions: bool) -> None:
    """It goes over what is in Consul by then, at the first attempt."""
    lab = ControllerLab(checks_versions=checks_versions)
    lab.consul.write_seconds = 0.05
    async with lab.running():
        lab.cluster.put_list([make_pod(name) for name in NAMES[:5]])
        await lab.until_so(lambda: lab.consul.register_calls > 0)
        for name in NAMES[:5]:
            lab.cluster.put(make_pod(name, ip="10.9.9.9"))
        await lab.until_so(lambda: [one.address for one in lab.consul.held.values()] == ["10.9.9.9"] * 5)
        await lab.until_so(lambda: lab.status.has_synced)
    assert not lab.status.refused
    assert lab.value("passes_total", outcome="partial") == 0


@on_both
async def test_pod_that_vanishes_while_it_is_written_goes(checks_versions: bool) -> None:
    """Its departure is newer than the write under way."""
    lab = ControllerLab(checks_versions=checks_versions)
    lab.consul.write_seconds = 0.05
    async with lab.running():
        lab.cluster.start_list([make_pod(name) for name in NAMES[:5]])
        await lab.until_so(lambda: lab.consul.register_calls > 0)
        lab.cluster.remove(make_pod("p0"))
        lab.cluster.store.finish_listing(PODS, lab.clock())
        await lab.until(*NAMES[1:5])
        await lab.until_so(lambda: lab.desired.departures == 0)


@on_both
async def test_consul_that_fails_in_the_middle_of_a_first_sync_loses_nothing(checks_versions: bool) -> None:
    """Services that were not written are written later; those that may have been are looked up."""
    lab = ControllerLab(checks_versions=checks_versions)
    lab.consul.failing_writes = 3
    async with lab.running():
        lab.cluster.start_list([make_pod(name) for name in NAMES[:5]])
        await lab.until_so(lambda: not lab.consul.failing_writes)
        for name in NAMES[5:10]:
            lab.cluster.store.put(PODS, make_pod(name))
        lab.cluster.store.finish_listing(PODS, lab.clock())
        await lab.until(*NAMES[:10])
        await lab.until_so(lambda: lab.status.has_synced)
    assert sorted(registered(lab)) == sorted(NAMES[:10])


@on_both
async def test_services_that_are_there_already_are_not_written(checks_versions: bool) -> None:
    """A start over what an earlier run wrote writes nothing."""
    lab = ControllerLab(checks_versions=checks_versions)
    for name in NAMES:
        lab.consul.put_by_hand(our_pod_service(name))
    async with lab.running():
        await lab.synced(*NAMES)
        await lab.resynced()
    assert lab.consul.writes == []


@on_both
async def test_foreign_names_are_kept_away_from_at_once(checks_versions: bool) -> None:
    """They are known before the first write; what another cluster's registrar wrote takes no name."""
    lab = ControllerLab(checks_versions=checks_versions)
    lab.consul.put_by_hand(make_service("by-hand", name="POD--shop--p0"))
    theirs = replace(our_pod_service("theirs", cluster="other"), name="pod--shop--p1")
    lab.consul.put_by_hand(theirs)
    async with lab.running():
        lab.cluster.put_list([make_pod(name) for name in NAMES[:3]])
        await lab.until_so(lambda: lab.status.has_synced)
        await lab.until_so(lambda: bool(lab.status.lost))
    assert sorted(registered(lab)) == NAMES[1:3]
    assert [one.reason for one in lab.status.lost_rejections()] == ["name_taken"]


@on_both
async def test_removals_of_a_start_follow_its_registrations(checks_versions: bool) -> None:
    """Everything new is tried before anything old goes."""
    lab = ControllerLab(checks_versions=checks_versions)
    for number in range(2):
        lab.consul.put_by_hand(our_pod_service(f"o{number}"))
    lab.consul.write_seconds = 0.01
    async with lab.running():
        await lab.synced(*(f"n{number}" for number in range(5)))
    assert [verb for verb, _ in lab.consul.writes] == ["register"] * 5 + ["deregister"] * 2


@on_both
async def test_end_of_the_first_list_is_judged_without_another_read(checks_versions: bool) -> None:
    """Services whose objects the list lacks go or are held, however late it is; Consul is not read a second time for that."""
    lab = ControllerLab(checks_versions=checks_versions)
    for name in NAMES:
        lab.consul.put_by_hand(our_pod_service(name), is_noticed=False)
    async with lab.running():
        lab.cluster.start_list([make_pod(name) for name in NAMES[1:]])
        await lab.until_so(lambda: bool(lab.status.recent) and lab.queue.is_drained)
        assert "p0" in lab.names_held
        lab.cluster.store.finish_listing(PODS, lab.clock())
        await lab.until(*NAMES[1:])
        await lab.until_so(lambda: lab.status.has_synced)
    assert lab.consul.reads == 1


async def test_start_is_over_with_the_first_list() -> None:
    """The brake's long wait is for what an earlier process wrote, not for the rest of this one's life."""
    lab = ControllerLab(brake=BrakeRules(confirm=0.1, confirm_start=600))
    async with lab.running():
        await lab.until_so(lambda: bool(lab.status.recent))
        lab.cluster.put_list([make_pod(name) for name in NAMES])
        await lab.until(*NAMES)
        await lab.until_so(lambda: lab.status.has_synced)
        lab.cluster.put_list([make_pod(name) for name in NAMES[:5]])
        await lab.until(*NAMES[:5])


async def test_rejections_of_the_first_list_are_told_at_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    """Not only with the next resync, which may be ten minutes away."""
    lab = ControllerLab()
    async with lab.running():
        await lab.until_so(lambda: bool(lab.status.recent))
        lab.cluster.put_list([make_pod("a", ip=""), make_pod("b")])
        await lab.until("b")
        await lab.until_so(lambda: lab.status.has_synced)
    assert "no_ip" in capsys.readouterr().out


async def test_readiness_waits_for_every_source_and_for_consul() -> None:
    """The registrar is ready once each source was listed, everything was compared, and all was tried."""
    first, second = Source(Kind.POD, "shop"), Source(Kind.POD, "other")
    lab = ControllerLab(sources=(first, second))
    lab.consul.refused = {"pod--shop--bad"}
    async with lab.running():
        await lab.until_so(lambda: lab.observed.is_complete)
        lab.cluster.put_list([make_pod("a"), make_pod("bad")], first)
        await lab.until("a")
        assert lab.status.readiness() == "not synced yet"
        lab.cluster.store.fail(second, "forbidden", "forbidden")
        await lab.until_so(lambda: lab.status.readiness() == "not synced yet: forbidden")
        lab.cluster.put_list([], second)
        await lab.until_so(lambda: lab.status.readiness() == "")
        assert not lab.controller.is_complete, "a service is refused"
        lab.consul.is_down = True
        await lab.until_so(lambda: lab.value("consul_up") == 0)
        assert lab.status.readiness() == "", "once it has synced it stays ready"
        lab.consul.is_down = False
        lab.consul.refused = set()
        await lab.until_so(lambda: lab.controller.is_complete)


async def test_long_first_fill_shows_that_the_loop_turns() -> None:
    """Filling a slow agent takes longer than a loop may stand still."""
    lab = ControllerLab(checks_versions=False)
    lab.consul.write_seconds = 0.5
    async with lab.running():
        lab.cluster.put_list([make_pod(f"p{number}") for number in range(200)])
        await lab.until_so(lambda: lab.consul.register_calls > 0)
        ticked = lab.status.ticked_at
        await lab.until_so(lambda: lab.status.ticked_at > ticked)
        assert len(lab.consul.held) < 200
        assert (lab.observed.registered, len(lab.desired.claims)) == (len(lab.consul.held), 200)


async def test_shards_on_record_elsewhere_are_taken_over() -> None:
    """A fresh agent lacks the services, but the catalog still knows their shards."""
    lab = ControllerLab(checks_versions=False, schedule=FREE_READS)
    lab.consul.lost = {"pod--shop--a": "s17"}
    async with lab.running():
        await lab.synced("a")
    assert lab.observed.shard("pod--shop--a") == "s17"
