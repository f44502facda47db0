"""Passes between a cluster and a Consul in memory, made one by one."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from prometheus_client import CollectorRegistry

from k8s_consul_registrar.registrar.brake import BrakeRules
from k8s_consul_registrar.registrar.metrics import RegistrarMetrics
from k8s_consul_registrar.registrar.ownership import Identity
from k8s_consul_registrar.registrar.passes import Passes
from k8s_consul_registrar.registrar.report import Reporter
from k8s_consul_registrar.registrar.status import PassReport, RegistrarStatus
from k8s_consul_registrar.targets.sharding import RandomShards
from memory import MemoryCluster, MemoryRegistry

# An absence that is no fact would be held for as long as a test lasts.
HELD = BrakeRules(confirm=60, confirm_start=60)


class Lab:
    """A cluster, a Consul, and the passes between them."""

    def __init__(self, *, checks_versions: bool) -> None:
        self.cluster = MemoryCluster()
        self.consul = MemoryRegistry(checks_versions=checks_versions)
        self.status = RegistrarStatus(ticked_at=0.0)
        self.passes = Passes(
            cluster=self.cluster,
            registry=self.consul,
            identity=Identity("lab"),
            shards=RandomShards(),
            rules=HELD,
            reporter=Reporter(RegistrarMetrics(CollectorRegistry()), self.status),
        )

    @property
    def names(self) -> set[str]:
        """The Pods that Consul holds a service of."""
        return {service_id.removeprefix("pod--shop--") for service_id in self.consul.held}

    async def follow(self) -> None:
        """Make a pass over what changed."""
        await self.passes.partial()

    @asynccontextmanager
    async def reading(self, read_first: int = 0) -> AsyncIterator[asyncio.Task[PassReport]]:
        """Be in the middle of a full pass's read, which goes on at the end of this."""
        self.consul.read_first = read_first
        self.consul.may_read_on.clear()
        full = asyncio.create_task(self.passes.full(self.follow))
        await asyncio.sleep(0.01)
        try:
            yield full
        finally:
            self.consul.may_read_on.set()
            async with asyncio.timeout(5):
                await asyncio.wait({full})

    async def until(self, *names: str) -> None:
        """Wait until Consul holds just these Pods' services."""
        async with asyncio.timeout(5):
            while self.names != set(names):
                await asyncio.sleep(0.002)
