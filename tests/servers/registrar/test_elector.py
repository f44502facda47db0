"""`registrar.elector` on an API server: who leads, who takes over when, and what stops writing when.

Run on the sandbox, or on a real API server where `KUBEBUILDER_ASSETS` names one.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import structlog

from k8s_consul_registrar.kube.cluster import LeaseClient
from k8s_consul_registrar.model import Lease
from k8s_consul_registrar.registrar.elector import Elector, clock
from support.cluster import MERGE_PATCH, Rules
from support.contender import LONG, TIMING
from support.election import RETRY, Polls, Replica, running_polls
from support.waiting import PATIENCE, SLACK, until


@pytest.fixture
async def polls(tmp_path: Path) -> AsyncIterator[Polls]:
    """Run a cluster with a namespace for one election."""
    async with running_polls(tmp_path) as polls:
        yield polls


async def test_of_two_one_leads(polls: Polls) -> None:
    """The first to write the record leads and goes on leading; the other knows which replica leads."""
    async with polls.leader("a", timing=LONG) as a, polls.replica("b", timing=LONG) as b:
        await b.sees("a")
        for _ in range(30):
            await asyncio.sleep(0.1)
            assert a.elector.is_leader
            assert not b.elector.is_leader
            assert b.elector.writes_until < time.monotonic() < a.elector.writes_until
        assert (a.elector.holder, b.elector.holder) == ("a", "a")
        record = await polls.record()
    assert (record["holderIdentity"], record["leaseDurationSeconds"]) == ("a", LONG.lease_duration)
    assert record["renewTime"] > record["acquireTime"]
    assert record["leaseTransitions"] == 0


async def test_orderly_end_hands_over_at_once(polls: Polls) -> None:
    """Cancelling gives the lease back, and the other leads within a retry, not after the lease's duration."""
    async with polls.leader("a") as a, polls.replica("b") as b:
        await b.sees("a")
        await a.end()
        assert not a.elector.is_leader
        assert await b.leads() <= RETRY + SLACK
        assert (await polls.record())["leaseTransitions"] == 1
    assert (await polls.record())["holderIdentity"] == ""
    assert (await polls.record())["leaseDurationSeconds"] == 1


@pytest.mark.parametrize("fault", ["refuse", "stall"])
async def test_leader_cut_off_stops_before_another_starts(polls: Polls, fault: str) -> None:
    """Without an API server, or with one that is silent, a leader stops at its deadline by itself."""
    async with (
        polls.door() as door,
        polls.leader("a", address=door.address) as a,
        polls.replica("b") as b,
    ):
        await b.sees("a")
        began = time.monotonic()
        getattr(door, fault)()
        lost = await a.yields()
        assert not b.elector.is_leader
        assert lost <= TIMING.renew_deadline + SLACK
        await b.leads()
        assert time.monotonic() - began <= TIMING.lease_duration + RETRY + SLACK
        assert not a.elector.is_leader
        await door.heal()
        await asyncio.sleep(2 * RETRY)
        assert (a.elector.is_leader, b.elector.is_leader) == (False, True)
        assert a.elector.holder == "b"


async def test_short_outage_costs_no_leadership(polls: Polls) -> None:
    """Errors before the deadline are tried again, and the leader never stops."""
    async with polls.door() as door, polls.leader("a", address=door.address, timing=LONG) as a:
        door.refuse()
        heals_at = time.monotonic() + LONG.renew_deadline / 2
        while time.monotonic() < heals_at:
            assert a.elector.is_leader
            await asyncio.sleep(0.01)
        await door.heal()
        for _ in range(200):
            assert a.elector.is_leader
            await asyncio.sleep(0.01)


class HangingOnce:
    """A Lease whose first renewal is never answered, as when a connection dies without a sign."""

    def __init__(self, leases: LeaseClient) -> None:
        self._leases = leases
        self.has_hung = False
        self.get = leases.get
        self.create = leases.create

    async def update(self, lease: Lease) -> Lease:
        """Hang, or update."""
        if not self.has_hung:
            self.has_hung = True
            await asyncio.sleep(3600)
        return await self._leases.update(lease)


async def test_renewal_that_hangs_leaves_time_for_another(polls: Polls) -> None:
    """A request gets half the renew deadline, so one dead connection costs no leadership."""
    async with polls.client() as client:
        leases = HangingOnce(client)
        elector = Elector(leases, "a", LONG)
        a = Replica(elector, asyncio.create_task(elector.run()))
        try:
            await elector.changed()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(1.5 * LONG.renew_deadline):
                    await elector.changed()
            assert (elector.is_leader, leases.has_hung) == (True, True)
        finally:
            await a.end()


async def test_suspended_machine_wakes_up_without_leadership(polls: Polls) -> None:
    """Leadership is judged by the clock at the moment it is asked for, before any timer has run."""
    asleep = 0.0
    async with polls.leader("a", clock=lambda: clock() + asleep) as a:
        asleep = 60.0
        assert not a.elector.is_leader
        assert a.elector.writes_until < time.monotonic()


async def test_changes_are_announced(polls: Polls) -> None:
    """Winning and losing each wake who waits for it, once."""
    async with polls.door() as door, polls.replica("a", address=door.address, timing=LONG) as a:
        async with asyncio.timeout(PATIENCE):
            await a.elector.changed()
        assert a.elector.is_leader
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(3 * LONG.retry_period):
                await a.elector.changed()
        door.refuse()
        async with asyncio.timeout(PATIENCE):
            await a.elector.changed()
        assert not a.elector.is_leader


async def test_end_without_an_api_server_is_bounded(polls: Polls) -> None:
    """Giving back is tried for a retry period and no longer; the lease then expires."""
    async with polls.door() as door, polls.leader("a", address=door.address) as a, polls.replica("b") as b:
        await b.sees("a")
        door.stall()
        began = time.monotonic()
        await a.end()
        assert time.monotonic() - began < TIMING.retry_period + SLACK
        assert not a.elector.is_leader
        assert await b.leads() <= TIMING.lease_duration + RETRY + SLACK


async def test_deleted_lease_is_created_again(polls: Polls) -> None:
    """A `kubectl delete` of the Lease costs at most a moment, and one leads afterwards."""
    async with polls.leader("a") as a, polls.replica("b") as b:
        await b.sees("a")
        await polls.cluster.request("DELETE", polls.path)
        await asyncio.sleep(TIMING.lease_duration + 2 * RETRY)

        async def has_one_leader() -> bool:
            leaders = [name for name, one in (("a", a), ("b", b)) if one.elector.is_leader]
            assert len(leaders) < 2
            return leaders == [(await polls.record())["holderIdentity"]]

        await until(has_one_leader)


async def test_lease_taken_by_hand_is_lost(polls: Polls) -> None:
    """A holder written over our name ends our leadership at the next renewal."""
    async with polls.leader("a") as a:
        patch = {"spec": {"holderIdentity": "somebody", "leaseDurationSeconds": 3}}
        await polls.cluster.request("PATCH", polls.path, patch, content_type=MERGE_PATCH)
        assert await a.yields() <= TIMING.retry_period + SLACK
        assert await a.leads() >= 2.5


async def test_label_on_the_lease_stays(polls: Polls) -> None:
    """Renewals write over the version they read, and keep what others put into the object."""
    async with polls.leader("a", timing=LONG) as a:
        patch = {"metadata": {"labels": {"team": "x"}}}
        await polls.cluster.request("PATCH", polls.path, patch, content_type=MERGE_PATCH)
        before = (await polls.record())["renewTime"]

        async def is_renewed() -> bool:
            return bool((await polls.record())["renewTime"] > before)

        await until(is_renewed)
        assert a.elector.is_leader
        lease = await polls.cluster.request("GET", polls.path)
    assert lease["metadata"]["labels"] == {"team": "x"}


async def test_missing_right_is_logged_once(polls: Polls) -> None:
    """A replica without rights never leads, goes on trying, and says what to grant."""
    rules: Rules = [{"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": ["get"]}]
    with structlog.testing.capture_logs() as logs:
        async with polls.replica("a", rules=rules) as a:
            await until(lambda: bool(logs))
            await asyncio.sleep(4 * RETRY)
            assert not a.elector.is_leader
            assert not a.task.done()
    problems = [line["problem"] for line in logs if line["log_level"] == "warning"]
    assert len(problems) == 1
    assert "grant create on leases.coordination.k8s.io" in problems[0]
