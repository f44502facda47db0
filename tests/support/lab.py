"""A cluster, a Consul and the doors before them, with the daemon between: what whole-daemon tests stand on."""

import asyncio
import contextlib
import os
import ssl
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

import aiohttp
import pytest
from yarl import URL

from k8s_consul_registrar.sandbox import objects
from k8s_consul_registrar.sandbox.consul import Consul
from k8s_consul_registrar.sandbox.consul_model import Service
from k8s_consul_registrar.sandbox.consul_release import NEWEST_RELEASE, RELEASES, ConsulOptions
from k8s_consul_registrar.sandbox.kubelet import recorded_metrics
from k8s_consul_registrar.sandbox.sandbox import Sandbox
from support.cluster import (
    PROXY_RULES,
    REGISTRAR_RULES,
    Cluster,
    Endpoint,
    Rules,
    kubeconfig,
    running_cluster,
)
from support.daemon import Daemon
from support.doors import ApiDoor, Recorder, TcpProxy
from support.processes import LOOPBACK
from support.real_servers import RealConsul
from support.waiting import PATIENCE, PATIENCE_FACTOR, until

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
        """The services that the agent holds, by ID."""
        return self.consul.agent.services

    @property
    def writes(self) -> list[str]:
        """The writes that Consul was asked for: `register <id>` or `deregister <id>`, in order."""
        seen = []
        for write in self.consul.writes:
            verb, _, service_id = write.path.removeprefix("/v1/agent/service/").partition("/")
            seen.append(f"{verb} {unquote(service_id) or write.json()['ID']}")
        return seen

    def has(self, *service_ids: str) -> bool:
        """Return whether the agent holds exactly these services."""
        return set(self.services) == set(service_ids)

    def holds_nothing(self) -> bool:
        """Return whether the agent holds no service."""
        return not self.services

    def address(self, service_id: str) -> str:
        """Return the address of a service, empty while there is none."""
        service = self.services.get(service_id)
        return service.address if service else ""

    def meta(self, service_id: str) -> Mapping[str, str]:
        """Return the meta of a service."""
        return self.services[service_id].meta or {}

    async def seed(self, service_id: str, meta: Mapping[str, str] | None = None, **changes: Any) -> Service:
        """Register a service as another program would, and leave that out of the record of writes."""
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
        """Deregister a service as another program would, and leave that out of the record of writes."""
        await self._put(f"deregister/{quote(service_id, safe='')}", None)

    async def _put(self, what: str, body: Any) -> None:
        url = URL(f"{self.consul.url}/v1/agent/service/{what}", encoded=True)
        async with aiohttp.ClientSession() as session, session.put(url, json=body) as response:
            assert response.status == 200, await response.text()
        self.consul.writes.clear()

    async def seed_pod(self, name: str, namespace: str = "shop", **changes: str) -> Service:
        """Register the service that an earlier run of the registrar wrote for a Pod; a change to an empty text leaves it out."""
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


def each_release() -> pytest.MarkDecorator:
    """Run a test on the oldest and the newest release of the sandbox's Consul, and on all in a long run."""
    return pytest.mark.parametrize(
        "release",
        [
            pytest.param(value, id=name, marks=[] if name in ("1.8", NEWEST_RELEASE) else [pytest.mark.long])
            for name, value in RELEASES.items()
        ],
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


def kubelet_path(port: int, host: str = LOOPBACK) -> str:
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


IS_SOAK = os.environ.get("SOAK") == "1"
ANNOTATIONS = {"prometheus.io/scrape": "true", "prometheus.io/port": "9102"}
# The figure, and the bound of the short runs, which share a busy machine.
HEAL_WITHIN = (10.0 if IS_SOAK else 60.0) * PATIENCE_FACTOR


def scaled(short: int, long: int) -> int:
    """Return the short figure, or with SOAK=1 the long one."""
    return long if IS_SOAK else short


def chaos(group: str, *, seconds: int = 240, soak_seconds: int = 240) -> list[pytest.MarkDecorator]:
    """Return the marks of a module of faults: what it runs beside, and its longest test's time."""
    return [
        pytest.mark.real,
        pytest.mark.long,
        pytest.mark.soak,
        pytest.mark.xdist_group(group),
        pytest.mark.timeout(scaled(seconds, soak_seconds) * PATIENCE_FACTOR),
    ]


class Held(NamedTuple):
    """A service in Consul's catalog, as far as the cluster decides it."""

    name: str
    address: str
    port: int
    cluster: str
    pod: str


class Record(NamedTuple):
    """A service in the catalog, with the fields that a re-creation or another shard would change."""

    held: Held
    created: int
    shard: str


class Doors(NamedTuple):
    """The proxies between a registrar and both sides: a wire of TCP, then a door that reads HTTP."""

    api: ApiDoor
    api_wire: TcpProxy
    consul: Recorder
    consul_wire: TcpProxy


class Home(NamedTuple):
    """The name of a cluster, and where its files are."""

    name: str
    folder: Path


class ChaosLab(Lab):
    """One cluster with what it wants, before one Consul.

    From the daemon to the API server: `api_wire` (TCP) and `api` (HTTP, answers in its place). To Consul:
    `consul_wire` and `consul` (records every write; a removal of what the cluster wants is wrongful).
    """

    def __init__(
        self, sandbox: Sandbox, cluster: Cluster, doors: Doors, real: RealConsul, home: Home
    ) -> None:
        super().__init__(cluster, doors.api_wire, doors.consul_wire.address, home.folder)
        self.sandbox = sandbox
        self.api, self.api_wire, self.consul, self.consul_wire = doors
        self.real = real
        self.name = home.name
        self.node = f"k8s-{home.name}"
        self.wanted: dict[str, Held] = {}
        self.rules: Rules = REGISTRAR_RULES
        self.consul.is_wanted = self.wanted.__contains__

    async def chaotic(self, **environment: str) -> Daemon:
        """Return a registrar with the catalog backend and the periods of a deployment, not started yet."""
        self.token_file.write_text(await self.cluster.token(self.rules))
        settings = {
            "CLUSTER_NAME": self.name,
            "CONSUL_BACKEND": "catalog",
            "SYNC_PERIOD": "600",
            "BRAKE_CONFIRM": "2",
            "BRAKE_CONFIRM_START": "600",
        }
        return await self.registrar(**{**settings, **environment})

    def put_pod(self, name: str, namespace: str = "shop", address: str = "198.51.100.10") -> str:
        """Create or change a Pod that is scraped, and return its service ID."""
        pod = objects.pod(name, namespace=namespace, ip=address, node_name="node-a", annotations=ANNOTATIONS)
        self.sandbox.kube.create(pod)
        service_id = f"pod--{namespace}--{name}"
        self.wanted[service_id] = Held(service_id, address, 9102, self.name, name)
        return service_id

    def put_pods(self, count: int, namespace: str = "shop", prefix: str = "web") -> None:
        """Create this many Pods that are scraped."""
        for number in range(count):
            self.put_pod(f"{prefix}-{number}", namespace, f"198.18.{number // 250 % 250}.{number % 250 + 1}")

    def put_node(self, name: str, address: str) -> None:
        """Create a Node."""
        self.sandbox.kube.create(objects.node(name, addresses=(("InternalIP", address),)))
        service_id = f"node--{address}"
        self.wanted[service_id] = Held(service_id, address, 31112, self.name, "")

    def put_nodes(self, count: int) -> None:
        """Create this many Nodes."""
        for number in range(count):
            self.put_node(f"node-{number}", f"192.0.2.{number + 1}")

    def drop_pod(self, name: str, namespace: str = "shop") -> None:
        """Delete a Pod."""
        del self.wanted[f"pod--{namespace}--{name}"]
        self.sandbox.kube.delete("Pod", name, namespace)

    def forget_history(self) -> None:
        """Cut every watch and have the API server know no version of before, so that all is listed again."""
        self.api_wire.cut()
        self.sandbox.kube.create(objects.pod("unscraped", namespace="other", ip="198.51.100.99"))
        self.sandbox.kube.delete("Pod", "unscraped", "other")
        self.sandbox.kube.create(objects.node("nowhere"))
        self.sandbox.kube.delete("Node", "nowhere")
        self.sandbox.kube.store.compact()

    async def records(self, node: str = "") -> dict[str, Record]:
        """Return what the catalog holds on our node (or another), read past every proxy."""
        status, answer = await self.real.request("GET", f"/v1/catalog/node/{node or self.node}")
        assert status in (0, 200, 500), answer
        services = (answer or {}).get("Services") or {} if status == 200 else {}
        return {
            service_id: _record(service) for service_id, service in services.items() if service_id != "consul"
        }

    async def is_equal(self, node: str = "") -> bool:
        """Return whether the catalog holds exactly the services that the cluster wants."""
        return {key: one.held for key, one in (await self.records(node)).items()} == self.wanted

    async def equal(self, daemon: Daemon, within: float = HEAL_WITHIN, node: str = "") -> float:
        """Wait until the catalog holds just what the cluster wants, and return how long that took."""
        began = time.monotonic()
        try:
            await until(lambda: self.is_equal(node), within=within, every=0.1)
        except TimeoutError:
            held = {key: one.held for key, one in (await self.records(node)).items()}
            lacks, exceeds = self.wanted.keys() - held.keys(), held.keys() - self.wanted.keys()
            differs = [key for key in held.keys() & self.wanted.keys() if held[key] != self.wanted[key]]
            told = [sorted(each)[:5] for each in (lacks, exceeds, differs)]
            sizes = len(lacks), len(exceeds), len(differs)
            pytest.fail(
                f"not equal in {within:g} s; lacks, exceeds, differs: {sizes} {told}\n{daemon.output[-6000:]}"
            )
        return time.monotonic() - began

    async def is_quiet_for(self, seconds: float) -> bool:
        """Return whether no registrar writes to Consul for a while."""
        began = time.monotonic()
        await asyncio.sleep(seconds)
        return self.consul.since(began) == []

    def assert_nothing_wrongful(self) -> None:
        """Fail when, at any moment, the removal of something the cluster wants was asked for."""
        assert self.consul.wrongful == []


def _record(service: dict[str, Any]) -> Record:
    meta = service["Meta"] or {}
    held = Held(
        service["Service"], service["Address"], service["Port"], meta.get("cluster", ""), meta.get("pod", "")
    )
    return Record(held, service["CreateIndex"], meta.get("shard_path", ""))


async def is_blind(daemon: Daemon, kind: str) -> bool:
    """Return whether the metrics say that a kind is not followed."""
    return await daemon.metric(f'source_followed{{kind="{kind}"}}') == 0


async def stays(is_so: Callable[[], Awaitable[bool]], seconds: float) -> None:
    """Fail unless something is so, again and again, for a while."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        assert await is_so()
        await asyncio.sleep(0.25)


@contextlib.asynccontextmanager
async def chaos_lab(
    real: RealConsul, *, name: str = CLUSTER_NAME, can_stream_lists: bool = True
) -> AsyncIterator[ChaosLab]:
    """Run an empty cluster before a Consul, with every door between."""
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        async with (
            Sandbox(bookmark_period=2, can_stream_lists=can_stream_lists) as sandbox,
            _doors(sandbox, real) as doors,
        ):
            port = int(sandbox.kube.url.rpartition(":")[2])
            cluster = Cluster(Endpoint(port, sandbox.authority), sandbox.admin_token, sandbox.access, None)
            try:
                yield ChaosLab(sandbox, cluster, doors, real, Home(name, Path(folder)))
            finally:
                await cluster.close()


@contextlib.asynccontextmanager
async def beside(lab: ChaosLab) -> AsyncIterator[ChaosLab]:
    """Look at the same cluster and the same Consul through doors of one's own, as another replica does."""
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        async with _doors(lab.sandbox, lab.real) as doors:
            other = ChaosLab(lab.sandbox, lab.cluster, doors, lab.real, Home(lab.name, Path(folder)))
            other.wanted = lab.wanted
            other.consul.is_wanted = lab.wanted.__contains__
            yield other


@contextlib.asynccontextmanager
async def _doors(sandbox: Sandbox, real: RealConsul) -> AsyncIterator[Doors]:
    """Put doors before both sides."""
    authority = sandbox.authority
    async with (
        ApiDoor(
            sandbox.kube.url,
            server_tls=authority.api_server(LOOPBACK),
            client_tls=ssl.create_default_context(cadata=authority.pem.decode()),
        ) as api,
        TcpProxy(LOOPBACK, api.port) as api_wire,
        Recorder(real.url) as consul,
        TcpProxy(LOOPBACK, consul.port) as consul_wire,
    ):
        yield Doors(api, api_wire, consul, consul_wire)


def created_of(records: dict[str, Record], kept: Sequence[str] | None = None) -> dict[str, int]:
    """Return the CreateIndex of each service, which a removal in between would have changed."""
    return {key: one.created for key, one in records.items() if kept is None or key in kept}
