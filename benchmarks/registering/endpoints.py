"""The endpoints of Services: the processor time of one endpoint's change, and the memory of many."""

import asyncio
import time
from itertools import pairwise
from statistics import median
from typing import Any

import aiohttp

from k8s_consul_registrar.sandbox.synthetic import SERVICES_NAMESPACE, SLICE_ENDPOINTS, synthetic_slice
from registering.bench import Bench, Measured, targets_of
from registering.churn import annotated_pods, change_only, next_address
from registering.observing import require, until_count
from registering.processes import BenchmarkError, consul
from registering.stage import Api, Checkout, registrar

_PODS = 500
_MANY_PODS = 10_000
_ROUNDS, _ROUND = 5, 5.0  # rounds, and seconds of each without changes, with those of Pods and of endpoints
_RATE = 8.0  # changes a second, slow enough for each to be written apart
_SERVICES = "pods,nodes,services"
_SLICES = f"/apis/discovery.k8s.io/v1/namespaces/{SERVICES_NAMESPACE}/endpointslices"


async def endpoint_change(bench: Bench, checkout: Checkout, size: int) -> Measured:
    """Measure what the change of one endpoint of a Service costs, and that of a Pod in the same registrar."""
    api, pods = await bench.api(_PODS, endpoints=size), annotated_pods(_PODS)
    async with (
        consul() as address,
        registrar(bench.folder, checkout, api, address, DISCOVER=_SERVICES, SYNC_PERIOD="86400") as run,
    ):
        await until_count(address, "catalog", targets_of(_PODS) + size)
        await run.until_resync()
        await asyncio.sleep(10)
        idle: list[float] = []
        of_pods: list[float] = []
        of_endpoints: list[float] = []
        pod_changes = endpoint_changes = 0
        parts = await _slices(api, size // SLICE_ENDPOINTS)
        for _ in range(_ROUNDS):
            marks = [run.program.precise_cpu_seconds]
            await asyncio.sleep(_ROUND)
            marks.append(run.program.precise_cpu_seconds)
            pod_changes += await change_only(api, pods, rate=_RATE, seconds=_ROUND)
            marks.append(run.program.precise_cpu_seconds)
            endpoint_changes += await _change_endpoints(api, parts, endpoint_changes)
            marks.append(run.program.precise_cpu_seconds)
            for times, (begin, end) in zip((idle, of_pods, of_endpoints), pairwise(marks), strict=True):
                times.append(end - begin)
        updates = (await run.metrics()).get(
            'k8s_consul_registrar_writes_total{outcome="success",verb="update"}', 0
        )
        require(int(updates), pod_changes + endpoint_changes)
    # Medians: the resync that comes some time after the start is in one of the rounds.
    rest = median(idle)
    pod = (median(of_pods) - rest) * _ROUNDS / pod_changes * 1e3
    endpoint = (median(of_endpoints) - rest) * _ROUNDS / endpoint_changes * 1e3
    notes = (f"{endpoint:.2f} ms for one endpoint, {pod:.2f} ms for one Pod of 7 KB",)
    return Measured({"ratio": endpoint / pod}, notes)


async def endpoint_memory(bench: Bench, checkout: Checkout, size: int) -> Measured:
    """Measure the peak memory with many endpoints beside ten thousand Pods."""
    api = await bench.api(_MANY_PODS, endpoints=size)
    async with (
        consul() as address,
        registrar(bench.folder, checkout, api, address, DISCOVER=_SERVICES) as run,
    ):
        await until_count(address, "catalog", targets_of(_MANY_PODS) + size)
        seconds = time.monotonic() - run.started
        await run.until_resync()
        peak = run.program.peak_mb
    return Measured({"peak": peak}, (f"everything in Consul after {seconds:.0f} s",))


async def _slices(api: Api, count: int) -> list[dict[str, Any]]:
    """Return the slices of the first Service as they are: an earlier run has changed some."""
    parts = []
    async with api.session() as kube:
        for number in range(count):
            async with kube.get(f"{_SLICES}/{synthetic_slice(0, number)['metadata']['name']}") as answer:
                parts.append(await answer.json())
            del parts[-1]["metadata"]["resourceVersion"]
    return parts


async def _change_endpoints(api: Api, parts: list[dict[str, Any]], done: int) -> int:
    """Give one endpoint after another a new address, each in its slice; return how many."""
    began, count = time.monotonic(), int(_RATE * _ROUND)
    async with api.session() as kube:
        for number in range(count):
            await asyncio.sleep(max(0.0, began + number / _RATE - time.monotonic()))
            part = parts[(done + number) % len(parts)]
            await _change_one(kube, part, done + number, next_address(api))
    await asyncio.sleep(max(0.0, began + _ROUND - time.monotonic()))
    return count


async def _change_one(kube: aiohttp.ClientSession, part: dict[str, Any], change: int, address: str) -> None:
    part["endpoints"][change % SLICE_ENDPOINTS]["addresses"] = [address]
    path = f"{_SLICES}/{part['metadata']['name']}"
    async with kube.put(path, json=part) as answer:
        if answer.status != 200:
            raise BenchmarkError(f"{path} got {answer.status}: {await answer.text()}")
