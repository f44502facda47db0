"""Reads of Consul from outside, at little cost to it."""

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import aiohttp
import msgspec

from registering.processes import BenchmarkError, wait_until
from registering.stage import NODE, Registrar

TRANSACTION = 64
_POLL = 0.01  # seconds; a poll costs Consul a tenth of a millisecond
_AGENT_POLL = 0.1  # seconds; it costs Consul several milliseconds
_QUIET = 0.5  # seconds without a write after which all services are counted
_IN_FLIGHT = 8
# A service that does not exist has the index of the last write to any node or service.
_LAST_WRITE = "/v1/catalog/service/no-such-service"


class _Service(msgspec.Struct, rename={"id": "ID", "modified": "ModifyIndex"}):
    id: str
    modified: int


class _Services(msgspec.Struct, rename="pascal"):
    services: list[_Service] | None = None


_node_services = msgspec.json.Decoder(_Services | None)


def session_with(consul: str) -> aiohttp.ClientSession:
    """Return a session that keeps as many connections as there are requests."""
    timeout = aiohttp.ClientTimeout(total=300)
    return aiohttp.ClientSession(f"http://{consul}", connector=aiohttp.TCPConnector(limit=0), timeout=timeout)


async def catalog_filled(consul: str, run: Registrar, targets: int) -> float:
    """Wait until the catalog's node has all targets; return the seconds from start to its last write."""
    seen: list[tuple[int, float]] = []
    ended = 0.0
    async with session_with(consul) as session:

        async def is_filled() -> bool:
            nonlocal ended
            async with session.get(_LAST_WRITE) as answer:
                await answer.read()
                index = int(answer.headers["X-Consul-Index"])
            now = time.monotonic()
            if not seen or index != seen[-1][0]:
                seen.append((index, now))
            if now - seen[-1][1] < _QUIET or now - run.started < _QUIET:
                return False
            services = await _services_of(session)
            if len(services) < targets:
                return False
            require(len(services), targets)
            last = max(one.modified for one in services)
            ended = next(at for index, at in seen if index >= last)
            return True

        await _until(run, is_filled, _POLL, f"{targets} services are in the catalog")
    return ended - run.started


async def agent_filled(consul: str, run: Registrar, targets: int) -> float:
    """Wait until the agent has all targets; return the seconds since the registrar's start."""
    async with session_with(consul) as session:

        async def is_filled() -> bool:
            return await agent_count(session) >= targets

        await _until(run, is_filled, _AGENT_POLL, f"{targets} services are at the agent")
        ended = time.monotonic()
        require(await agent_count(session), targets)
    return ended - run.started


async def filled(consul: str, run: Registrar, backend: str, targets: int) -> float:
    """Wait until Consul has all targets; return the seconds since the registrar's start."""
    wait = catalog_filled if backend == "catalog" else agent_filled
    return await wait(consul, run, targets)


async def agent_count(session: aiohttp.ClientSession) -> int:
    """Return how many services the agent has, without reading them."""
    async with session.get("/v1/agent/self") as answer:
        return int((await answer.json())["Stats"]["agent"]["services"])


async def count_of(consul: str, backend: str) -> int:
    """Return how many services Consul has where the registrar writes."""
    async with session_with(consul) as session:
        return await agent_count(session) if backend == "agent" else len(await _services_of(session))


async def until_count(address: str, backend: str, count: int) -> None:
    """Wait until Consul has this many services where the registrar writes."""

    async def is_count() -> bool:
        return await count_of(address, backend) == count

    await wait_until(is_count, every=0.5, what=f"{count} services are in Consul")


async def services_of(consul: str, backend: str) -> list[dict[str, Any]]:
    """Return all services where the registrar writes."""
    path = "/v1/agent/services" if backend == "agent" else f"/v1/catalog/node-services/{NODE}"
    async with session_with(consul) as session, session.get(path) as answer:
        body = await answer.json()
    return list(body.values()) if backend == "agent" else list(body["Services"])


async def put_services(consul: str, services: Sequence[dict[str, Any]]) -> None:
    """Write services of another program at the registrar's node of the catalog, which must be there."""
    batches = iter(
        [
            [
                {"Service": {"Verb": "set", "Node": NODE, "Service": service}}
                for service in services[at : at + TRANSACTION]
            ]
            for at in range(0, len(services), TRANSACTION)
        ]
    )
    async with session_with(consul) as session:

        async def put(operations: list[dict[str, Any]]) -> None:
            async with session.put("/v1/txn", data=msgspec.json.encode(operations)) as answer:
                if answer.status != 200:
                    raise BenchmarkError(await answer.text())

        async def put_all() -> None:
            for batch in batches:
                await put(batch)

        async with asyncio.TaskGroup() as group:
            for _ in range(_IN_FLIGHT):
                group.create_task(put_all())


def require(found: int, wanted: int) -> None:
    """Stop a benchmark that measured something else."""
    if found != wanted:
        raise BenchmarkError(f"{found} services are there, {wanted} were wanted")


async def _services_of(session: aiohttp.ClientSession) -> list[_Service]:
    async with session.get(f"/v1/catalog/node-services/{NODE}") as answer:
        found = _node_services.decode(await answer.read())
    return found.services or [] if found else []


async def _until(run: Registrar, is_true: Any, every: float, what: str) -> None:
    async def is_true_while_running() -> bool:
        if not run.program.is_running:
            raise BenchmarkError(f"the registrar ended:\n{run.program.tail()}")
        return bool(await is_true())

    try:
        await wait_until(is_true_while_running, every=every, what=what)
    except BenchmarkError as error:
        raise BenchmarkError(f"{error}\n{run.program.tail()}") from None
