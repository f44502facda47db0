"""A cluster, a Consul and the doors before them, with the daemon between: what whole-daemon tests stand on."""

import contextlib
import tempfile
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import aiohttp

from cluster import PROXY_RULES, REGISTRAR_RULES, Cluster, kubeconfig, running_cluster
from daemon import Daemon
from k8s_consul_registrar.sandbox.consul import Consul
from k8s_consul_registrar.sandbox.consul_http import ConsulOptions
from k8s_consul_registrar.sandbox.consul_model import Service
from real_process import LOOPBACK
from tcp_proxy import TcpProxy

CLUSTER_NAME = "lab"
PERIOD = "0.3"  # seconds between full passes
QUICK = {
    "CLUSTER_NAME": CLUSTER_NAME,
    "SYNC_PERIOD": PERIOD,
    "BRAKE_CONFIRM": "0.5",
    "BRAKE_CONFIRM_START": "1",
}


class Lab:
    """One test's world: `api_door` and `consul_door` are TCP proxies before the two servers.

    `kubeconfig` reads its token from `token_file`, so that a test can exchange it.
    """

    def __init__(
        self, cluster: Cluster, consul: Consul, api_door: TcpProxy, consul_door: TcpProxy, folder: Path
    ) -> None:
        self.cluster = cluster
        self.consul = consul
        self.api_door = api_door
        self.consul_door = consul_door
        self.folder = folder
        self.kubeconfig = folder / "kubeconfig"
        self.token_file = folder / "token"
        self.kubeconfig.write_text(
            kubeconfig(api_door.address, cluster.endpoint.authority, {"tokenFile": str(self.token_file)})
        )

    async def registrar(self, **environment: str) -> Daemon:
        """Return a registrar, not started yet, with the rights of `deploy/rbac.yaml`."""
        if not self.token_file.exists():
            self.token_file.write_text(await self.cluster.token(REGISTRAR_RULES))
        settings = {"CONSUL_ADDRESS": self.consul_door.address, **QUICK, **environment}
        return self.daemon("registrar", **settings)

    async def proxy(self, **environment: str) -> Daemon:
        """Return a proxy, not started yet, with the rights of `deploy/rbac.yaml`."""
        if not self.token_file.exists():
            self.token_file.write_text(await self.cluster.token(PROXY_RULES))
        settings = {"PORT": "0", "PROXY_ALLOW_LOOPBACK": "true", "DRAIN_DELAY": "0", **environment}
        return self.daemon("proxy", **settings)

    def daemon(self, *arguments: str, **environment: str) -> Daemon:
        """Return a daemon, not started yet; a setting that is empty counts as unset."""
        secrets = [self.token_file.read_text()] if self.token_file.exists() else []
        settings = {"KUBECONFIG": str(self.kubeconfig), **environment}
        return Daemon(arguments, settings, self.folder, secrets=secrets)

    @property
    def services(self) -> dict[str, Service]:
        """What the agent holds, by ID."""
        return self.consul.agent.services

    def meta(self, service_id: str) -> Mapping[str, str]:
        """Return the meta of a service."""
        return self.services[service_id].meta or {}

    async def seed(self, service_id: str, meta: Mapping[str, str] | None = None, **changes: Any) -> None:
        """Register a service as somebody else would, and take it out of the record of writes."""
        body = {
            "ID": service_id,
            "Name": service_id,
            "Address": "203.0.113.9",
            "Port": 99,
            "Meta": meta or {},
        }
        async with aiohttp.ClientSession() as session:
            url = f"{self.consul.url}/v1/agent/service/register"
            async with session.put(url, json={**body, **changes}) as response:
                assert response.status == 200, await response.text()
        self.consul.writes.clear()


@contextlib.asynccontextmanager
async def running_lab(*, consul: ConsulOptions | None = None) -> AsyncIterator[Lab]:
    """Run an empty cluster and an empty Consul."""
    with tempfile.TemporaryDirectory(prefix="lab-") as folder:
        async with (
            running_cluster() as cluster,
            Consul(consul or ConsulOptions()) as agent,
            TcpProxy(LOOPBACK, cluster.endpoint.port) as api_door,
            TcpProxy(LOOPBACK, int(agent.address.rpartition(":")[2])) as consul_door,
        ):
            yield Lab(cluster, agent, api_door, consul_door, Path(folder))
