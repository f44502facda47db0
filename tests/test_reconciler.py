"""The reconciler's loop: what it writes in which order, when it wakes, and what it survives."""

import asyncio
import random
from collections.abc import Iterable

import pytest
from msgspec.structs import replace

from builders import make_pod, our_pod_service
from k8s_consul_registrar.model import Disturbance, Service, Written
from k8s_consul_registrar.registrar.budget import BudgetRules
from k8s_consul_registrar.registrar.status import LostAgent
from memory import PODS
from reconciler_lab import Lab


class RolledShards:
    """Rolls one of fifty shards anew for whatever has none, so that a service that lost its own shows."""

    def choose(self, service_id: str, current: str) -> str:
        """Return the current shard, else any."""
        return current or f"s{random.randrange(50)}"


FIFTY_SHARDS = RolledShards()


class Vote:
    """A leadership that a test gives and takes."""

    def __init__(self, *, is_leader: bool) -> None:
        self.is_leader = is_leader
        self._flipped = asyncio.Event()

    def set(self, *, is_leader: bool) -> None:
        """Give or take leadership."""
        self.is_leader = is_leader
        self._flipped.set()

    async def changed(self) -> None:
        """Wait for that."""
        await self._flipped.wait()
        self._flipped.clear()


both_backends = pytest.mark.parametrize("checks_versions", [True, False], ids=["catalog", "agent"])


@both_backends
async def test_follows_the_cluster(checks_versions: bool) -> None:
    """New Pods are registered, changed ones updated and gone ones deregistered, as lists come."""
    lab = Lab(checks_versions=checks_versions)
    async with lab.running():
        await lab.synced("a", "b")
        lab.cluster.put_list([make_pod("b", ip="198.51.100.77")])
        await lab.until(["b"])
    assert lab.consul.held["pod--shop--b"].address == "198.51.100.77"
    assert lab.reconciler.status.readiness() == ""
    assert lab.value("writes_total", verb="deregister", outcome="success") == 1


@both_backends
async def test_first_list_is_registered_before_consul_is_compared_whole(checks_versions: bool) -> None:
    """What a start finds missing is written at once; only then is everything read and compared."""
    lab = Lab(checks_versions=checks_versions)
    reads_at_write: list[int] = []
    register = lab.consul.register

    async def noting(services: Iterable[Service]) -> Written:
        reads_at_write.append(lab.consul.reads)
        return await register(services)

    lab.consul.register = noting  # type: ignore[method-assign] # to see when it is called
    lab.cluster.put_list([make_pod("a"), make_pod("b")])
    async with lab.running():
        await lab.until(["a", "b"])
        await lab.until_so(lambda: lab.reconciler.status.has_synced)
    assert reads_at_write == [1]
    assert lab.consul.reads == 2


@both_backends
async def test_events_are_followed_without_reading_consul_whole(checks_versions: bool) -> None:
    """After the first comparison additions, changes and deletions cost no full read."""
    lab = Lab(checks_versions=checks_versions)
    async with lab.running():
        await lab.synced("a", "b")
        reads = lab.consul.reads
        lab.cluster.mirror.put(PODS, make_pod("c"))
        await lab.until(["a", "b", "c"])
        lab.cluster.mirror.put(PODS, make_pod("c", ip="198.51.100.99"))
        await lab.until_so(lambda: lab.consul.held["pod--shop--c"].address == "198.51.100.99")
        lab.cluster.mirror.remove(PODS, make_pod("a"))
        lab.cluster.mirror.put(PODS, make_pod("b", annotations={}))
        await lab.until(["c"])
        await lab.until_so(lambda: lab.cluster.wanted().departed == frozenset())
    assert lab.consul.reads == reads
    assert bool(lab.consul.lookups) is not checks_versions


async def test_status_noise_causes_no_traffic() -> None:
    """A Pod that changes in ways that do not touch its target is nothing to Consul."""
    lab = Lab()
    async with lab.running():
        await lab.synced("a")
        before = (len(lab.consul.writes), lab.consul.reads, len(lab.consul.lookups))
        for number in range(20):
            lab.cluster.mirror.put(PODS, make_pod("a", ready=True, host_ip=f"192.0.2.{number}"))
            await asyncio.sleep(0.002)
        await asyncio.sleep(0.05)
    assert (len(lab.consul.writes), lab.consul.reads, len(lab.consul.lookups)) == before


@both_backends
async def test_registers_while_the_first_list_still_streams(checks_versions: bool) -> None:
    """What is new is written before the list is complete; nothing is removed or changed before that."""
    lab = Lab(checks_versions=checks_versions)
    lab.consul.put_by_hand(our_pod_service("old"))
    lab.consul.put_by_hand(our_pod_service("kept"))
    async with lab.running():
        await lab.until_so(lambda: lab.consul.reads > 0)
        lab.cluster.mirror.start_listing(PODS)
        lab.cluster.mirror.put(PODS, make_pod("a"))
        lab.cluster.mirror.put(PODS, make_pod("kept"))
        await lab.until(["a", "old", "kept"])
        assert lab.consul.writes == [("register", "pod--shop--a")]
        lab.cluster.mirror.finish_listing(PODS, 1.0)
        await lab.until(["a", "kept"])
    assert lab.consul.writes == [("register", "pod--shop--a"), ("deregister", "pod--shop--old")]


async def test_a_racing_writer_is_seen_and_not_overwritten() -> None:
    """A service that somebody put under our ID meanwhile is a conflict, found at the write."""
    lab = Lab()
    async with lab.running():
        await lab.synced("a")
        lab.consul.put_by_hand(our_pod_service("b", cluster="other"), is_noticed=False)
        lab.cluster.mirror.put(PODS, make_pod("b"))
        await lab.until_so(lambda: "pod--shop--b" in lab.consul.lookups)
        await asyncio.sleep(0.05)
    assert lab.consul.held["pod--shop--b"].value("cluster") == "other"


@both_backends
async def test_a_service_taken_over_is_not_removed(checks_versions: bool) -> None:
    """A Pod goes whose ID somebody else took: that service stays."""
    lab = Lab(checks_versions=checks_versions)
    async with lab.running():
        await lab.synced("a", "b")
        lab.consul.put_by_hand(our_pod_service("b", cluster="other"), is_noticed=False)
        lab.cluster.mirror.remove(PODS, make_pod("b"))
        lab.cluster.mirror.remove(PODS, make_pod("a"))
        await lab.until(["b"])
        await asyncio.sleep(0.1)
    assert lab.consul.held["pod--shop--b"].value("cluster") == "other"


@both_backends
async def test_a_disturbance_is_repaired(checks_versions: bool) -> None:
    """What somebody deletes or edits in Consul comes back once the registry says it was disturbed."""
    lab = Lab(checks_versions=checks_versions)
    async with lab.running():
        await lab.synced("a", "b")
        lab.consul.remove_by_hand("pod--shop--a")
        await lab.until(["a", "b"])
        lab.consul.put_by_hand(our_pod_service("b", note="mine"))
        await lab.until_so(lambda: lab.consul.held["pod--shop--b"] == our_pod_service("b"))


@both_backends
async def test_a_lost_service_keeps_its_shard(checks_versions: bool) -> None:
    """A Consul that restarted empty is filled again with the shards it had."""
    lab = Lab(checks_versions=checks_versions, shards=FIFTY_SHARDS)
    names = [f"p{number}" for number in range(20)]

    def shards() -> dict[str, str]:
        return {one.id: one.value("shard_path") for one in lab.consul.held.values()}

    async with lab.running():
        await lab.synced(*names)
        before = shards()
        lab.consul.held.clear()
        lab.consul.foreign = Disturbance.CHANGED
        await lab.until(names)
        assert shards() == before


async def test_shards_on_record_elsewhere_are_taken_over() -> None:
    """A fresh agent lacks the services, but the catalog still knows their shards."""
    lab = Lab(checks_versions=False, shards=FIFTY_SHARDS)
    lab.consul.lost = {"pod--shop--a": "s17"}
    async with lab.running():
        await lab.synced("a")
    assert lab.consul.held["pod--shop--a"].value("shard_path") == "s17"


async def test_nothing_is_written_before_the_first_list() -> None:
    """While nothing is known nothing is written, and the daemon is not ready."""
    lab = Lab()
    lab.consul.put_by_hand(our_pod_service("old"))
    async with lab.running():
        await asyncio.sleep(0.1)
        assert "not synced yet" in lab.reconciler.status.readiness()
    assert lab.consul.writes == []


@both_backends
async def test_registers_go_before_deregisters(checks_versions: bool) -> None:
    """Everything new is there before anything old goes."""
    lab = Lab(checks_versions=checks_versions)
    for number in range(2):
        lab.consul.put_by_hand(our_pod_service(f"o{number}"))
    async with lab.running():
        await lab.synced(*(f"n{number}" for number in range(5)))
    assert [verb for verb, _ in lab.consul.writes] == ["register"] * 5 + ["deregister"] * 2


async def test_full_passes_at_rest_write_nothing() -> None:
    """The safety net finds nothing to do."""
    lab = Lab(period=0.03)
    async with lab.running():
        await lab.synced("a")
        reads = lab.consul.reads
        await lab.until_so(lambda: lab.consul.reads > reads + 3)
    assert lab.consul.writes == [("register", "pod--shop--a")]


async def test_outage_of_consul_is_survived() -> None:
    """While Consul is down nothing is lost; when it is back the pass is made, without a change's help."""
    lab = Lab()
    lab.consul.is_down = True
    async with lab.running():
        lab.cluster.put_list([make_pod("a")])
        await lab.until_so(lambda: lab.consul.reads >= 3)
        assert "Consul is down" in lab.reconciler.status.readiness()
        assert lab.value("consul_up") == 0
        lab.consul.is_down = False
        await lab.until(["a"])
        await lab.until_so(lambda: lab.value("consul_up") == 1)


@both_backends
async def test_changes_during_an_outage_are_written_after_it(checks_versions: bool) -> None:
    """Events that come while Consul is down are not lost, deletions among them."""
    lab = Lab(checks_versions=checks_versions)
    async with lab.running():
        await lab.synced("a", "b")
        lab.consul.is_down = True
        lab.cluster.mirror.put(PODS, make_pod("c"))
        await lab.until_so(lambda: lab.value("consul_up") == 0)
        lab.cluster.mirror.remove(PODS, make_pod("a"))
        await asyncio.sleep(0.1)
        lab.consul.is_down = False
        await lab.until(["b", "c"])


async def test_a_flood_of_changes_does_not_hammer_a_dead_consul() -> None:
    """Changes while Consul is down wait for the next retry."""
    lab = Lab()
    lab.consul.is_down = True
    async with lab.running():
        for number in range(50):
            lab.cluster.mirror.put(PODS, make_pod(f"p{number}"))
            await asyncio.sleep(0.002)
    assert lab.consul.reads < 15


async def test_one_refused_target_does_not_hold_up_the_rest() -> None:
    """The pass is partial, the rest is there, and the refused one is tried again."""
    lab = Lab()
    lab.consul.refused = {"pod--shop--bad"}
    async with lab.running():
        lab.cluster.put_list([make_pod("bad"), make_pod("good")])
        await lab.until(["good"])
        lab.cluster.mirror.put(PODS, make_pod("more"))
        await lab.until(["good", "more"])
        lab.consul.refused.clear()
        await lab.until(["bad", "good", "more"])
    assert lab.value("passes_total", outcome="partial")


@pytest.mark.parametrize("checks_versions", [True, False])
async def test_the_lag_of_events_is_counted_once_written(checks_versions: bool) -> None:
    """Each service that an event led to counts once, from the event to the write; what a list shows does not."""
    lab = Lab(checks_versions=checks_versions)
    async with lab.running():
        await lab.synced("a", "b")
        assert lab.value("event_lag_seconds_count") == 0
        lab.cluster.mirror.put(PODS, make_pod("c"))
        lab.cluster.mirror.remove(PODS, make_pod("a"))
        await lab.until(["b", "c"])
        await lab.until_so(lambda: lab.value("event_lag_seconds_count") == 2)
        lab.consul.refused = {"pod--shop--slow"}
        lab.cluster.mirror.put(PODS, make_pod("slow"))
        lab.cluster.mirror.put(PODS, make_pod("x", ip=""))
        await lab.until_so(lambda: "pod--shop--slow" in lab.reconciler.status.refused)
        await asyncio.sleep(0.2)
        assert lab.value("event_lag_seconds_count") == 2
        lab.consul.refused.clear()
        await lab.until_so(lambda: lab.value("event_lag_seconds_count") == 3)
        total = lab.value("event_lag_seconds_sum")
        assert total is not None
        assert 0.2 <= total < 10
        # An event led to a conflict, and that it could be written after all is news of Consul's.
        lab.consul.put_by_hand(our_pod_service("taken", cluster="other"))
        await lab.until_so(lambda: lab.consul.foreign is Disturbance.NONE)
        lab.cluster.mirror.put(PODS, make_pod("taken"))
        await lab.until_so(lambda: "pod--shop--taken" in lab.reconciler.status.conflicts)
        await lab.until_so(lambda: lab.value("conflicts") == 1)
        lab.consul.remove_by_hand("pod--shop--taken")
        await lab.until(["b", "c", "slow", "taken"])
        await asyncio.sleep(0.1)
        assert lab.value("event_lag_seconds_count") == 3


async def test_the_lag_lasts_through_an_outage_of_consul() -> None:
    """What is written after it counts from its event, although everything was compared anew in between."""
    lab = Lab()
    async with lab.running():
        await lab.synced("a")
        lab.consul.is_down = True
        lab.cluster.mirror.put(PODS, make_pod("b"))
        await lab.until_so(lambda: lab.value("consul_up") == 0)
        await asyncio.sleep(0.2)
        lab.consul.is_down = False
        await lab.until(["a", "b"])
        await lab.until_so(lambda: lab.value("event_lag_seconds_count") == 1)
        total = lab.value("event_lag_seconds_sum")
        assert total is not None
        assert 0.2 <= total < 10


async def test_shards_outlive_a_consul_that_forgets_and_fails() -> None:
    """Services that Consul lost get their shards back, even when the first attempt to refill it fails."""
    lab = Lab(shards=FIFTY_SHARDS)
    names = [f"p{number}" for number in range(20)]
    async with lab.running():
        await lab.synced(*names)
        before = {key: one.value("shard_path") for key, one in lab.consul.held.items()}
        lab.consul.held.clear()
        lab.consul.failing_writes = 2
        lab.consul.foreign = Disturbance.CHANGED
        await lab.until(names)
    assert lab.consul.failing_writes == 0
    assert {key: one.value("shard_path") for key, one in lab.consul.held.items()} == before


async def test_brake_asks_for_another_list_and_lets_go() -> None:
    """A held removal asks the cluster to list again, and is done when that list agrees."""
    lab = Lab()
    for number in range(10):
        lab.consul.put_by_hand(our_pod_service(f"p{number}"))
    async with lab.running():
        lab.cluster.put_list([])
        await lab.until_so(lambda: PODS in lab.cluster.relists)
        assert len(lab.consul.held) == 10
        assert lab.value("brake_held_services") == 10
        lab.cluster.put_list([])
        await lab.until([])
        await lab.until_so(lambda: lab.value("brake_held_services") == 0)


async def test_blindness_changes_nothing_and_shows() -> None:
    """A source that fails keeps its services, stays ready, and shows in the metrics."""
    lab = Lab()
    async with lab.running():
        await lab.synced("a")
        assert lab.value("source_followed", kind="pod") == 1
        lab.cluster.mirror.fail(PODS, "403")
        await lab.until_so(lambda: lab.value("source_followed", kind="pod") == 0)
    assert list(lab.consul.held) == ["pod--shop--a"]
    assert lab.reconciler.status.readiness() == ""


async def test_blindness_shows_while_consul_is_down_too() -> None:
    """Losing both is told of both, and what was seen before is written once Consul is back."""
    lab = Lab()
    async with lab.running():
        await lab.synced("a")
        lab.consul.is_down = True
        lab.cluster.mirror.put(PODS, make_pod("b"))
        await lab.until_so(lambda: lab.value("consul_up") == 0)
        lab.cluster.mirror.put(PODS, make_pod("c"))
        lab.cluster.mirror.fail(PODS, "403")
        await lab.until_so(lambda: lab.value("source_followed", kind="pod") == 0)
        lab.consul.is_down = False
        await lab.until(["a", "b", "c"])
        assert lab.value("source_followed", kind="pod") == 0


async def test_full_reads_are_budgeted() -> None:
    """Lists that complete one after the other do not each cost a full read of Consul."""
    lab = Lab(budget=BudgetRules(burst=2, gap=60))
    async with lab.running():
        for number in range(10):
            lab.cluster.put_list([make_pod(f"p{n}") for n in range(number)])
            await asyncio.sleep(0.01)
        await lab.until([f"p{n}" for n in range(9)])
    assert lab.consul.reads <= 3


async def test_what_consul_lost_does_not_wait_for_the_budget() -> None:
    """A single change waits until Consul may be read whole again; a Consul that holds nothing is filled at once."""
    lab = Lab(budget=BudgetRules(burst=1, gap=600, urgent_gap=0.01, urgent_share=1))
    async with lab.running():
        await lab.synced("a", "b")
        lab.consul.remove_by_hand("pod--shop--a")
        await asyncio.sleep(0.3)
        assert list(lab.consul.held) == ["pod--shop--b"]
        lab.consul.held.clear()
        lab.consul.foreign = Disturbance.EMPTIED
        await lab.until(["a", "b"])


async def test_standing_problems_are_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    """A rejection is a warning when it begins, not at every pass."""
    lab = Lab(period=0.02)
    async with lab.running():
        lab.cluster.put_list([make_pod("a", ip="")])
        await lab.until_so(lambda: lab.consul.reads > 5)
    assert capsys.readouterr().out.count("no_ip") == 1


class Sweeping:
    """Somebody who sees an agent lost at each look, until told to rest."""

    def __init__(self) -> None:
        self.look_due = 0.0
        self.lost: tuple[LostAgent, ...] = ()

    async def look(self) -> bool:
        """See it."""
        self.look_due = float("inf")
        self.lost = (LostAgent("old", 1.0, 2.0, {}),)
        return True

    async def sweep(self) -> None:
        """Leave something."""
        self.lost = tuple(one._replace(stays={"held": 1}) for one in self.lost)

    def rest(self) -> None:
        """See it no more."""
        self.lost = ()


async def test_lost_agents_are_shown_by_who_leads() -> None:
    """After a look and after a sweep; a standby shows none."""
    vote = Vote(is_leader=True)
    lab = Lab(leadership=vote, sweeper=Sweeping())
    status = lab.reconciler.status
    async with lab.running():
        await lab.synced("web")
        await lab.until_so(lambda: [one.stays for one in status.lost_agents] == [{"held": 1}])
        vote.set(is_leader=False)
        await lab.until_so(lambda: status.lost_agents == ())


async def test_a_standby_writes_nothing_and_takes_over_warm() -> None:
    """It is ready once it knows the cluster, knows the shards, and on winning does what is left to do."""
    vote = Vote(is_leader=False)
    lab = Lab(leadership=vote)
    lab.consul.put_by_hand(our_pod_service("by-the-leader", shard_path="s1"))
    async with lab.running():
        lab.cluster.put_list([make_pod("a")])
        await lab.until_so(lambda: lab.reconciler.status.readiness() == "")
        await lab.until_so(lambda: lab.reconciler.passes.shard("pod--shop--by-the-leader") == "s1")
        assert lab.consul.writes == []
        assert lab.value("leader") == 0
        vote.set(is_leader=True)
        await lab.until(["a"])
        await lab.until_so(lambda: lab.value("leader") == 1)
    assert lab.value("event_lag_seconds_count") == 0


async def test_a_leader_that_lost_learns_anew_when_it_wins_again() -> None:
    """What another replica wrote meanwhile is compared, not overwritten from memory."""
    vote = Vote(is_leader=True)
    lab = Lab(leadership=vote)
    async with lab.running():
        await lab.synced("a", "b")
        vote.set(is_leader=False)
        await lab.until_so(lambda: lab.value("leader") == 0)
        writes = len(lab.consul.writes)
        lab.cluster.mirror.put(PODS, make_pod("c"))
        lab.consul.put_by_hand(our_pod_service("c"), is_noticed=False)
        lab.consul.remove_by_hand("pod--shop--a")
        await asyncio.sleep(0.05)
        assert len(lab.consul.writes) == writes
        vote.set(is_leader=True)
        await lab.until(["a", "b", "c"])
        await asyncio.sleep(0.05)
    assert lab.consul.writes[writes:] == [("register", "pod--shop--a")]


@pytest.mark.parametrize("checks_versions", [True, False])
@pytest.mark.parametrize("read_first", [0, 4])
async def test_changes_do_not_wait_for_a_full_read(checks_versions: bool, read_first: int) -> None:
    """What changes while Consul is read is written meanwhile, and what was read of it before undoes nothing.

    A Pod is added, moved, gone, gone and back; and one that Consul changed by hand is repaired at the end.
    """
    lab = Lab(checks_versions=checks_versions)
    async with lab.running():
        await lab.synced("moved", "gone", "back", "edited", "same")
        edited = lab.consul.held["pod--shop--edited"]
        lab.consul.put_by_hand(replace(edited, address="9.9.9.9"))
        lab.consul.read_first = read_first
        await lab.stall_a_full_read()
        lab.cluster.mirror.put(PODS, make_pod("added"))
        lab.cluster.mirror.put(PODS, make_pod("moved", ip="10.1.1.1"))
        lab.cluster.mirror.remove(PODS, make_pod("gone"))
        lab.cluster.mirror.remove(PODS, make_pod("back"))
        await lab.until(["moved", "edited", "same", "added"])
        await lab.until_so(lambda: lab.consul.held["pod--shop--moved"].address == "10.1.1.1")
        lab.cluster.mirror.put(PODS, make_pod("back", ip="10.1.1.2"))
        await lab.until(["moved", "back", "edited", "same", "added"])
        assert lab.consul.held["pod--shop--edited"].address == "9.9.9.9", "the read is not over"
        writes = len(lab.consul.writes)
        lab.consul.may_read_on.set()
        await lab.until_so(lambda: lab.consul.held["pod--shop--edited"].address == edited.address)
        await asyncio.sleep(0.1)
        assert lab.consul.writes[writes:] == [("register", "pod--shop--edited")]
        assert lab.consul.held["pod--shop--moved"].address == "10.1.1.1"
        assert lab.consul.held["pod--shop--back"].address == "10.1.1.2"
        # The ledger knows what was written meanwhile: the next changes go over it at the first attempt.
        lab.cluster.mirror.put(PODS, make_pod("moved", ip="10.1.1.3"))
        lab.cluster.mirror.remove(PODS, make_pod("added"))
        await lab.until(["moved", "back", "edited", "same"])
        await lab.until_so(lambda: lab.consul.held["pod--shop--moved"].address == "10.1.1.3")
        assert not lab.reconciler.status.refused


async def test_a_full_read_that_fails_keeps_what_was_written_meanwhile() -> None:
    """Consul goes away in the middle of it: what changed is right there, and again after the next full pass."""
    lab = Lab()
    async with lab.running():
        await lab.synced("a", "b")
        await lab.stall_a_full_read()
        lab.cluster.mirror.put(PODS, make_pod("c"))
        lab.cluster.mirror.remove(PODS, make_pod("a"))
        await lab.until(["b", "c"])
        lab.consul.is_down = True
        lab.consul.may_read_on.set()
        await lab.until_so(lambda: lab.value("consul_up") == 0)
        lab.consul.is_down = False
        await lab.until_so(lambda: lab.value("consul_up") == 1)
        lab.cluster.mirror.remove(PODS, make_pod("c"))
        await lab.until(["b"])
        assert not lab.reconciler.status.refused


async def test_consul_may_go_while_a_change_overtakes_a_full_read() -> None:
    """A write that fails then ends the full pass too; all is right once Consul is back."""
    lab = Lab()
    async with lab.running():
        await lab.synced("a", "b")
        await lab.stall_a_full_read()
        lab.consul.failing_writes = 1
        lab.cluster.mirror.put(PODS, make_pod("c"))
        lab.cluster.mirror.remove(PODS, make_pod("a"))
        await lab.until_so(lambda: not lab.consul.failing_writes)
        lab.consul.may_read_on.set()
        await lab.until(["b", "c"])
        await lab.until_so(lambda: lab.value("consul_up") == 1)
