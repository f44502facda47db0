"""Resyncs: when they are made, what they repair, and that changes do not wait for them."""

import asyncio
import random

import pytest
from msgspec.structs import replace

from k8s_consul_registrar.model import UNSYNCED, Drift
from k8s_consul_registrar.registrar.schedule import ScheduleRules
from support.builders import make_pod, our_pod_service
from support.controller_lab import ControllerLab
from support.memory import PODS
from support.scripted import QUICK

on_both = pytest.mark.parametrize("checks_versions", [True, False], ids=["catalog", "agent"])
# One read of everything in ten minutes, unless it is urgent or its period is over.
RARE_READS = ScheduleRules(period=600, probe=QUICK.probe, burst=1, gap=600, urgent_gap=0.01, urgent_share=1)


class AnyShard:
    """Picks one of fifty shards for a service without one, so that a service that lost its own shows."""

    def choose(self, service_id: str, current: str) -> str:
        """Return the current shard, otherwise any."""
        return current or f"s{random.randrange(50)}"


@on_both
async def test_drift_is_repaired(checks_versions: bool) -> None:
    """Services deleted or edited by hand in Consul come back once the registry reports drift."""
    lab = ControllerLab(checks_versions=checks_versions)
    async with lab.running():
        await lab.synced("a", "b")
        lab.consul.remove_by_hand("pod--shop--a")
        await lab.until("a", "b")
        lab.consul.put_by_hand(our_pod_service("b", note="mine"))
        await lab.until_so(lambda: lab.consul.held["pod--shop--b"].value("note") == "")
    assert lab.consul.writes[2:] == [("register", "pod--shop--a"), ("register", "pod--shop--b")]


async def test_service_that_an_agent_holds_and_the_catalog_lacks_is_registered_again() -> None:
    """It is as it was written, and yet no collector finds it."""
    lab = ControllerLab(checks_versions=False)
    async with lab.running():
        await lab.synced("a", "b")
        held = lab.consul.held["pod--shop--a"]
        lab.consul.held["pod--shop--a"] = replace(held, index=UNSYNCED)
        lab.consul.foreign = Drift.CHANGED
        await lab.until_so(lambda: lab.consul.writes[2:] == [("register", "pod--shop--a")])
        await lab.resynced()
    assert len(lab.consul.writes) == 3


@on_both
async def test_services_of_the_cluster_before_belong_to_another_one(checks_versions: bool) -> None:
    """A UID that differs outweighs that they are as they were written: they are not touched."""
    lab = ControllerLab(checks_versions=checks_versions)
    lab.controller.on_cluster_uid("uid-1")
    async with lab.running():
        await lab.synced("a", "b")
        before = dict(lab.consul.held)
        lab.controller.on_cluster_uid("uid-2")
        await lab.until_so(lambda: len(lab.status.conflicts) == 2)
        await lab.resynced()
    assert lab.consul.held == before


@on_both
@pytest.mark.parametrize("drift", [Drift.CHANGED, Drift.EMPTIED])
async def test_consul_that_lost_its_history_is_filled_again(checks_versions: bool, drift: Drift) -> None:
    """Its indexes start again, so that they may repeat: every service is written, with its shard."""
    lab = ControllerLab(checks_versions=checks_versions, shards=AnyShard())
    names = [f"p{number}" for number in range(20)]

    def shards() -> dict[str, str]:
        return {one.id: one.value("shard_path") for one in lab.consul.held.values()}

    async with lab.running():
        await lab.synced(*names)
        before = shards()
        lab.consul.held.clear()
        lab.consul.index = 0
        lab.consul.foreign = drift
        await lab.until(*names)
        assert shards() == before
        await lab.until_so(lambda: lab.controller.is_complete)
        lab.cluster.put(make_pod("p0", ip="10.1.1.1"))
        await lab.until_so(lambda: lab.consul.held["pod--shop--p0"].address == "10.1.1.1")
    assert not lab.status.refused


@on_both
async def test_older_snapshot_of_consul_is_repaired(checks_versions: bool) -> None:
    """It lacks new services, and has old ones and old states; each is as desired in the end."""
    lab = ControllerLab(checks_versions=checks_versions)
    async with lab.running():
        await lab.synced("a", "b", "c")
        snapshot, index = dict(lab.consul.held), lab.consul.index
        lab.cluster.put(make_pod("a", ip="10.1.1.1"))
        lab.cluster.remove(make_pod("b"))
        lab.cluster.put(make_pod("d"))
        await lab.until("a", "c", "d")
        await lab.until_so(lambda: lab.consul.held["pod--shop--a"].address == "10.1.1.1")
        lab.consul.held, lab.consul.index = snapshot, index
        lab.consul.foreign = Drift.EMPTIED
        await lab.until("a", "c", "d")
        await lab.until_so(lambda: lab.consul.held["pod--shop--a"].address == "10.1.1.1")


@on_both
async def test_shards_survive_a_consul_that_forgets_and_fails(checks_versions: bool) -> None:
    """Services that Consul lost get their shards back, though the first attempts to write them fail."""
    lab = ControllerLab(checks_versions=checks_versions, shards=AnyShard())
    names = [f"p{number}" for number in range(20)]
    async with lab.running():
        await lab.synced(*names)
        before = {key: one.value("shard_path") for key, one in lab.consul.held.items()}
        lab.consul.held.clear()
        lab.consul.failing_writes = 2
        lab.consul.foreign = Drift.CHANGED
        await lab.until(*names)
    assert {key: one.value("shard_path") for key, one in lab.consul.held.items()} == before


async def test_resyncs_at_rest_write_nothing() -> None:
    """The periodic comparison finds nothing to do."""
    lab = ControllerLab(schedule=ScheduleRules(period=0.03, probe=QUICK.probe, gap=0))
    async with lab.running():
        await lab.synced("a")
        reads = lab.consul.reads
        await lab.until_so(lambda: lab.consul.reads > reads + 3)
    assert lab.consul.writes == [("register", "pod--shop--a")]


@on_both
async def test_suspended_process_compares_everything(checks_versions: bool) -> None:
    """After 60 s without a turn others may have written, though no drift was reported."""
    lab = ControllerLab(checks_versions=checks_versions, schedule=RARE_READS)
    async with lab.running():
        await lab.synced("a", "b")
        reads = lab.consul.reads
        lab.consul.put_by_hand(our_pod_service("b", note="mine"), is_noticed=False)
        del lab.consul.held["pod--shop--a"]
        await asyncio.sleep(0.1)
        assert lab.consul.reads == reads
        lab.clock.skip(60)
        await lab.until_so(lambda: lab.consul.reads > reads)
        await lab.until("a", "b")
        await lab.until_so(lambda: lab.consul.held["pod--shop--b"].value("note") == "")


async def test_resyncs_are_budgeted() -> None:
    """Lists that complete one after the other do not each cost a read of everything."""
    lab = ControllerLab(schedule=ScheduleRules(period=600, probe=QUICK.probe, burst=2, gap=60))
    async with lab.running():
        for number in range(10):
            lab.cluster.put_list([make_pod(f"p{n}") for n in range(number)])
            await asyncio.sleep(0.01)
        await lab.until(*(f"p{n}" for n in range(9)))
    assert lab.consul.reads <= 3


async def test_emptied_consul_does_not_wait_for_the_budget() -> None:
    """A single change waits until Consul may be read again; a Consul that holds nothing is filled at once."""
    lab = ControllerLab(schedule=RARE_READS)
    async with lab.running():
        await lab.synced("a", "b")
        lab.consul.remove_by_hand("pod--shop--a")
        await asyncio.sleep(0.2)
        assert lab.names_held == {"b"}
        lab.consul.held.clear()
        lab.consul.foreign = Drift.EMPTIED
        await lab.until("a", "b")


@on_both
@pytest.mark.parametrize("texts", [["cut off"], ["cut off", "took too long"], ["a", "b", "c"]])
async def test_failing_source_with_changing_texts_causes_no_resync(
    checks_versions: bool, texts: list[str]
) -> None:
    """However its problem is worded, a source that goes on failing is no reason to read Consul."""
    lab = ControllerLab(checks_versions=checks_versions)
    async with lab.running():
        await lab.synced("a")
        reads = lab.consul.reads
        for number in range(30):
            text = texts[number % len(texts)]
            lab.cluster.store.fail(PODS, text, f"cause of {text}")
            await asyncio.sleep(0.01)
    assert lab.consul.reads == reads


@on_both
@pytest.mark.parametrize("read_first", [0, 4])
async def test_changes_do_not_wait_for_a_resync(checks_versions: bool, read_first: int) -> None:
    """Changes during a read of Consul are written meanwhile, and older records of that read undo nothing."""
    lab = ControllerLab(checks_versions=checks_versions)
    async with lab.running():
        await lab.synced("moved", "gone", "back", "edited", "same")
        edited = lab.consul.held["pod--shop--edited"]
        reads, lab.consul.read_first = lab.consul.reads, read_first
        lab.consul.may_read_on.clear()
        lab.consul.put_by_hand(replace(edited, address="9.9.9.9"))
        await lab.until_so(lambda: lab.consul.reads > reads)
        lab.cluster.put(make_pod("added"))
        lab.cluster.put(make_pod("moved", ip="10.1.1.1"))
        lab.cluster.remove(make_pod("gone"))
        lab.cluster.remove(make_pod("back"))
        await lab.until("moved", "edited", "same", "added")
        await lab.until_so(lambda: lab.consul.held["pod--shop--moved"].address == "10.1.1.1")
        lab.cluster.put(make_pod("back", ip="10.1.1.2"))
        await lab.until("moved", "back", "edited", "same", "added")
        assert lab.consul.held["pod--shop--edited"].address == "9.9.9.9", "the read is not over"
        writes = len(lab.consul.writes)
        lab.consul.may_read_on.set()
        await lab.until_so(lambda: lab.consul.held["pod--shop--edited"].address == edited.address)
        await lab.resynced()
        assert lab.consul.writes[writes:] == [("register", "pod--shop--edited")]
        assert lab.consul.held["pod--shop--moved"].address == "10.1.1.1"
        assert lab.consul.held["pod--shop--back"].address == "10.1.1.2"
        lab.cluster.put(make_pod("moved", ip="10.1.1.3"))
        lab.cluster.remove(make_pod("added"))
        await lab.until("moved", "back", "edited", "same")
        await lab.until_so(lambda: lab.consul.held["pod--shop--moved"].address == "10.1.1.3")
    assert not lab.status.refused


async def test_service_written_during_a_resync_is_compared_again() -> None:
    """Another writer may have come after us while the rest was read; an agent shows it when it is asked."""
    lab = ControllerLab(checks_versions=False, schedule=RARE_READS)
    async with lab.running():
        await lab.synced("a", "b")
        reads = lab.consul.reads
        lab.consul.may_read_on.clear()
        lab.consul.foreign = Drift.EMPTIED
        await lab.until_so(lambda: lab.consul.reads > reads)
        lab.cluster.put(make_pod("b", ip="10.1.1.1"))
        await lab.until_so(lambda: lab.consul.held["pod--shop--b"].address == "10.1.1.1")
        lab.consul.put_by_hand(our_pod_service("b", note="by hand"), is_noticed=False)
        lab.consul.may_read_on.set()
        await lab.until_so(lambda: lab.consul.held["pod--shop--b"].value("note") == "")
    assert lab.consul.held["pod--shop--b"].address == "10.1.1.1"


async def test_stopped_controller_leaves_nothing_running() -> None:
    """Batches, a resync under way and the watch of the leadership end with it."""
    lab = ControllerLab()
    before = asyncio.all_tasks()
    async with lab.running():
        await lab.synced("a")
        reads = lab.consul.reads
        lab.consul.may_read_on.clear()
        lab.consul.foreign = Drift.CHANGED
        lab.consul.write_seconds = 30
        lab.cluster.put(make_pod("b"))
        await lab.until_so(lambda: lab.consul.reads > reads and lab.queue.in_flight > 0)
    assert asyncio.all_tasks() == before
