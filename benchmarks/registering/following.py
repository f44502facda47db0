"""The scenarios of a registrar that starts and then follows what changes."""

import asyncio
import contextlib
import time
from collections.abc import Sequence

from k8s_consul_registrar.sandbox.synthetic import NAMESPACES
from registering import bare_limit
from registering.bench import Bench, Measured, milliseconds, targets_of
from registering.churn import (
    Churn,
    PodName,
    annotated_pods,
    change_only,
    churn,
    create_pod,
    delete_namespaces,
    delete_pods,
    is_annotated,
    until_at_agent,
)
from registering.observing import (
    count_of,
    filled,
    put_services,
    require,
    services_of,
    session_with,
    until_count,
)
from registering.processes import BenchmarkError, consul, wait_until
from registering.stage import Api, Checkout, Registrar, registrar, sandbox_api
from registering.stalls import stalls

RATE = 50.0  # changes a second
DELETIONS = 4000.0  # deletions a second: all at once, as far as the API server can answer others meanwhile
_RESYNC_PERIOD = 5  # seconds between resyncs that are meant to be beside changes
_REST_PERIOD = 10  # seconds between resyncs while nothing else happens
_EDITS = 3
_EDITED_PORT = 9
_AFTER = 0.3  # seconds after an event that still count as beside it
_BEFORE_RESYNC = 1.5  # seconds before a resync's end that count as beside it
_REPAIRED_WITHIN = 60.0
_NEW_PODS = 15


async def cold_start(bench: Bench, checkout: Checkout, size: int, backend: str) -> Measured:
    """Measure the time from process start until Consul has everything."""
    api, targets = await bench.api(size), targets_of(size)
    async with consul() as address:
        async with registrar(bench.folder, checkout, api, address, backend=backend) as run:
            seconds = await filled(address, run, backend, targets)
            cpu, peak = run.program.cpu_seconds, run.program.peak_mb
        services = await services_of(address, backend) if bench.with_limits else []
    notes = [f"{cpu:.2f} s of its CPU", f"peak {peak:.0f} MB"]
    if services:
        notes += await bare_limit.beside(bench.folder, checkout, api, services, backend=backend, took=seconds)
    return Measured({"cold": seconds}, tuple(notes))


async def steady(bench: Bench, checkout: Checkout, size: int) -> Measured:
    """Let a registrar start and follow changes: first watched for stalls, then alone."""
    api, pods = await bench.api(size), annotated_pods(size)
    async with consul() as address, registrar(bench.folder, checkout, api, address) as run:
        async with stalls(run) as at_start:
            await filled(address, run, "catalog", targets_of(size))
            await run.until_resync()
        await asyncio.sleep(2)
        half = max(1, min(int(RATE * bench.seconds), len(pods) // 2))
        async with stalls(run) as in_changes:
            await churn(api, address, pods[:half], rate=RATE, seconds=bench.seconds / 2)
        # Alone: answering /healthz fifty times a second costs a quarter of what following changes does.
        cpu = run.program.cpu_seconds
        changes = await churn(api, address, pods[half:], rate=RATE, seconds=bench.seconds)
        cpu = (run.program.cpu_seconds - cpu) / changes.seconds
        peak = run.program.peak_mb
    figures = {
        "p50": changes.percentile(50),
        "p99": changes.percentile(99),
        "cpu": cpu,
        "peak": peak,
        "stall_start": at_start[0].longest,
        "stall": in_changes[0].longest,
    }
    late = max(at_start[0].late, in_changes[0].late)
    behind = (
        f"{milliseconds(changes.percentile_behind(50))} and {milliseconds(changes.percentile_behind(99))}"
    )
    notes = (
        f"{len(changes.changes)} changes in {changes.seconds:.0f} s",
        f"p50 and p99 after the API server's answer {behind}",
        f"a mere sleep came {milliseconds(late)} late",
    )
    return Measured(figures, notes)


async def during_resyncs(bench: Bench, checkout: Checkout, size: int) -> Measured:
    """Measure changes beside resyncs: one in every few seconds, and those that edited services cause."""
    api, pods = await bench.api(size), annotated_pods(size)
    edited, changed = pods[:_EDITS], pods[_EDITS:]
    async with (
        consul() as address,
        registrar(bench.folder, checkout, api, address, SYNC_PERIOD=str(_RESYNC_PERIOD)) as run,
    ):
        await filled(address, run, "catalog", targets_of(size))
        await run.until_resync()
        await asyncio.sleep(3)
        ends: list[float] = []
        seconds = max(bench.seconds, 4.0 * _RESYNC_PERIOD)
        async with asyncio.TaskGroup() as group:
            noting = group.create_task(_note_resyncs(run, ends))
            editing = group.create_task(_edit(address, edited, every=seconds / (_EDITS + 1)))
            changes = await churn(api, address, changed, rate=RATE, seconds=seconds)
            await editing
            noting.cancel()
        await _until_repaired(address, edited)
    if not ends:
        raise BenchmarkError("there was no resync while Pods changed")
    windows = [(end - _BEFORE_RESYNC, end + _AFTER) for end in ends]
    notes = (
        f"{len(ends)} resyncs, {_EDITS} services edited by another program among them",
        f"{changes.count(windows)} changes beside them",
        f"p99 of all {len(changes.changes)} changes {milliseconds(changes.percentile(99))}",
    )
    return Measured({"p99": changes.percentile(99, windows=windows)}, notes)


async def during_removals(bench: Bench, checkout: Checkout, size: int) -> Measured:
    """Measure changes beside the removal of two fifths of the Pods, in the catalog."""
    namespaces, gone, kept = _doomed(size)
    async with (
        sandbox_api(bench.folder, pods=size) as api,
        consul() as address,
        registrar(bench.folder, checkout, api, address) as run,
    ):
        targets = targets_of(size)
        await filled(address, run, "catalog", targets)
        await run.until_resync()
        await asyncio.sleep(3)
        async with asyncio.TaskGroup() as group:
            seconds = len(gone) / DELETIONS + 5
            changing = group.create_task(churn(api, address, kept, rate=RATE, seconds=seconds))
            await asyncio.sleep(1)
            begun = time.monotonic()
            await delete_namespaces(api, namespaces, rate=DELETIONS, size=size // NAMESPACES)
            deleted = time.monotonic()
            await _until_gone(address, gone)
            ended = time.monotonic()
        require(await count_of(address, "catalog"), targets - len(gone))
        changes: Churn = changing.result()
    window = [(begun, ended + _AFTER)]
    notes = (
        f"{len(gone)} Pods deleted in {deleted - begun:.1f} s, their services gone {ended - deleted:.1f} s later",
        f"{changes.count(window)} changes beside them",
        f"after the API server's answer {milliseconds(changes.percentile_behind(99, windows=window))}",
        f"longest {milliseconds(changes.percentile(100, windows=window))}",
    )
    return Measured({"p99": changes.percentile(99, windows=window)}, notes)


async def new_pod_during_removals(bench: Bench, checkout: Checkout, size: int) -> Measured:
    """Measure the longest wait of new Pods beside the removal of two fifths of the others, at an agent."""
    namespaces, gone, _ = _doomed(size)
    waits: list[float] = []
    async with (
        sandbox_api(bench.folder, pods=size) as api,
        consul() as address,
        registrar(bench.folder, checkout, api, address, backend="agent") as run,
        api.session() as kube,
        session_with(address) as session,
    ):
        targets = targets_of(size)
        await filled(address, run, "agent", targets)
        await run.until_resync()
        await asyncio.sleep(3)

        async def create(number: int) -> None:
            name = await create_pod(kube, number)
            sent = time.monotonic()
            waits.append(await until_at_agent(session, name.service) - sent)

        begun = time.monotonic()
        async with asyncio.TaskGroup() as group:
            deleting = group.create_task(
                delete_namespaces(api, namespaces, rate=DELETIONS, size=size // NAMESPACES)
            )
            for number in [number for number in range(size, size + 2 * _NEW_PODS) if is_annotated(number)][
                :_NEW_PODS
            ]:
                await asyncio.sleep(1)
                group.create_task(create(number))
            await deleting
            await until_count(address, "agent", targets - len(gone) + _NEW_PODS)
            ended = time.monotonic()
    waits.sort()
    notes = (
        f"{len(gone)} Pods deleted, their services gone after {ended - begun:.0f} s",
        f"{len(waits)} new Pods, one a second from the first second on, median {milliseconds(waits[len(waits) // 2])}",
    )
    return Measured({"longest": waits[-1]}, notes)


async def at_rest(bench: Bench, checkout: Checkout, size: int) -> Measured:
    """Count the requests to the API server while nothing changes and everything is compared all the same."""
    api = await bench.api(size)
    period = {"SYNC_PERIOD": str(_REST_PERIOD)}
    async with consul() as address, registrar(bench.folder, checkout, api, address, **period) as run:
        await filled(address, run, "catalog", targets_of(size))
        await run.until_resync()
        await asyncio.sleep(2)
        requests, cpu, ends = await api.requests(), run.program.cpu_seconds, list[float]()
        noting = asyncio.create_task(_note_resyncs(run, ends))
        await asyncio.sleep(bench.seconds)
        noting.cancel()
        after = await api.requests()
        cpu = (run.program.cpu_seconds - cpu) / bench.seconds
    made = {what: count - requests.get(what, 0) for what, count in after.items()}
    said = ", ".join(f"{count} {what}" for what, count in made.items() if count) or "none at all"
    notes = (
        f"requests to the API server: {said}",
        f"{len(ends)} resyncs in {bench.seconds:.0f} s (`SYNC_PERIOD={_REST_PERIOD}`), {cpu * 100:.1f} % of a core",
    )
    return Measured({"lists": float(sum(n for what, n in made.items() if what.startswith("LIST")))}, notes)


async def hour_of_churn(bench: Bench, checkout: Checkout, size: int) -> Measured:
    """Compare memory at the start and at the end of long churn, of a leader and of a standby.

    Pods change their address, and every tenth second ten are deleted and ten others created.
    """
    election = {"LEADER_ELECTION": "true", "LEASE_NAMESPACE": "default"}
    pods, spare = annotated_pods(size), size
    async with (
        sandbox_api(bench.folder, pods=size) as api,
        consul() as address,
        contextlib.AsyncExitStack() as stack,
    ):
        leader = await stack.enter_async_context(registrar(bench.folder, checkout, api, address, **election))
        await filled(address, leader, "catalog", targets_of(size))
        standby = await stack.enter_async_context(registrar(bench.folder, checkout, api, address, **election))
        runs = (leader, standby)
        began, firsts = time.monotonic(), (0.0, 0.0)
        while (elapsed := time.monotonic() - began) < bench.hour:
            await change_only(api, pods, rate=RATE, seconds=min(10.0, bench.hour / 10))
            spare = await _replace(api, pods, spare)
            if firsts == (0.0, 0.0) and elapsed > bench.hour / 10:
                firsts = (leader.program.resident_mb, standby.program.resident_mb)
        await until_count(address, "catalog", targets_of(size))
        lasts = tuple(run.program.resident_mb for run in runs)
        peaks = tuple(run.program.peak_mb for run in runs)
    notes = tuple(
        f"{name} {first:.0f} MB after a tenth of {bench.hour:.0f} s, {last:.0f} MB at the end, peak {peak:.0f} MB"
        for name, first, last, peak in zip(("leader", "standby"), firsts, lasts, peaks, strict=True)
    )
    growth = max(last - first for first, last in zip(firsts, lasts, strict=True))
    return Measured({"growth": growth, "peak": max(peaks)}, notes)


async def _until_gone(address: str, pods: Sequence[PodName]) -> None:
    """Wait until a sample of the Pods has no service: counting all of them would disturb what is measured."""
    left = [*pods[:: max(1, len(pods) // 20)], *pods[-20:]]
    async with session_with(address) as session:

        async def are_gone() -> bool:
            while left:
                async with session.get(f"/v1/catalog/service/{left[-1].service}") as answer:
                    if await answer.json():
                        return False
                left.pop()
            return True

        await wait_until(are_gone, every=0.05, what="the services of deleted Pods are gone")


async def _note_resyncs(run: Registrar, ends: list[float]) -> None:
    """Note when everything was compared, monotonic, for as long as it runs."""
    offset = time.time() - time.monotonic()
    last = await run.last_resync()
    while True:
        await asyncio.sleep(0.25)
        if (now := await run.last_resync()) > last:
            ends.append(now - offset)
            last = now


async def _edit(address: str, pods: list[PodName], *, every: float) -> None:
    """Give one service after the other another port, as another program would."""
    services = {one["ID"]: one for one in await services_of(address, "catalog")}
    for pod in pods:
        await asyncio.sleep(every)
        service = services[pod.service]
        body = {key: service[key] for key in ("ID", "Service", "Address", "Meta", "Tags")}
        await put_services(address, [{**body, "Port": _EDITED_PORT}])


async def _until_repaired(address: str, pods: list[PodName]) -> None:
    names = {pod.service for pod in pods}

    async def are_repaired() -> bool:
        services = await services_of(address, "catalog")
        return not any(one["ID"] in names and one["Port"] == _EDITED_PORT for one in services)

    await wait_until(are_repaired, within=_REPAIRED_WITHIN, every=0.5, what="edited services are repaired")


async def _replace(api: Api, pods: list[PodName], spare: int) -> int:
    """Delete ten Pods, create ten others, and return the next number to give."""
    gone, pods[:] = pods[:10], pods[10:]
    await delete_pods(api, gone, rate=DELETIONS)
    async with api.session() as kube:
        for _ in gone:
            while not is_annotated(spare):
                spare += 1
            pods.append(await create_pod(kube, spare))
            spare += 1
    return spare


def _doomed(size: int) -> tuple[list[str], list[PodName], list[PodName]]:
    """Return namespaces with two fifths of all Pods, their Pods, and the others that ask for scrapes."""
    pods = annotated_pods(size)
    namespaces = sorted({pod.namespace for pod in pods})[: NAMESPACES * 2 // 5]
    gone = [pod for pod in pods if pod.namespace in namespaces]
    return namespaces, gone, [pod for pod in pods if pod.namespace not in namespaces]
