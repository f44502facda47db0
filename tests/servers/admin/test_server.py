"""The admin endpoints, asked over real connections."""

import asyncio
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass

import aiohttp
import pytest
from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Info

from k8s_consul_registrar.admin.server import AdminServer
from k8s_consul_registrar.errors import OperationalError
from support.waiting import PATIENCE, SLACK

pytestmark = pytest.mark.both_loops


@dataclass
class Daemon:
    """The state that the probes report, settable by a test."""

    alive: bool = True
    problem: str = ""

    def is_alive(self) -> bool:
        return self.alive

    def readiness(self) -> str:
        return self.problem


@dataclass(frozen=True)
class Served:
    """A server under test with what it serves from."""

    url: str
    port: int
    daemon: Daemon
    registry: CollectorRegistry
    session: aiohttp.ClientSession

    async def get(self, path: str, **headers: str) -> tuple[int, str, str]:
        """Return status, content type and text."""
        async with self.session.get(self.url + path, headers=headers) as response:
            return response.status, response.headers["Content-Type"], await response.text()


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    """Serve a daemon that is alive and ready."""
    daemon, registry = Daemon(), CollectorRegistry()

    async def extra(_: web.Request) -> web.Response:
        return web.json_response({"added": True})

    async with (
        AdminServer(port=0, health=daemon, registry=registry, routes=[web.get("/extra", extra)]) as server,
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=PATIENCE)) as session,
    ):
        yield Served(f"http://127.0.0.1:{server.port}", server.port, daemon, registry, session)


async def test_healthz_follows_the_loop(served: Served) -> None:
    """Liveness is 200 while the loop ticks and 503 with the reason when it does not."""
    assert await served.get("/healthz") == (200, "text/plain; charset=utf-8", "ok\n")
    served.daemon.alive = False
    status, _, text = await served.get("/healthz")
    assert (status, text) == (503, "the main loop has not ticked lately\n")


async def test_readyz_gives_the_reason_in_one_line(served: Served) -> None:
    """Readiness is apart from liveness, and a reason over several lines becomes one."""
    assert (await served.get("/readyz"))[0] == 200
    served.daemon.problem = "pods are not listed yet:\n 403 Forbidden"
    status, _, text = await served.get("/readyz")
    assert (status, text) == (503, "pods are not listed yet: 403 Forbidden\n")
    assert (await served.get("/healthz"))[0] == 200


async def test_metrics_come_in_the_format_asked_for(served: Served) -> None:
    """The text format by default; OpenMetrics, with its end mark, when `Accept` prefers it."""
    Counter("passes", "Passes made.", registry=served.registry).inc(3)
    Info("build", "What runs.", registry=served.registry).info({"version": "1"})
    status, kind, text = await served.get("/metrics")
    assert (status, kind.split(";")[0]) == (200, "text/plain")
    assert "passes_total 3.0\n" in text
    status, kind, text = await served.get(
        "/metrics", Accept="application/openmetrics-text;version=1.0.0,*/*;q=0.1"
    )
    assert (status, kind.split(";")[0]) == (200, "application/openmetrics-text")
    assert text.endswith("# EOF\n")


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
async def test_both_families_are_served(served: Served, host: str) -> None:
    """IPv4 and IPv6 reach the same port."""
    if host == "[::1]" and not _has_ipv6_loopback():
        pytest.skip("this machine has no ::1")
    async with served.session.get(f"http://{host}:{served.port}/healthz") as response:
        assert response.status == 200


def _has_ipv6_loopback() -> bool:
    """Return True if ::1 can be bound."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


async def test_only_what_is_named_is_served(served: Served) -> None:
    """A mode's own route answers; another path is 404, another method 405."""
    assert (await served.get("/extra"))[2] == '{"added": true}'
    assert (await served.get("/metrics/cadvisor"))[0] == 404
    async with served.session.post(served.url + "/readyz") as response:
        assert response.status == 405


async def test_taken_port_is_told_by_its_setting(served: Served) -> None:
    """A second server on the port fails with the setting's name, the port and why."""
    second = AdminServer(port=served.port, health=Daemon(), registry=CollectorRegistry())
    with pytest.raises(OperationalError, match=f"ADMIN_PORT {served.port} .*: Address already in use"):
        async with second:
            pass


async def test_stopping_does_not_wait_for_idle_or_stuck_connections() -> None:
    """A kept connection and a request that never ends hold the stop up by at most a second or two."""
    entered = asyncio.Event()

    async def stuck(_: web.Request) -> web.Response:
        entered.set()
        await asyncio.sleep(60)
        return web.Response()

    server = AdminServer(
        port=0, health=Daemon(), registry=CollectorRegistry(), routes=[web.get("/stuck", stuck)]
    )
    async with aiohttp.ClientSession() as session:
        async with server:
            async with session.get(f"http://127.0.0.1:{server.port}/healthz") as response:
                await response.read()
            asking = asyncio.create_task(_ask(session, f"http://127.0.0.1:{server.port}/stuck"))
            await entered.wait()
            began = asyncio.get_running_loop().time()
        assert asyncio.get_running_loop().time() - began < 3 + SLACK
        assert await asking == "cut"
        with pytest.raises(aiohttp.ClientConnectorError):
            await session.get(f"http://127.0.0.1:{server.port}/healthz")


async def _ask(session: aiohttp.ClientSession, url: str) -> str:
    """Return the body, or `cut` when the connection broke before it came."""
    try:
        async with session.get(url) as response:
            return await response.text()
    except aiohttp.ClientError:
        return "cut"
