"""The figures of the benchmark, measured one group at a time."""

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from real_servers import RealConsul, real_consul
from registering.churn import Churn, churn
from registering.stage import FOLDER, NODE, Api, registrar, run_python, run_small, services_in_catalog

TRANSACTION = 64
TRANSACTIONS_IN_FLIGHT = "8"
PUTS_IN_FLIGHT = "32"
MODULES = "import k8s_consul_registrar.cli, k8s_consul_registrar.app.registrar"
REST_SECONDS, REST_PERIOD = 25.0, 10
SETTLE = 2.0  # seconds


@dataclass(frozen=True, slots=True)
class ColdStart:
    """One cold start and, in the same minute, what it is made of, in seconds; `load` is the machine's before."""

    registrar: float
    bare: float
    startup: float = 0.0
    listing: float = 0.0
    load: float = 0.0


@dataclass(frozen=True, slots=True)
class Stalls:
    """The longest answer of /healthz, and the longest delay of a mere sleep meanwhile, in seconds."""

    longest: float = 0.0
    late: float = 0.0


@dataclass(frozen=True, slots=True)
class Steady:
    """One registrar from its cold start through `changes`; CPU in seconds a second, memory in MB."""

    peak_start_mb: float
    peak_mb: float
    stall_start: Stalls
    stall: Stalls
    changes: Churn
    cpu: float
    load: float


@dataclass(frozen=True, slots=True)
class Rest:
    """What a registrar asks the API server for while nothing changes, by verb and resource."""

    requests: dict[str, int]
    full_passes: int
    seconds: float
    cpu: float


def load() -> float:
    """Return the machine's load over the last minute."""
    return os.getloadavg()[0]


async def until_idle(patience: float) -> None:
    """Wait until others use less than half of the machine, at most so many seconds."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        before = _cpu_ticks()
        await asyncio.sleep(2)
        after = _cpu_ticks()
        if (after[0] - before[0]) > 0.5 * (after[1] - before[1]):
            return


def _cpu_ticks() -> tuple[int, int]:
    """Return the ticks in which the machine was idle so far, and all its ticks (proc(5), /proc/stat)."""
    ticks = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return ticks[3], sum(ticks)


@contextlib.asynccontextmanager
async def settled_consul() -> AsyncIterator[RealConsul]:
    """Run a Consul that has done what a new server does when it becomes the leader (its own CA, for one)."""
    async with real_consul() as consul:
        await asyncio.sleep(SETTLE)
        yield consul


async def cold_start_catalog(api: Api, folder: Path, *, targets: int) -> ColdStart:
    """Measure a cold start with the catalog backend, and what it is made of."""
    transactions, before = folder / "transactions", load()
    async with settled_consul() as consul:
        async with registrar(folder, api, consul.address) as run:
            whole = await run.until_registered(targets)
        services = await services_in_catalog(consul.address, NODE)
    require(len(services), targets)
    write_transactions(services, transactions)
    startup = (await run_python("-c", MODULES))["wall"]
    listing = (await run_small("bare.py", "list", api.url, str(api.ca), api.token))["seconds"]
    async with settled_consul() as consul:
        arguments = (consul.address, str(transactions), TRANSACTIONS_IN_FLIGHT)
        bare = (await run_small("bare.py", "transactions", *arguments))["seconds"]
        require(len(await services_in_catalog(consul.address, NODE)), targets)
    return ColdStart(whole, bare, startup, listing, before)


async def cold_start_agent(api: Api, folder: Path, *, targets: int) -> ColdStart:
    """Measure a cold start with the agent backend, and the PUTs alone."""
    puts, before = folder / "puts", load()
    async with settled_consul() as consul:
        async with registrar(folder, api, consul.address, backend="agent") as run:
            whole = await run.until_registered(targets)
        _, services = await consul.request("GET", "/v1/agent/services")
    require(len(services), targets)
    puts.write_bytes(b"\n".join(msgspec.json.encode(registration(one)) for one in services.values()))
    async with settled_consul() as consul:
        arguments = ("puts", consul.address, str(puts), PUTS_IN_FLIGHT)
        bare = (await run_small("bare.py", *arguments))["seconds"]
    return ColdStart(whole, bare, load=before)


async def original(api: Api, *, targets: int) -> dict[str, Any]:
    """Run the original's algorithm once over an empty Consul; its `wall` is the whole program."""
    async with settled_consul() as consul:
        said = await run_small("original.py", api.url, str(api.ca), api.token, consul.address)
    require(said["registered"], targets)
    return said


async def steady(
    api: Api, folder: Path, pods: list[tuple[str, str]], *, targets: int, rate: float, seconds: float
) -> Steady:
    """Let a registrar start and then follow changes: once watched from outside for stalls, once left alone."""
    before = load()
    async with settled_consul() as consul, registrar(folder, api, consul.address) as run:
        address = await run.admin_address()
        async with stalls(address) as during_start:
            await run.until_registered(targets)
            await run.until_full_pass()
        peak_start = run.peak_mb
        await asyncio.sleep(2)
        half = min(int(rate * seconds), len(pods) // 2)
        async with stalls(address) as during_changes:
            await churn(api, consul.address, pods[:half], rate=rate, seconds=seconds)
        # By itself: answering those who look for stalls costs a quarter of what following changes does.
        cpu = run.cpu_seconds
        changes = await churn(api, consul.address, pods[half:], rate=rate, seconds=seconds)
        cpu = (run.cpu_seconds - cpu) / changes.seconds
        return Steady(peak_start, run.peak_mb, during_start[0], during_changes[0], changes, cpu, before)


async def at_rest(api: Api, folder: Path, *, targets: int) -> Rest:
    """Count what reaches the API server while nothing changes and full passes are made all the same."""
    async with settled_consul() as consul:
        period = {"SYNC_PERIOD": str(REST_PERIOD)}
        async with registrar(folder, api, consul.address, **period) as run:
            await run.until_registered(targets)
            await run.until_full_pass()
            await asyncio.sleep(2)
            requests, passes, cpu = await api.requests(), len(run.said("pass")), run.cpu_seconds
            await asyncio.sleep(REST_SECONDS)
            after = await api.requests()
            made = {what: count - requests.get(what, 0) for what, count in after.items()}
            return Rest(
                {what: count for what, count in made.items() if count},
                len(run.said("pass")) - passes,
                REST_SECONDS,
                (run.cpu_seconds - cpu) / REST_SECONDS,
            )


@contextlib.asynccontextmanager
async def stalls(address: str) -> AsyncIterator[list[Stalls]]:
    """Ask a server's /healthz all the while, from a process of its own; the list is filled at the end."""
    found: list[Stalls] = []
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(FOLDER / "stall.py"), address, stdin=pipe, stdout=pipe
    )
    try:
        yield found
        output, _ = await asyncio.wait_for(process.communicate(b"\n"), 30)
        said = msgspec.json.decode(output)
        found.append(Stalls(said["longest"], said["late"]))
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def write_transactions(services: list[dict[str, Any]], file: Path) -> None:
    """Write what creates these services, node first, as bodies of transactions, one a line."""
    node = {"Node": {"Verb": "set", "Node": {"Node": NODE, "Address": "127.0.0.1"}}}
    lines = [msgspec.json.encode([node])]
    for start in range(0, len(services), TRANSACTION):
        operations = [
            {"Service": {"Verb": "set", "Node": NODE, "Service": body_of(service)}}
            for service in services[start : start + TRANSACTION]
        ]
        lines.append(msgspec.json.encode(operations))
    file.write_bytes(b"\n".join(lines))


def body_of(service: dict[str, Any]) -> dict[str, Any]:
    """Return what a write says of a service."""
    return {key: service[key] for key in ("ID", "Service", "Address", "Port", "Meta")}


def registration(service: dict[str, Any]) -> dict[str, Any]:
    """Return what registers a service at an agent."""
    return {("Name" if key == "Service" else key): value for key, value in body_of(service).items()}


def require(found: int, wanted: int) -> None:
    """Stop a benchmark that measured something else."""
    if found != wanted:
        raise RuntimeError(f"{found} services are there, {wanted} were wanted")
