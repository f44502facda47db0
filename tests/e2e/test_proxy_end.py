"""The proxy as a process: how it ends, and how it does not begin."""

import asyncio
import signal
import socket
import time

import aiohttp
import pytest

from k8s_consul_registrar.sandbox.kubelet import recorded_metrics
from support.daemon import STOP_WITHIN
from support.doors import TcpProxy
from support.lab import LIMIT, kubelet_door, kubelet_path, running_lab, scrape
from support.processes import LOOPBACK, reserve_ports
from support.proxy_lab import unchunked
from support.waiting import PATIENCE, SLACK, until


async def test_sigterm_lets_the_scrape_under_way_finish() -> None:
    """The caller gets the whole text, new callers get nothing, and the exit code is 0."""
    async with running_lab() as lab, await kubelet_door(lab) as door, await lab.proxy() as daemon:
        await daemon.ready()
        port = await daemon.port("port")
        door.stall()
        under_way = asyncio.create_task(scrape(daemon, kubelet_path(door.port)))
        await daemon.until(lambda: door.is_held)
        daemon.send(signal.SIGTERM)
        await daemon.until_said("draining")
        await daemon.until(lambda: not is_listening(port))
        assert not under_way.done()
        await door.heal()
        answer = await under_way
        assert (answer.status, answer.body) == (200, recorded_metrics())
        assert await daemon.ended(STOP_WITHIN) == 0


def is_listening(port: int) -> bool:
    """Return True if a connection to a loopback port is accepted."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((LOOPBACK, port)) == 0


async def test_idle_proxy_ends_at_once() -> None:
    """A connection that Prometheus keeps open between scrapes does not hold up the end."""
    async with running_lab() as lab:
        kubelet = await lab.cluster.add_kubelet("node-a")
        async with await lab.proxy() as daemon, aiohttp.ClientSession(timeout=LIMIT) as session:
            await daemon.ready()
            url = f"http://{LOOPBACK}:{await daemon.port('port')}{kubelet_path(kubelet.port)}"
            async with session.get(url) as response:
                assert (await response.read()) == recorded_metrics()
            started = time.monotonic()
            assert await daemon.terminate() == 0
            assert time.monotonic() - started < SLACK
            assert daemon.said("proxy ends")


async def test_sigint_does_not_wait() -> None:
    """Ctrl-C ends a proxy with a scrape under way at once, with 130."""
    async with running_lab() as lab, await kubelet_door(lab) as door, await lab.proxy() as daemon:
        await daemon.ready()
        door.stall()
        under_way = asyncio.create_task(scrape(daemon, kubelet_path(door.port)))
        await daemon.until(lambda: door.is_held)
        daemon.send(signal.SIGINT)
        assert await daemon.ended(STOP_WITHIN) == 130
        with pytest.raises(aiohttp.ClientError):
            await under_way


async def test_sigint_cuts_a_drain_short() -> None:
    """An operator who asked gently and then presses Ctrl-C does not wait for the scrape under way."""
    async with running_lab() as lab, await kubelet_door(lab) as door, await lab.proxy() as daemon:
        await daemon.ready()
        door.stall()
        under_way = asyncio.create_task(scrape(daemon, kubelet_path(door.port)))
        await daemon.until(lambda: door.is_held)
        daemon.send(signal.SIGTERM)
        await daemon.until_said("draining")
        daemon.send(signal.SIGINT)
        assert await daemon.ended(STOP_WITHIN) == 130
        with pytest.raises(aiohttp.ClientError):
            await under_way


async def test_scrape_that_outlasts_the_grace_is_reset() -> None:
    """SHUTDOWN_GRACE bounds the wait; what is not done by then is cut and looks cut, and the exit code is 0."""
    async with (
        running_lab() as lab,
        await kubelet_door(lab) as door,
        await lab.proxy(SHUTDOWN_GRACE="0.5") as daemon,
    ):
        await daemon.ready()
        door.stall()
        under_way = asyncio.create_task(scrape(daemon, kubelet_path(door.port)))
        await daemon.until(lambda: door.is_held)
        assert await daemon.terminate() == 0
        with pytest.raises(aiohttp.ClientError):
            await under_way


class KeepAliveClient:
    """A client that scrapes over a kept connection as Go's does, and never asks twice for the same."""

    def __init__(self, port: int, path: str) -> None:
        self.port = port
        self.request = f"GET {path} HTTP/1.1\r\nHost: proxy\r\n\r\n".encode()
        self.good = 0
        self.problems: list[str] = []
        self._connection: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def run(self, is_over: asyncio.Event, pause: float) -> None:
        """Scrape again and again."""
        while not is_over.is_set():
            try:
                await self._scrape()
            except (OSError, ValueError, asyncio.IncompleteReadError, AssertionError) as problem:
                self.problems.append(repr(problem))
                self._leave()
            await asyncio.sleep(pause)
        self._leave()

    async def _scrape(self) -> None:
        if self._connection is not None and self._connection[0].at_eof():
            self._leave()
        if self._connection is None:
            self._connection = await asyncio.open_connection(LOOPBACK, self.port, limit=1 << 20)
        reader, writer = self._connection
        writer.write(self.request)
        async with asyncio.timeout(PATIENCE):
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            body = await reader.readuntil(b"\r\n0\r\n\r\n")  # the kubelet of the sandbox sends chunks
            assert unchunked(body) == recorded_metrics(), head
        self.good += 1
        if b"connection: close" in head:
            self._leave()

    def _leave(self) -> None:
        if self._connection is not None:
            self._connection[1].transport.abort()
            self._connection = None


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_rolling_update_breaks_no_request_of_keep_alive_clients(workers: str) -> None:
    """One of two proxies behind a balancer ends under load: each of 584 requests and more is answered whole."""
    async with running_lab() as lab:
        kubelet = await lab.cluster.add_kubelet("node-a")
        settings = {
            "DRAIN_DELAY": "5",
            "SCRAPE_CONCURRENCY_PER_NODE": "64",
            "PROXY_WORKERS": workers,
        }
        async with await lab.proxy(**settings) as old, await lab.proxy(**settings) as new:
            await old.ready()
            await new.ready()
            ports = [await daemon.port("port") for daemon in (old, new)]
            async with TcpProxy(LOOPBACK, *ports) as balancer:
                clients = [KeepAliveClient(balancer.port, kubelet_path(kubelet.port)) for _ in range(12)]
                is_over = asyncio.Event()
                # From clients that hardly pause to those whose connection is idle when the proxy ends.
                running = [
                    asyncio.create_task(client.run(is_over, 0.01 * 1.6**number))
                    for number, client in enumerate(clients)
                ]

                def answered() -> int:
                    return sum(client.good for client in clients)

                await until(lambda: answered() > 200)
                old.send(signal.SIGTERM)
                await old.until_said("draining")
                await asyncio.sleep(0.5)  # the balancer hears of it later than the proxy
                balancer.lead_to(ports[1])
                assert await old.ended(STOP_WITHIN) == 0
                before = answered()
                await until(lambda: answered() > max(before + 200, 600))
                is_over.set()
                await asyncio.gather(*running)
                assert [client.problems for client in clients] == [[]] * len(clients)


@pytest.mark.parametrize("name", ["PORT", "ADMIN_PORT"])
async def test_port_that_is_taken_is_told_in_a_line(name: str) -> None:
    """Exit 1, with the setting's name and the port."""
    async with running_lab() as lab:
        with socket.create_server(("", reserve_ports(1)[0])) as taken:
            port = str(taken.getsockname()[1])
            async with await lab.proxy(**{name: port}) as daemon:
                assert await daemon.ended() == 1
                (line,) = daemon.said("cannot go on")
                assert name in line["problem"]
                assert port in line["problem"]
