"""An election in a cluster: the Lease, the replicas that take part in this process, and a door to shut on them."""

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from k8s_consul_registrar.backoff import Timing
from k8s_consul_registrar.kube.access import load_access
from k8s_consul_registrar.kube.client import KubeClient
from k8s_consul_registrar.kube.lease import LeaseClient
from k8s_consul_registrar.registrar.elector import Elector, clock
from support.cluster import Cluster, Rules, kubeconfig, running_cluster
from support.contender import TIMING
from support.real_process import LOOPBACK
from support.tcp_proxy import TcpProxy
from support.waiting import PATIENCE, until

NAME = "k8s-consul-registrar"
RULES: Rules = [
    {"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": ["get", "create", "update"]}
]
RETRY = TIMING.stretched(1)


class Polls:
    """One election: a namespace of its own in the cluster, and the replicas that take part."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster = cluster
        self.namespace = f"election-{secrets.token_hex(4)}"
        self.path = f"/apis/coordination.k8s.io/v1/namespaces/{self.namespace}/leases/{NAME}"
        self._folder = folder

    async def kubeconfig(self, address: str = "", rules: Rules = RULES) -> Path:
        """Write a kubeconfig for a new user who may do just this."""
        address = address or f"{LOOPBACK}:{self.cluster.endpoint.port}"
        path = self._folder / f"kubeconfig-{secrets.token_hex(4)}"
        user = {"token": await self.cluster.token(rules)}
        path.write_text(kubeconfig(address, self.cluster.endpoint.authority, user))
        return path

    @contextlib.asynccontextmanager
    async def client(self, address: str = "", rules: Rules = RULES) -> AsyncIterator[LeaseClient]:
        """Yield a client of the election's Lease."""
        access = load_access({"KUBECONFIG": str(await self.kubeconfig(address, rules))})
        async with KubeClient(access, Timing()) as client:
            yield LeaseClient(client, self.namespace, NAME)

    @contextlib.asynccontextmanager
    async def replica(
        self, identity: str, *, address: str = "", rules: Rules = RULES, clock: Callable[[], float] = clock
    ) -> AsyncIterator["Replica"]:
        """Run a replica, and end it in order."""
        async with self.client(address, rules) as client:
            elector = Elector(client, identity, TIMING, clock=clock)
            replica = Replica(elector, asyncio.create_task(elector.run()))
            try:
                yield replica
            finally:
                await replica.end()

    @contextlib.asynccontextmanager
    async def leader(
        self, identity: str, *, address: str = "", clock: Callable[[], float] = clock
    ) -> AsyncIterator["Replica"]:
        """Run a replica and wait until it leads."""
        async with self.replica(identity, address=address, clock=clock) as replica:
            await replica.leads()
            yield replica

    @contextlib.asynccontextmanager
    async def door(self) -> AsyncIterator[TcpProxy]:
        """Put a door before the API server that can be shut."""
        async with TcpProxy(LOOPBACK, self.cluster.endpoint.port) as door:
            yield door

    async def record(self) -> dict[str, Any]:
        """Return the Lease's spec."""
        spec: dict[str, Any] = (await self.cluster.request("GET", self.path))["spec"]
        return spec


class Replica:
    """An elector and the task that drives it."""

    def __init__(self, elector: Elector, task: asyncio.Task[None]) -> None:
        self.elector = elector
        self.task = task

    async def end(self) -> None:
        """Cancel it as SIGTERM would, and see that nothing else went wrong."""
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task

    async def leads(self, within: float = PATIENCE) -> float:
        """Wait until it leads, and return how long that took."""
        began = time.monotonic()
        await until(lambda: self.elector.is_leader, within=within, every=0.005)
        return time.monotonic() - began

    async def sees(self, holder: str) -> None:
        """Wait until it has read who holds the lease."""
        await until(lambda: self.elector.holder == holder)

    async def yields(self, within: float = PATIENCE) -> float:
        """Wait until it leads no longer, and return how long that took."""
        began = time.monotonic()
        await until(lambda: not self.elector.is_leader, within=within, every=0.005)
        return time.monotonic() - began


@contextlib.asynccontextmanager
async def running_polls(folder: Path) -> AsyncIterator[Polls]:
    """Run a cluster with a namespace for one election."""
    async with running_cluster() as cluster:
        polls = Polls(cluster, folder)
        await cluster.add_namespace(polls.namespace)
        yield polls
