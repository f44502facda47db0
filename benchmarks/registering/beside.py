"""The processor time of one change beside many of something else: rejected Pods, failed writes, foreign services."""

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import msgspec

from registering.bench import Bench, Measured, targets_of
from registering.churn import annotated_pods, change_only
from registering.observing import count_of, put_services, require, services_of, session_with, until_count
from registering.processes import LOOPBACK, Program, consul, free_ports, wait_until
from registering.stage import FOLDER, Api, Checkout, Registrar, registrar

_PODS = 500
_ROUNDS, _ROUND = 5, 5.0  # rounds, and seconds of each without changes and then with them
_RATE = 8.0  # changes a second, slow enough for each to be written apart
_QUIET_CPU, _QUIET_WITHIN = 0.05, 90.0  # share of a core, and seconds
_FOREIGN = "foreign-"
_FOREIGN_WITHIN = 600.0
_REFUSED_PREFIX = "pod--small--"


async def beside_rejected(bench: Bench, checkout: Checkout, size: int) -> Measured:
    """Measure what a change costs beside Pods that are rejected."""
    with_them = await _cost(bench, checkout, "catalog", api=await bench.api(_PODS, rejected=size))
    return await _compared(bench, checkout, "catalog", with_them)


async def beside_foreign_in_catalog(bench: Bench, checkout: Checkout, size: int) -> Measured:
    """Measure what a change costs beside services of others at our node."""
    with_them = await _cost(bench, checkout, "catalog", foreign=size)
    return await _compared(bench, checkout, "catalog", with_them)


async def beside_foreign_at_agent(bench: Bench, checkout: Checkout, size: int) -> Measured:
    """Measure what a change costs beside services of others at our agent."""
    with_them = await _cost(bench, checkout, "agent", foreign=size)
    return await _compared(bench, checkout, "agent", with_them)


async def beside_failed(bench: Bench, checkout: Checkout, size: int) -> Measured:
    """Measure what a change costs beside writes that Consul refuses, one by one, at an agent."""
    with_them = await _cost(bench, checkout, "agent", api=await bench.api(_PODS, small=size), refused=size)
    return await _compared(bench, checkout, "agent", with_them)


async def _compared(bench: Bench, checkout: Checkout, backend: str, with_them: float) -> Measured:
    alone = await _cost(bench, checkout, backend)
    notes = (f"{with_them:.2f} ms a change, {alone:.2f} ms beside none",)
    return Measured({"cost": with_them - alone}, notes)


async def _cost(
    bench: Bench,
    checkout: Checkout,
    backend: str,
    *,
    api: Api | None = None,
    foreign: int = 0,
    refused: int = 0,
) -> float:
    """Return the processor time of a change in ms, without what the registrar uses when nothing changes."""
    api, pods = api or await bench.api(_PODS), annotated_pods(_PODS)
    async with (
        _consul_with(bench, backend, foreign) as direct,
        _refusing(bench, direct, is_needed=bool(refused)) as address,
        registrar(bench.folder, checkout, api, address, backend=backend, SYNC_PERIOD="86400") as run,
    ):
        written_from = 0.0
        if backend == "catalog" and foreign:
            # Only the registrar creates its node, so the others' services come after its own.
            await until_count(direct, backend, targets_of(_PODS))
            written_from = time.time()
            await put_services(direct, [_foreign(number) for number in range(foreign)])
        await until_count(direct, backend, targets_of(_PODS) + foreign)
        if refused:
            await _until_refused(address, refused)
        await run.until_resync(written_from)
        await _until_quiet(run)
        idle = busy = 0.0
        changes = 0
        for _ in range(_ROUNDS):
            before = run.program.precise_cpu_seconds
            await asyncio.sleep(_ROUND)
            between = run.program.precise_cpu_seconds
            changes += await change_only(api, pods, rate=_RATE, seconds=_ROUND)
            idle += between - before
            busy += run.program.precise_cpu_seconds - between
        require(await count_of(direct, backend), targets_of(_PODS) + foreign)
    return (busy - idle) / changes * 1e3


@contextlib.asynccontextmanager
async def _consul_with(bench: Bench, backend: str, foreign: int) -> AsyncIterator[str]:
    """Run a Consul that has services of another program where the registrar is going to write."""
    if backend == "agent" and foreign:
        address = await bench.agent(foreign, _agent_with(bench, foreign))
        try:
            yield address
        finally:
            await _remove_ours(address)
        return
    async with consul() as address:
        yield address


@contextlib.asynccontextmanager
async def _agent_with(bench: Bench, foreign: int) -> AsyncIterator[str]:
    """Run a Consul agent that has services from a file: by PUT, each would take longer than the one before."""
    file = bench.folder / "foreign.json"
    services = [_foreign(number) for number in range(foreign)]
    definitions = [{"id": one["ID"], "name": one["Service"], "port": one["Port"]} for one in services]
    file.write_bytes(msgspec.json.encode({"services": definitions}))
    async with consul(f"-config-file={file}") as address:
        await _until_in_catalog(address, foreign)
        yield address


async def _remove_ours(address: str) -> None:
    """Leave an agent as it was before the registrar ran."""
    left = iter([one["ID"] for one in await services_of(address, "agent") if one["ID"][:8] != _FOREIGN])
    async with session_with(address) as session, asyncio.TaskGroup() as group:

        async def remove() -> None:
            for service in left:
                async with session.put(f"/v1/agent/service/deregister/{service}") as answer:
                    await answer.read()

        for _ in range(8):
            group.create_task(remove())


def _foreign(number: int) -> dict[str, Any]:
    return {"ID": f"{_FOREIGN}{number:06d}", "Service": f"{_FOREIGN}{number % 500:03d}", "Port": 9000}


@contextlib.asynccontextmanager
async def _refusing(bench: Bench, direct: str, *, is_needed: bool) -> AsyncIterator[str]:
    if not is_needed:
        yield direct
        return
    address = f"{LOOPBACK}:{(port := free_ports(1)[0])}"
    script = str(FOLDER / "refusing_proxy.py")
    argv = [sys.executable, script, direct, _REFUSED_PREFIX, str(port)]
    program = Program(argv, bench.folder / "refusing_proxy.log")
    program.launch()
    try:
        async with session_with(address) as session:

            async def answers() -> bool:
                with contextlib.suppress(aiohttp.ClientError, OSError):
                    async with session.get("/refused"):
                        return True
                return False

            await program.until_ready(answers, "the proxy before Consul answers")
        yield address
    finally:
        await program.stop()


async def _until_in_catalog(address: str, foreign: int) -> None:
    """Wait until the agent has told its server about all services."""
    async with session_with(address) as session:

        async def is_told() -> bool:
            async with session.get("/v1/catalog/node-services/bench-agent") as answer:
                return len((await answer.json())["Services"]) >= foreign

        await wait_until(
            is_told, within=_FOREIGN_WITHIN, every=2, what="the agent's services are in the catalog"
        )


async def _until_refused(address: str, count: int) -> None:
    async with session_with(address) as session:

        async def are_refused() -> bool:
            async with session.get("/refused") as answer:
                return int(await answer.json()) >= count

        await wait_until(are_refused, every=0.2, what=f"{count} services were refused")


async def _until_quiet(run: Registrar) -> None:
    """Wait until the registrar uses little processor time, at most for a while: retries may go on."""
    until = time.monotonic() + _QUIET_WITHIN
    await asyncio.sleep(3)
    while time.monotonic() < until:
        before = run.program.precise_cpu_seconds
        await asyncio.sleep(3)
        if run.program.precise_cpu_seconds - before < 3 * _QUIET_CPU:
            return
