"""The fence before Consul: a write that is under way when its time is over does not arrive later."""

import asyncio
import contextlib
import select
import socket
import time
from collections.abc import Iterator

import pytest

from k8s_consul_registrar.consul.access import ConsulAccess, ConsulAddress
from k8s_consul_registrar.consul.agent import AgentRegistry
from k8s_consul_registrar.consul.client import ConsulClient, Fence
from k8s_consul_registrar.errors import ConsulFenced, ConsulUnreachable
from k8s_consul_registrar.sandbox.consul import Consul
from k8s_consul_registrar.settings.reading import read_registrar
from k8s_consul_registrar.wiring.registrar import Wiring
from support.builders import our_pod_service
from support.scripted import QUICK
from support.waiting import PATIENCE, until

BODY = b"x" * 40_000


@contextlib.contextmanager
def _deaf_server() -> Iterator[tuple[str, socket.socket]]:
    """Listen without reading, with room for a head and little more."""
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        listening.settimeout(PATIENCE)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", listening


def is_connected(listening: socket.socket) -> bool:
    """Return True if a connection waits to be accepted."""
    return bool(select.select([listening], [], [], 0)[0])


def _read_until_reset(listening: socket.socket) -> int:
    """Return how many bytes come of the one connection before it is reset."""
    taken, _ = listening.accept()
    size = 0
    with taken, contextlib.suppress(ConnectionResetError):
        taken.settimeout(PATIENCE)
        while piece := taken.recv(4096):
            size += len(piece)
    return size


async def test_write_that_is_broken_off_is_not_sent_on() -> None:
    """Bytes that Consul's side did not take before the deadline never arrive, even when the network is free again."""
    with _deaf_server() as (url, listening):
        ends = time.monotonic() + 0.3
        fence = Fence(lambda: ends - time.monotonic(), 60)
        async with ConsulClient(ConsulAccess(ConsulAddress(url)), QUICK, fence=fence) as client:
            with pytest.raises(ConsulFenced):
                await client.request("PUT", "/v1/x", body=BODY)
            await asyncio.sleep(0.1)
            assert _read_until_reset(listening) < len(BODY)


async def test_write_of_a_process_that_is_stopped_is_not_sent_on() -> None:
    """The process is asleep and cannot break it off; the system gives it up when its time is over."""
    with _deaf_server() as (url, listening):
        async with ConsulClient(
            ConsulAccess(ConsulAddress(url)), QUICK, fence=Fence(lambda: 60, 1)
        ) as client:
            writing = asyncio.create_task(client.request("PUT", "/v1/x", body=BODY))
            await until(lambda: is_connected(listening))
            await asyncio.sleep(0.2)
            time.sleep(2)  # noqa: ASYNC251 - stands for a stopped process: our loop does nothing either
            assert _read_until_reset(listening) < len(BODY)
            with pytest.raises(ConsulUnreachable):
                await writing


async def test_observe_fences_every_write() -> None:
    """Whatever would ask for one: the client of POLICY=observe sends reads only."""
    async with Consul() as consul:
        settings = read_registrar(
            {"CLUSTER_NAME": "lab", "CONSUL_ADDRESS": consul.address, "POLICY": "observe"}
        )
        async with Wiring(settings).consul() as client:
            assert (await client.request("GET", "/v1/agent/services")).status == 200
            with pytest.raises(ConsulFenced, match="POLICY is observe"):
                await AgentRegistry(client).register([our_pod_service("a")])
        assert consul.writes == []
