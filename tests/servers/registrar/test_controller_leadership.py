"""The running controller with replicas: a standby only looks, a new leader reads everything before it writes."""

import asyncio

import pytest
from msgspec.structs import replace

from k8s_consul_registrar.registrar.observed import AsDesired
from k8s_consul_registrar.registrar.schedule import ScheduleRules
from k8s_consul_registrar.registrar.status import LostAgent
from support.builders import make_pod, our_pod_service
from support.controller_lab import ControllerLab, Vote
from support.memory import PODS
from support.scripted import ATTENTIVE, QUICK

on_both = pytest.mark.parametrize("checks_versions", [True, False], ids=["catalog", "agent"])
# One read of everything in ten minutes, whatever is wanted.
NO_BUDGET = ScheduleRules(
    period=600, probe=QUICK.probe, burst=1, gap=600, urgent_gap=600, share=1e-6, urgent_share=1e-6
)


async def stood_by(lab: ControllerLab) -> None:
    """Wait until the replica stands by."""
    await lab.until_so(lambda: lab.status.is_standby)


@on_both
async def test_standby_writes_nothing_and_takes_over(checks_versions: bool) -> None:
    """It is ready once it knows the cluster, serves what the leader wrote, and writes when it wins."""
    vote = Vote(is_leader=False)
    lab = ControllerLab(checks_versions=checks_versions, leadership=vote)
    lab.consul.put_by_hand(our_pod_service("by-the-leader", shard_path="s1"))
    async with lab.running():
        lab.cluster.put_list([make_pod("a"), make_pod("by-the-leader")])
        await lab.until_so(lambda: lab.status.readiness() == "")
        await lab.until_so(lambda: lab.observed.shard("pod--shop--by-the-leader") == "s1")
        assert lab.consul.writes == []
        assert (lab.value("leader"), len(lab.queue)) == (0, 0)
        vote.decide(is_leader=True)
        await lab.until("a", "by-the-leader")
        await lab.until_so(lambda: lab.value("leader") == 1)
    assert lab.value("event_lag_seconds_count") == 0


@on_both
async def test_standby_keeps_services_as_a_leader_does(checks_versions: bool) -> None:
    """A service that this replica would have written likewise is kept as the target itself, not as a second record."""
    lab = ControllerLab(
        checks_versions=checks_versions,
        leadership=Vote(is_leader=False),
        timing=ATTENTIVE,
    )
    for name in "abc":
        lab.consul.put_by_hand(our_pod_service(name))
    lab.cluster.put_list([make_pod(name) for name in "abc"])
    async with lab.running():
        await lab.until_so(lambda: (lab.observed.registered, lab.observed.others) == (3, 0))
        # A change is followed once the leader has written it.
        lab.cluster.put(make_pod("b", ip="10.9.9.9"))
        lab.consul.put_by_hand(replace(our_pod_service("b"), address="10.9.9.9"))
        await lab.until_so(
            lambda: (
                isinstance(it := lab.observed.get("pod--shop--b"), AsDesired)
                and it.target.address == "10.9.9.9"
            )
        )
    assert (lab.consul.writes, len(lab.queue), len(lab.contests)) == ([], 0, 0)


@on_both
async def test_what_another_leader_wrote_is_no_contest(checks_versions: bool) -> None:
    """Replicas that lead in turn, and each write what changes, have one identity and are no strangers."""
    vote = Vote(is_leader=True)
    lab = ControllerLab(checks_versions=checks_versions, leadership=vote, timing=ATTENTIVE)
    async with lab.running():
        await lab.synced("a")
        for number in range(3):
            vote.decide(is_leader=False)
            await stood_by(lab)
            address = f"10.9.9.{number}"
            lab.cluster.put(make_pod("a", ip=address))
            lab.consul.put_by_hand(replace(our_pod_service("a"), address=address))
            if number % 2:  # seen while it stands by, or only by the first read as a leader
                reads = lab.consul.reads + 1
                await lab.until_so(lambda reads=reads: lab.consul.reads > reads)  # type: ignore[misc]
            vote.decide(is_leader=True)
            await lab.until_so(lambda: not lab.status.is_standby)
            await lab.resynced()
        assert (len(lab.contests), lab.status.conflicts) == (0, {})
        lab.cluster.put(make_pod("a", ip="10.9.9.9"))
        await lab.until_so(lambda: lab.consul.held["pod--shop--a"].address == "10.9.9.9")


@on_both
async def test_leader_that_lost_compares_everything_when_it_wins_again(checks_versions: bool) -> None:
    """Services that another replica wrote meanwhile are compared, not overwritten from memory."""
    vote = Vote(is_leader=True)
    lab = ControllerLab(checks_versions=checks_versions, leadership=vote)
    async with lab.running():
        await lab.synced("a", "b")
        vote.decide(is_leader=False)
        await stood_by(lab)
        writes = len(lab.consul.writes)
        lab.cluster.put(make_pod("c"))
        lab.consul.put_by_hand(our_pod_service("c"), is_noticed=False)
        lab.consul.remove_by_hand("pod--shop--a")
        await asyncio.sleep(0.05)
        assert len(lab.consul.writes) == writes
        vote.decide(is_leader=True)
        await lab.until("a", "b", "c")
        await lab.resynced()
    assert lab.consul.writes[writes:] == [("register", "pod--shop--a")]


@on_both
async def test_leader_that_wins_again_writes_nothing_before_everything_was_read(
    checks_versions: bool,
) -> None:
    """Its knowledge is outdated, so even a fresh event waits for the read."""
    vote = Vote(is_leader=True)
    lab = ControllerLab(checks_versions=checks_versions, leadership=vote)
    async with lab.running():
        await lab.synced("a", "b")
        vote.decide(is_leader=False)
        await stood_by(lab)
        writes = len(lab.consul.writes)
        lab.consul.may_read_on.clear()
        vote.decide(is_leader=True)
        await lab.until_so(lambda: not lab.status.is_standby)
        lab.cluster.put(make_pod("c"))
        lab.cluster.remove(make_pod("a"))
        await asyncio.sleep(0.1)
        assert len(lab.consul.writes) == writes
        lab.consul.may_read_on.set()
        await lab.until("b", "c")


@on_both
async def test_leading_again_waits_for_no_budget(checks_versions: bool) -> None:
    """Each time the lead is won, everything is read at once, however often that happens."""
    vote = Vote(is_leader=True)
    lab = ControllerLab(checks_versions=checks_versions, leadership=vote, schedule=NO_BUDGET)
    names = ["a"]
    async with lab.running():
        await lab.synced("a")
        for number in range(6):
            vote.decide(is_leader=False)
            await stood_by(lab)
            names.append(f"b{number}")
            lab.cluster.put(make_pod(names[-1]))
            vote.decide(is_leader=True)
            await lab.until(*names)
            await lab.until_so(lambda: not lab.status.is_standby)


@on_both
async def test_removals_seen_while_standing_by_are_made_by_the_next_leader(checks_versions: bool) -> None:
    """A departure that a synced source saw is a fact for the new leader."""
    vote = Vote(is_leader=False)
    lab = ControllerLab(checks_versions=checks_versions, leadership=vote)
    for name in "abcdef":
        lab.consul.put_by_hand(our_pod_service(name))
    lab.cluster.put_list([make_pod(name) for name in "abcdef"])
    async with lab.running():
        await lab.until_so(lambda: lab.status.has_synced and lab.observed.is_complete)
        for name in "abcde":
            lab.cluster.remove(make_pod(name))
        vote.decide(is_leader=True)
        await lab.until("f")


@on_both
async def test_blind_new_leader_keeps_a_living_pods_service(checks_versions: bool) -> None:
    """While its source has failed or is catching up, what the old leader wrote is not taken for gone."""
    vote = Vote(is_leader=False)
    lab = ControllerLab(checks_versions=checks_versions, leadership=vote)
    for name in "abcd":
        lab.consul.put_by_hand(our_pod_service(name))
    lab.cluster.put_list([make_pod(name) for name in "abcd"])
    async with lab.running():
        await lab.until_so(lambda: lab.status.has_synced)
        lab.cluster.store.fail(PODS, "cut off", "cut")
        lab.consul.put_by_hand(our_pod_service("x"))
        vote.decide(is_leader=True)
        await lab.until_so(lambda: not lab.status.is_standby)
        await lab.resynced()
        assert lab.names_held == {*"abcdx"}
        lab.cluster.store.resume(PODS, "150")
        await lab.resynced()
        assert lab.names_held == {*"abcdx"}
        lab.cluster.put(make_pod("x"))
        lab.cluster.store.caught_up(PODS)
        await lab.resynced()
    assert lab.names_held == {*"abcdx"}
    assert lab.consul.writes == []


@on_both
async def test_pod_that_is_gone_when_a_blind_leader_sees_again_is_removed(checks_versions: bool) -> None:
    """Once the source has caught up, and the object is confirmed absent by name, its service goes."""
    vote = Vote(is_leader=False)
    lab = ControllerLab(checks_versions=checks_versions, leadership=vote)
    for name in "abcdx":
        lab.consul.put_by_hand(our_pod_service(name))
    lab.cluster.put_list([make_pod(name) for name in "abcd"])
    async with lab.running():
        await lab.until_so(lambda: lab.status.has_synced)
        lab.cluster.store.fail(PODS, "cut off", "cut")
        vote.decide(is_leader=True)
        await lab.until_so(lambda: not lab.status.is_standby)
        await lab.resynced()
        assert lab.names_held == {*"abcdx"}
        lab.cluster.store.resume(PODS, "150")
        lab.cluster.store.caught_up(PODS)
        await lab.until(*"abcd")
    assert lab.cluster.reads[-1] == make_pod("x").key


async def test_departure_seen_while_another_led_is_not_trusted_by_a_blind_leader() -> None:
    """The Pod may have come back since, and the old leader may have registered it again."""
    vote = Vote(is_leader=False)
    lab = ControllerLab(leadership=vote)
    for name in "abcd":
        lab.consul.put_by_hand(our_pod_service(name))
    lab.cluster.put_list([make_pod(name) for name in "abcd"])
    async with lab.running():
        await lab.until_so(lambda: lab.status.has_synced and lab.observed.is_complete)
        lab.cluster.remove(make_pod("a"))
        lab.cluster.store.fail(PODS, "cut off", "cut")
        vote.decide(is_leader=True)
        await lab.until_so(lambda: not lab.status.is_standby)
        await lab.resynced()
        assert lab.names_held == {*"abcd"}
        lab.cluster.remove(make_pod("b"))
        await lab.until(*"acd")


async def test_churn_while_standing_by_leaves_nothing_behind() -> None:
    """Neither departures nor queued IDs grow with what comes and goes."""
    lab = ControllerLab(leadership=Vote(is_leader=False))
    lab.cluster.put_list([make_pod("good")])
    async with lab.running():
        await lab.until_so(lambda: lab.status.has_synced and lab.observed.is_complete)
        for number in range(20_000):
            pod = make_pod(f"job-{number}")
            lab.cluster.put(pod)
            lab.cluster.remove(pod)
            if number % 500 == 0:
                await asyncio.sleep(0)
        assert (lab.desired.departures, len(lab.queue)) == (0, 0)
        assert len(lab.desired.claims) == 1


async def test_departures_on_a_standby_end_by_its_next_read() -> None:
    """A standby sees what the leader wrote and removed, so that nothing piles up."""
    lab = ControllerLab(leadership=Vote(is_leader=False))
    names = [f"p{number}" for number in range(200)]
    for name in names:
        lab.consul.put_by_hand(our_pod_service(name))
    lab.cluster.put_list([make_pod(name) for name in names])
    async with lab.running():
        await lab.until_so(lambda: lab.status.has_synced and lab.observed.is_complete)
        for name in names:
            lab.cluster.remove(make_pod(name))
        assert lab.desired.departures == 200
        lab.consul.held.clear()
        lab.clock.skip(QUICK.standby_look)
        await lab.until_so(lambda: lab.desired.departures == 0)
    assert lab.consul.writes == []


class Collecting:
    """An orphan collector that sees an agent lost at each look, until it rests."""

    def __init__(self) -> None:
        self.look_due = 0.0
        self.lost: tuple[LostAgent, ...] = ()

    async def look(self) -> bool:
        """See it."""
        self.look_due = float("inf")
        self.lost = (LostAgent("old", 1.0, 2.0, {}),)
        return True

    async def collect(self) -> None:
        """Leave something."""
        self.lost = tuple(one._replace(stays={"held": 1}) for one in self.lost)

    def rest(self) -> None:
        """See it no more."""
        self.lost = ()


async def test_lost_agents_are_shown_by_the_leader_only() -> None:
    """After a look and after a collection they are shown; a standby shows none."""
    vote = Vote(is_leader=True)
    lab = ControllerLab(leadership=vote, upkeep=(Collecting(),))
    async with lab.running():
        await lab.synced("web")
        await lab.until_so(lambda: [one.stays for one in lab.status.lost_agents] == [{"held": 1}])
        vote.decide(is_leader=False)
        await lab.until_so(lambda: lab.status.lost_agents == ())


async def test_standby_does_not_show_what_it_reported_as_leader() -> None:
    """Refusals, conflicts and held removals are the new leader's to show."""
    vote = Vote(is_leader=True)
    lab = ControllerLab(leadership=vote)
    lab.consul.put_by_hand(our_pod_service("taken", cluster="other"))
    lab.consul.refused = {"pod--shop--bad"}
    lab.cluster.put_list([make_pod("a"), make_pod("bad"), make_pod("taken")])
    async with lab.running():
        await lab.until_so(lambda: bool(lab.status.conflicts and lab.status.refused))
        vote.decide(is_leader=False)
        await stood_by(lab)
        assert (lab.status.conflicts, lab.status.refused, lab.value("conflicts")) == ({}, {}, 0)
        vote.decide(is_leader=True)
        await lab.until_so(lambda: bool(lab.status.conflicts and lab.status.refused))
