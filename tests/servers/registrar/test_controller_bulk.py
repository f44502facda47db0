"""Bulk work beside changes, and the cost of one change beside much that it does not concern."""

import asyncio
import dataclasses
import gc
import time
from collections.abc import Callable

import pytest
from msgspec.structs import replace

from k8s_consul_registrar.model import Drift
from k8s_consul_registrar.registrar.brake import BrakeRules
from support.builders import make_pod, make_service, our_pod_service
from support.controller_lab import ControllerLab
from support.scripted import QUICK
from support.waiting import PATIENCE

# Seconds that each of an agent's 32 parallel writes takes at 1,000 writes a second.
AGENT_WRITE = 0.032
PROBES = 40


@pytest.mark.parametrize("work", ["removals", "deletions", "renames"])
async def test_new_pod_during_bulk_work_on_an_agent_waits_for_one_batch(work: str) -> None:
    """4,000 removals or 3,000 renames take seconds; a Pod that comes meanwhile is there long before their end.

    In a deletion the API server first sends the Pod with its `deletionTimestamp`, then its removal.
    """
    lab = ControllerLab(checks_versions=False, brake=BrakeRules(allow_mass=True))
    names = [f"p{number}" for number in range(3000 if work == "renames" else 4000)]
    for name in names:
        lab.consul.put_by_hand(our_pod_service(name))
    async with lab.running():
        await lab.synced(*names)
        lab.consul.write_seconds = AGENT_WRITE
        done = len(lab.consul.writes)
        if work != "renames":
            for name in names:
                if work == "deletions":
                    lab.cluster.put(make_pod(name, ip="198.51.100.11", deleted=True))
                lab.cluster.remove(make_pod(name))
        else:
            for service_id, service in list(lab.consul.held.items()):
                lab.consul.held[service_id] = replace(service, name="other-name")
            lab.consul.foreign = Drift.CHANGED
        await lab.until_so(lambda: len(lab.consul.writes) > done + 100)
        before = len(lab.consul.writes)
        lab.cluster.put(make_pod("urgent"))
        await lab.until_so(lambda: "urgent" in lab.names_held)
        overtaken = lab.consul.writes.index(("register", "pod--shop--urgent")) - before
    # What was in flight, and what a busy machine let through before the batch was taken.
    assert overtaken <= 10 * lab.consul.concurrency
    assert len(lab.consul.writes) - done < len(names), "the bulk work is not over"


@pytest.mark.parametrize("checks_versions", [True, False], ids=["catalog", "agent"])
@pytest.mark.parametrize("are_seen", [True, False], ids=["events", "lists"])
async def test_mass_removal_keeps_few_batches_in_flight(checks_versions: bool, are_seen: bool) -> None:
    """Consul makes one write after the other: a change waits for each removal that was sent before it."""
    lab = ControllerLab(checks_versions=checks_versions, brake=BrakeRules(allow_mass=True))
    names = [f"p{number}" for number in range(300)]
    async with lab.running():
        await lab.synced("kept", *names)
        lab.consul.write_seconds = 0.002
        if are_seen:
            for name in names:
                lab.cluster.remove(make_pod(name))
        else:
            lab.cluster.put_list([make_pod("kept")])
            await lab.until_so(lambda: bool(lab.cluster.relists))
            lab.cluster.put_list([make_pod("kept")])
        await lab.until("kept")
    assert lab.consul.most_removing == lab.consul.concurrency // 8


async def test_change_beside_a_mass_removal_is_sent_before_the_next_removals() -> None:
    """The batch under way goes first; no further one is decided while a change waits."""
    lab = ControllerLab(brake=BrakeRules(allow_mass=True))
    names = [f"p{number}" for number in range(300)]
    overtaken: list[int] = []
    async with lab.running():
        await lab.synced(*names)
        registered, before = lab.consul.register_calls, 3

        def note() -> None:
            if lab.consul.deregister_calls == before and not lab.consul.removing:
                lab.cluster.put(make_pod("urgent"))
            if lab.consul.register_calls > registered and not overtaken:
                overtaken.append(lab.consul.deregister_calls - before)

        lab.consul.before_write = note
        for name in names:
            lab.cluster.remove(make_pod(name))
        await lab.until("urgent")
    assert overtaken == [0]


@pytest.mark.parametrize("checks_versions", [True, False], ids=["catalog", "agent"])
async def test_bulk_work_is_not_starved_by_changes(checks_versions: bool) -> None:
    """However many changes come, what a resync found is repaired meanwhile."""
    lab = ControllerLab(checks_versions=checks_versions)
    names = [f"p{number}" for number in range(200)]
    async with lab.running():
        await lab.synced(*names)
        lab.consul.write_seconds = 0.005
        is_over = False

        async def churn() -> None:
            number = 0
            while not is_over:
                for _ in range(100):
                    number += 1
                    lab.cluster.put(
                        make_pod(f"c{number % 500}", ip=f"10.0.{number // 250 % 250}.{number % 250}")
                    )
                await asyncio.sleep(0.002)

        churning = asyncio.create_task(churn())
        for name in names:
            del lab.consul.held[f"pod--shop--{name}"]
        lab.consul.foreign = Drift.CHANGED
        await lab.until_so(lambda: lab.names_held >= set(names))
        is_over = True
        await churning


async def seconds_of_one_change(lab: ControllerLab) -> float:
    """Return the median of the time in which one change is decided and written, without the loop's waits."""
    times = []
    for number in range(PROBES):
        pod = make_pod("probe", ip=f"10.9.{number}.1")
        started = time.process_time()
        lab.cluster.put(pod)
        await lab.until_so(lambda: lab.consul.held["pod--shop--probe"].address == pod.ip)  # noqa: B023
        times.append(time.process_time() - started)
    return sorted(times)[PROBES // 2]


def none(_: ControllerLab) -> None:
    """Leave the lab as it is."""


def rejected(lab: ControllerLab) -> None:
    """Let 100,000 Pods be rejected."""
    bad = {"prometheus.io/scrape": "true"}
    lab.cluster.put_list(
        [make_pod("probe"), *(make_pod(f"r{number}", annotations=bad) for number in range(100_000))]
    )


def refused(lab: ControllerLab) -> None:
    """Have Consul refuse 20,000 services."""
    lab.consul.refused = {f"pod--shop--x{number}" for number in range(20_000)}
    lab.cluster.put_list([make_pod("probe"), *(make_pod(f"x{number}") for number in range(20_000))])


def foreign(lab: ControllerLab) -> None:
    """Put 50,000 services of others into Consul."""
    for number in range(50_000):
        lab.consul.put_by_hand(make_service(f"foreign-{number}"))


async def cost_beside(prepare: Callable[[ControllerLab], None]) -> float:
    """Return the CPU seconds of one change beside what a function prepares."""
    lab = ControllerLab(timing=dataclasses.replace(QUICK, retry_first=60.0), backoff_cap=600.0)
    lab.cluster.put_list([make_pod("probe")])
    prepare(lab)
    async with lab.running():
        async with asyncio.timeout(3 * PATIENCE):
            while not (lab.status.has_synced and lab.queue.in_flight == 0 and lab.queue.is_drained):
                await asyncio.sleep(0.05)
        gc.collect()
        gc.freeze()
        return await seconds_of_one_change(lab)


@pytest.mark.parametrize("prepare", [rejected, refused, foreign])
async def test_one_change_costs_as_much_beside_many_others_as_alone(
    prepare: Callable[[ControllerLab], None],
) -> None:
    """CPU follows the change, not what is rejected, refused or foreign."""
    alone = await cost_beside(none)
    beside = await cost_beside(prepare)
    # Version 0 took 27 to 100 ms; the bound is for a busy machine's noise.
    assert beside < 5 * alone + 0.005
