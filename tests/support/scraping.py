"""What whole-daemon tests of the proxy share: scrapes as they come, and a kubelet behind a door."""

from collections.abc import Mapping
from typing import NamedTuple

import aiohttp
from yarl import URL

from k8s_consul_registrar.sandbox.kubelet import recorded_metrics
from support.daemon import Daemon
from support.lab import SandboxLab
from support.real_process import LOOPBACK
from support.tcp_proxy import TcpProxy
from support.waiting import PATIENCE

LIMIT = aiohttp.ClientTimeout(total=PATIENCE)


class Scraped(NamedTuple):
    """An answer as it came, still encoded."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def text(self) -> str:
        """The body of a refusal."""
        return self.body.decode()


def path_of(port: int, host: str = LOOPBACK) -> str:
    """Return the path of a kubelet's metrics as the registrar puts it in Consul."""
    return f"/api/v1/nodes/{host}:{port}/metrics/cadvisor"


async def scrape(
    daemon: Daemon,
    path: str,
    headers: Mapping[str, str] | None = None,
    *,
    method: str = "GET",
    host: str = LOOPBACK,
) -> Scraped:
    """Send one request to the proxy on a connection of its own."""
    url = URL(f"http://{host}:{await daemon.port('port')}{path}", encoded=True)
    async with (
        aiohttp.ClientSession(timeout=LIMIT, auto_decompress=False) as session,
        session.request(
            method, url, headers=headers, skip_auto_headers=["Accept", "Accept-Encoding"]
        ) as response,
    ):
        return Scraped(response.status, dict(response.headers), await response.read())


async def kubelet_door(lab: SandboxLab, metrics: bytes = b"") -> TcpProxy:
    """Start the kubelet of a Node `node-a` behind a door, and return the door."""
    kubelet = await lab.cluster.start_kubelet("node-a")
    kubelet.serve(metrics or recorded_metrics())
    door = TcpProxy(LOOPBACK, kubelet.port)
    await lab.cluster.add_node("node-a", ("InternalIP", LOOPBACK), kubelet_port=door.port)
    return door
