"""The running controller while Consul fails: the outage shows, nothing is lost, and nothing is hammered."""

import asyncio
import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import pytest
import structlog

from k8s_consul_registrar.model import Drift
from support.builders import make_pod
from support.controller_lab import ControllerLab
from support.memory import PODS
from support.scripted import QUICK
from support.waiting import slept

on_both = pytest.mark.parametrize("checks_versions", [True, False], ids=["catalog", "agent"])
# Backoff that grows past what a test waits.
GROWING = dataclasses.replace(QUICK, retry_first=0.02, retry_cap=60.0)
# The loop looks by itself only after longer than a test waits.
UNTICKED = dataclasses.replace(QUICK, tick=600.0)


def count(lines: Iterable[Mapping[str, Any]], event: str) -> int:
    """Return how many log lines tell of an event."""
    return sum(line["event"] == event for line in lines)


@on_both
@pytest.mark.parametrize("has_changes", [False, True], ids=["at rest", "with changes"])
async def test_consul_up_during_an_outage_stays_0(checks_versions: bool, has_changes: bool) -> None:
    """From its first failure to its end the outage shows in the metric, in one log line and in no success."""
    lab = ControllerLab(checks_versions=checks_versions)
    with structlog.testing.capture_logs() as lines:
        async with lab.running():
            await lab.synced("a")
            await lab.until_so(lambda: lab.value("consul_up") == 1)
            lines.clear()
            lab.consul.is_down = True
            if has_changes:
                lab.cluster.put(make_pod("b"))
            await lab.until_so(lambda: lab.value("consul_up") == 0)
            success = (
                lab.value("last_success_timestamp_seconds"),
                lab.value("last_full_pass_timestamp_seconds"),
                lab.value("passes_total", outcome="success"),
            )
            for number in range(50):
                # An object that is rejected is decided without a request; that is no success either.
                lab.cluster.put(make_pod(f"bad{number}", ip=""))
                await asyncio.sleep(0.01)
                assert lab.value("consul_up") == 0
            assert success == (
                lab.value("last_success_timestamp_seconds"),
                lab.value("last_full_pass_timestamp_seconds"),
                lab.value("passes_total", outcome="success"),
            )
            lab.consul.is_down = False
            await lab.until_so(lambda: lab.value("consul_up") == 1)
    assert count(lines, "Consul cannot be used; trying again") == 1
    assert count(lines, "Consul can be used again") == 1
    assert lab.status.consul_problem == ""


@on_both
async def test_retries_during_an_outage_come_ever_more_rarely(checks_versions: bool) -> None:
    """Backoff grows from one failure to the next, though objects change and nothing is left to write."""
    lab = ControllerLab(checks_versions=checks_versions, timing=GROWING)
    async with lab.running():
        await lab.synced("a")
        attempts: list[float] = []
        drift = lab.consul.drift

        async def noting() -> Drift:
            attempts.append(lab.clock())
            return await drift()

        lab.consul.drift = noting  # type: ignore[method-assign] # to see when it is called
        lab.consul.is_down = True
        longer = 0.0
        for number in range(60):
            lab.cluster.put(make_pod(f"bad{number}", ip=""))
            longer += await slept(0.02) / 60
        failures = lab.value("passes_total", outcome="failure")
    # 0.02 s doubled for 1.2 s is at most 8 waits of half their length.
    assert 2 <= failures <= 9 * longer
    assert len(attempts) <= 10 * longer


@on_both
@pytest.mark.parametrize("has_changes", [False, True], ids=["at rest", "with changes"])
async def test_retry_comes_when_its_backoff_is_over(checks_versions: bool, has_changes: bool) -> None:
    """Nothing else has to wake the loop: neither the first read nor a later probe or batch waits for a tick."""
    lab = ControllerLab(checks_versions=checks_versions, timing=UNTICKED)
    lab.consul.is_down = True
    async with lab.running():
        lab.cluster.put_list([make_pod("a")])
        await lab.until_so(lambda: lab.value("passes_total", outcome="failure") >= 2)
        lab.consul.is_down = False
        await lab.until("a")
        await lab.until_so(lambda: lab.value("consul_up") == 1)
        lab.consul.is_down = True
        if has_changes:
            lab.cluster.put(make_pod("b"))
        await lab.until_so(lambda: lab.value("consul_up") == 0)
        lab.consul.is_down = False
        await lab.until_so(lambda: lab.value("consul_up") == 1)
        await lab.until(*(["a", "b"] if has_changes else ["a"]))


@on_both
@pytest.mark.parametrize("fails", ["everything", "writes"])
async def test_consul_that_fails_before_the_first_sync_is_not_hammered(
    checks_versions: bool, fails: str
) -> None:
    """Without one success, too, reads and writes wait for a backoff that grows."""
    lab = ControllerLab(checks_versions=checks_versions, timing=GROWING)
    lab.consul.is_down = fails == "everything"
    lab.consul.failing_writes = 10**9 if fails == "writes" else 0
    with structlog.testing.capture_logs() as lines:
        async with lab.running():
            lab.cluster.put_list([make_pod(f"p{number}") for number in range(40)])
            await lab.until_so(lambda: lab.value("passes_total", outcome="failure") >= 1)
            longer = 0.0
            for number in range(60):
                lab.cluster.put(make_pod(f"q{number}"))
                longer += await slept(0.02) / 60
            assert lab.value("consul_up") == 0
            assert not lab.status.has_synced
            assert "not synced yet: Consul" in lab.status.readiness()
            requests = lab.consul.reads + lab.consul.register_calls
            assert lab.consul.reads <= 10 * longer
            # A window of batches may fail together before the gate closes.
            assert requests <= 10 * longer * (1 + lab.consul.concurrency)
            lab.consul.is_down, lab.consul.failing_writes = False, 0
    assert count(lines, "Consul cannot be used; trying again") == 1


@on_both
async def test_changes_during_an_outage_are_written_after_it(checks_versions: bool) -> None:
    """Events that come while Consul is down are not lost, deletions and dropped annotations among them."""
    lab = ControllerLab(checks_versions=checks_versions)
    async with lab.running():
        await lab.synced("a", "b", "c")
        lab.consul.is_down = True
        lab.cluster.put(make_pod("d"))
        await lab.until_so(lambda: lab.value("consul_up") == 0)
        lab.cluster.remove(make_pod("a"))
        lab.cluster.put(make_pod("b", annotations={}))
        lab.cluster.put(make_pod("e"))
        lab.cluster.remove(make_pod("e"))
        await asyncio.sleep(0.1)
        lab.consul.is_down = False
        await lab.until("c", "d")
        await lab.until_so(lambda: lab.desired.departures == 0)
        await lab.until_so(lambda: lab.value("consul_up") == 1)
    assert lab.value("internal_errors_total") == 0


@on_both
async def test_first_sync_survives_an_outage(checks_versions: bool) -> None:
    """Once Consul is back the sync is made, without the help of a change."""
    lab = ControllerLab(checks_versions=checks_versions)
    lab.consul.is_down = True
    async with lab.running():
        lab.cluster.put_list([make_pod("a")])
        await lab.until_so(lambda: lab.consul.reads >= 3)
        assert "Consul is down" in lab.status.readiness()
        lab.consul.is_down = False
        await lab.until("a")
        await lab.until_so(lambda: lab.status.has_synced)
        await lab.until_so(lambda: lab.value("consul_up") == 1)


@on_both
async def test_failed_write_is_looked_up_before_the_next(checks_versions: bool) -> None:
    """It may have been made though no answer came, so what is under the ID is read first."""
    lab = ControllerLab(checks_versions=checks_versions)
    async with lab.running():
        await lab.synced("a", "b")
        lab.consul.failing_writes = 1
        lab.cluster.remove(make_pod("a"))
        await lab.until("b")
        assert "pod--shop--a" in lab.consul.lookups
        lab.consul.failing_writes = 1
        lab.cluster.put(make_pod("c"))
        await lab.until("b", "c")
    assert "pod--shop--c" in lab.consul.lookups


@on_both
async def test_outage_during_a_resync_keeps_what_was_written_meanwhile(checks_versions: bool) -> None:
    """A read that fails proves nothing: known records stay, and the next resync is complete."""
    lab = ControllerLab(checks_versions=checks_versions)
    async with lab.running():
        await lab.synced("a", "b")
        reads = lab.consul.reads
        lab.consul.may_read_on.clear()
        lab.consul.read_first = 1
        lab.consul.foreign = Drift.CHANGED
        await lab.until_so(lambda: lab.consul.reads > reads)
        lab.cluster.put(make_pod("c"))
        lab.cluster.remove(make_pod("a"))
        await lab.until("b", "c")
        lab.consul.is_down = True
        lab.consul.may_read_on.set()
        await lab.until_so(lambda: lab.value("consul_up") == 0)
        lab.consul.is_down = False
        await lab.until_so(lambda: lab.value("consul_up") == 1)
        lab.cluster.remove(make_pod("c"))
        await lab.until("b")
        await lab.resynced()
    assert lab.names_held == {"b"}
    assert not lab.status.refused


@on_both
async def test_sources_and_consul_that_fail_together_both_show(checks_versions: bool) -> None:
    """Each is reported by itself, and what was seen before is written once Consul is back."""
    lab = ControllerLab(checks_versions=checks_versions)
    async with lab.running():
        await lab.synced("a")
        assert lab.value("source_followed", kind="pod") == 1
        lab.consul.is_down = True
        lab.cluster.put(make_pod("b"))
        await lab.until_so(lambda: lab.value("consul_up") == 0)
        lab.cluster.put(make_pod("c"))
        lab.cluster.store.fail(PODS, "403", "forbidden")
        await lab.until_so(lambda: lab.value("source_followed", kind="pod") == 0)
        lab.consul.is_down = False
        await lab.until("a", "b", "c")
        assert lab.value("source_followed", kind="pod") == 0
        assert lab.status.readiness() == ""


@on_both
async def test_one_service_that_consul_never_takes_blocks_no_other(checks_versions: bool) -> None:
    """The registry reports a 5xx of one service as its failure: others are written, and it is once Consul can."""
    lab = ControllerLab(checks_versions=checks_versions)
    async with lab.running():
        await lab.synced("a")
        lab.consul.refused = {"pod--shop--bad"}
        lab.cluster.put(make_pod("bad"))
        for number in range(20):
            lab.cluster.put(make_pod(f"n{number}"))
        await lab.until("a", *(f"n{number}" for number in range(20)))
        for number in range(10):
            lab.cluster.remove(make_pod(f"n{number}"))
            lab.cluster.put(make_pod(f"m{number}"))
            await lab.until_so(lambda: f"m{number}" in lab.names_held)  # noqa: B023 - awaited in the turn
        await lab.until("a", *(f"n{n}" for n in range(10, 20)), *(f"m{n}" for n in range(10)))
        await lab.until_so(lambda: "pod--shop--bad" in lab.status.refused)
        lab.consul.refused.clear()
        await lab.until_so(lambda: "bad" in lab.names_held)
        await lab.until_so(lambda: not lab.status.refused)


@on_both
async def test_service_that_consul_refuses_delays_no_retry_of_another(checks_versions: bool) -> None:
    """Backoff belongs to one ID: a second refused service starts with the shortest wait."""
    lab = ControllerLab(checks_versions=checks_versions, timing=dataclasses.replace(QUICK, retry_first=0.01))
    async with lab.running():
        await lab.synced("good")
        lab.consul.refused = {"pod--shop--bad"}
        lab.cluster.put(make_pod("bad"))
        await lab.until_so(lambda: lab.value("writes_total", verb="register", outcome="refused") >= 8)
        # The next wait of `bad` is more than a second by now.
        lab.consul.refused |= {"pod--shop--once"}
        lab.cluster.put(make_pod("once"))
        await lab.until_so(lambda: "pod--shop--once" in lab.status.refused)
        lab.consul.refused -= {"pod--shop--once"}
        due = lab.queue.next_due(lab.clock())
        await lab.until("good", "once")
    assert due - lab.clock() < 1.0
    assert not math.isinf(due)
    assert set(lab.status.refused) == {"pod--shop--bad"}


@on_both
async def test_refused_service_is_written_by_a_change_of_its_own(checks_versions: bool) -> None:
    """A new state is tried at once, whatever the backoff, and nothing is owed afterwards."""
    lab = ControllerLab(checks_versions=checks_versions, timing=dataclasses.replace(QUICK, retry_first=30.0))
    async with lab.running():
        await lab.synced("good")
        lab.consul.refused = {"pod--shop--bad"}
        lab.cluster.put(make_pod("bad"))
        await lab.until_so(lambda: "pod--shop--bad" in lab.status.refused)
        assert not lab.controller.is_complete
        lab.consul.refused = set()
        lab.cluster.put(make_pod("bad", ip="10.1.1.1"))
        await lab.until("bad", "good")
        await lab.until_so(lambda: lab.controller.is_complete)


@on_both
async def test_refused_services_whose_pods_go_leave_nothing_behind(checks_versions: bool) -> None:
    """Neither the status, nor the queue, nor a departure remembers them."""
    lab = ControllerLab(checks_versions=checks_versions)
    async with lab.running():
        await lab.synced("good")
        for step in range(4):
            names = [f"job-{step}-{number}" for number in range(50)]
            lab.consul.refused = {f"pod--shop--{name}" for name in names}
            for name in names:
                lab.cluster.put(make_pod(name))
            await lab.until_so(lambda: len(lab.status.refused) == 50)
            for name in names:
                lab.cluster.remove(make_pod(name))
            await lab.until_so(lambda: not lab.status.refused)
        await lab.resynced()
        await lab.until_so(lambda: len(lab.queue) == 0)
    assert lab.desired.departures == 0
    assert lab.names_held == {"good"}
