"""A cluster, a Consul and the doors before them, with the daemon between: what whole-daemon tests stand on."""

import contextlib
import tempfile
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import aiohttp
from yarl import URL

from k8s_consul_registrar.sandbox.consul import Consul
from k8s_consul_registrar.sandbox.consul_http import ConsulOptions
from k8s_consul_registrar.sandbox.consul_model import Service
from support.cluster import PROXY_RULES, REGISTRAR_RULES, Cluster, kubeconfig, running_cluster
from support.daemon import Daemon
from support.real_process import LOOPBACK
from support.tcp_proxy import TcpProxy

CLUSTER_NAME = "lab"
MANAGED_BY = "k8s-consul-registrar"
QUICK = {
    "CLUSTER_NAME": CLUSTER_NAME,
    "SYNC_PERIOD": "1",
    "BRAKE_CONFIRM": "0.5",
    "BRAKE_CONFIRM_START": "1",
}


class Lab:
    """One test's world: `api_door` is a TCP proxy before the API server, `consul_address` any Consul's.

    `kubeconfig` leads through that door and reads its token from `token_file`, so that a test can exchange
    it.
    """

    def __init__(self, cluster: Cluster, api_door: TcpProxy, consul_address: str, folder: Path) -> None:
        self.cluster = cluster
        self.api_door = api_door
        self.folder = folder
        self.kubeconfig = folder / "kubeconfig"
        self.token_file = folder / "token"
        self.consul_address = consul_address
        self.kubeconfig.write_text(
            kubeconfig(api_door.address, cluster.endpoint.authority, {"tokenFile": str(self.token_file)})
        )

    async def registrar(self, **environment: str) -> Daemon:
        """Return a registrar, not started yet, with the rights of `deploy/rbac.yaml` unless it has others."""
        if not self.token_file.exists():
            self.token_file.write_text(await self.cluster.token(REGISTRAR_RULES))
        settings = {"CONSUL_ADDRESS": self.consul_address, **QUICK, **environment}
        return self.daemon("registrar", **settings)

    async def proxy(self, **environment: str) -> Daemon:
        """Return a proxy, not started yet, with the rights of `deploy/rbac.yaml` unless it has others."""
        if not self.token_file.exists():
            self.token_file.write_text(await self.cluster.token(PROXY_RULES))
        settings = {"PORT": "0", "PROXY_ALLOW_LOOPBACK": "true", "DRAIN_DELAY": "0", **environment}
        return self.daemon("proxy", **settings)

    def daemon(self, *arguments: str, **environment: str) -> Daemon:
        """Return a daemon, not started yet; a variable that is empty counts as unset."""
        secrets = [self.token_file.read_text()] if self.token_file.exists() else []
        settings = {"KUBECONFIG": str(self.kubeconfig), **environment}
        return Daemon(arguments, settings, self.folder, secrets=secrets)


class SandboxLab(Lab):
    """A world whose Consul is the sandbox's, behind `consul_door`; it is looked into from inside."""

    def __init__(
        self, cluster: Cluster, api_door: TcpProxy, consul: Consul, consul_door: TcpProxy, folder: Path
    ) -> None:
        super().__init__(cluster, api_door, consul_door.address, folder)
        self.consul = consul
        self.consul_door = consul_door

    @property
    def services(self) -> dict[str, Service]:
        """What the agent holds, by ID."""
        return self.consul.agent.services

    @property
    def writes(self) -> list[str]:
        """What was asked of Consul to change: `register <id>` or `deregister <id>`, in order."""
        seen = []
        for write in self.consul.writes:
            verb, _, service_id = write.path.removeprefix("/v1/agent/service/").partition("/")
            seen.append(f"{verb} {unquote(service_id) or write.json()['ID']}")
        return seen

    def has(self, *service_ids: str) -> bool:
        """Whether the agent holds just these services."""
        return set(self.services) == set(service_ids)

    def holds_nothing(self) -> bool:
        """Whether the agent holds no service."""
        return not self.services

    def address(self, service_id: str) -> str:
        """Return the address of a service, empty while there is none."""
        service = self.services.get(service_id)
        return service.address if service else ""

    def meta(self, service_id: str) -> Mapping[str, str]:
        """Return the meta of a service."""
        return self.services[service_id].meta or {}

    async def seed(self, service_id: str, meta: Mapping[str, str] | None = None, **changes: Any) -> Service:
        """Register a service as somebody else would, and take that out of the record of writes."""
        body = {
            "ID": service_id,
            "Name": service_id,
            "Address": "203.0.113.9",
            "Port": 99,
            "Meta": meta or {},
        }
        await self._put("register", {**body, **changes})
        return self.services[service_id]

    async def unseed(self, service_id: str) -> None:
        """Deregister a service as somebody else would, and take that out of the record of writes."""
        await self._put(f"deregister/{quote(service_id, safe='')}", None)

    async def _put(self, what: str, body: Any) -> None:
        url = URL(f"{self.consul.url}/v1/agent/service/{what}", encoded=True)
        async with aiohttp.ClientSession() as session, session.put(url, json=body) as response:
            assert response.status == 200, await response.text()
        self.consul.writes.clear()

    async def seed_pod(self, name: str, namespace: str = "shop", **changes: str) -> Service:
        """Register what an earlier run of ours wrote for a Pod; a change to an empty text leaves it out."""
        meta = {
            "managed_by": MANAGED_BY,
            "cluster": CLUSTER_NAME,
            "kind": "pod",
            "namespace": namespace,
            "pod": name,
            "metrics_path": "/metrics",
            "scheme": "http",
            **changes,
        }
        return await self.seed(
            f"pod--{namespace}--{name}", {key: value for key, value in meta.items() if value}
        )


@contextlib.asynccontextmanager
async def running_lab(consul: ConsulOptions | None = None) -> AsyncIterator[SandboxLab]:
    """Run an empty cluster and an empty Consul of the sandbox."""
    with tempfile.TemporaryDirectory(prefix="lab-") as folder:
        async with (
            running_cluster() as cluster,
            Consul(consul or ConsulOptions()) as agent,
            TcpProxy(LOOPBACK, cluster.endpoint.port) as api_door,
            TcpProxy(LOOPBACK, int(agent.address.rpartition(":")[2])) as consul_door,
        ):
            yield SandboxLab(cluster, api_door, agent, consul_door, Path(folder))


@contextlib.asynccontextmanager
async def running_lab_with(consul_address: str) -> AsyncIterator[Lab]:
    """Run an empty cluster beside a Consul that runs already."""
    with tempfile.TemporaryDirectory(prefix="lab-") as folder:
        async with running_cluster() as cluster, TcpProxy(LOOPBACK, cluster.endpoint.port) as api_door:
            yield Lab(cluster, api_door, consul_address, Path(folder))
