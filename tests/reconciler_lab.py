"""A whole reconciler between a cluster and a Consul in memory."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress

from prometheus_client import CollectorRegistry

from builders import make_pod
from fake_consul import QUICK
from k8s_consul_registrar.model import Disturbance
from k8s_consul_registrar.registrar.brake import BrakeRules
from k8s_consul_registrar.registrar.budget import BudgetRules
from k8s_consul_registrar.registrar.metrics import RegistrarMetrics
from k8s_consul_registrar.registrar.ownership import Identity
from k8s_consul_registrar.registrar.ports import Leadership, Sweeps
from k8s_consul_registrar.registrar.reconciler import Reconciler
from k8s_consul_registrar.targets.sharding import RandomShards, Shards
from memory import MemoryCluster, MemoryRegistry


@asynccontextmanager
async def running(reconciler: Reconciler) -> AsyncIterator[None]:
    """Run a reconciler's loop."""
    task = asyncio.create_task(reconciler.run())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


class Lab:
    """A reconciler between a cluster and a Consul in memory."""

    def __init__(
        self,
        *,
        checks_versions: bool = True,
        shards: Shards | None = None,
        period: float = 60,
        budget: BudgetRules | None = None,
        leadership: Leadership | None = None,
        sweeper: Sweeps | None = None,
    ) -> None:
        self.cluster = MemoryCluster()
        self.consul = MemoryRegistry(checks_versions=checks_versions)
        self.metrics = CollectorRegistry()
        self.reconciler = Reconciler(
            cluster=self.cluster,
            registry=self.consul,
            identity=Identity("lab"),
            shards=shards or RandomShards(),
            rules=BrakeRules(confirm=0, confirm_start=0),
            period=period,
            timing=QUICK,
            metrics=RegistrarMetrics(self.metrics),
            budget=budget or BudgetRules(gap=0),
            leadership=leadership,
            sweeper=sweeper,
        )

    def running(self) -> AbstractAsyncContextManager[None]:
        """Run the loop."""
        return running(self.reconciler)

    async def until(self, names: Iterable[str]) -> None:
        """Wait until Consul holds just these Pods' services."""
        expected = {f"pod--shop--{name}" for name in names}
        await self.until_so(lambda: set(self.consul.held) == expected)

    async def until_so(self, is_so: Callable[[], bool]) -> None:
        """Wait until something is so."""
        async with asyncio.timeout(5):
            while not is_so():
                await asyncio.sleep(0.002)

    async def synced(self, *names: str) -> None:
        """List these Pods and wait until everything was compared once."""
        self.cluster.put_list([make_pod(name) for name in names])
        await self.until(names)
        await self.until_so(lambda: self.reconciler.status.has_synced)

    async def stall_a_full_read(self) -> None:
        """Be in the middle of one until Consul `may_read_on`."""
        self.consul.may_read_on.clear()
        self.consul.foreign = Disturbance.CHANGED
        reads = self.consul.reads
        await self.until_so(lambda: self.consul.reads > reads)

    def value(self, name: str, **labels: str) -> float | None:
        """Return a metric's value."""
        return self.metrics.get_sample_value(f"k8s_consul_registrar_{name}", labels)
