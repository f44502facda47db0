"""Composition of the registrar: builds the parts the settings ask for, and connects them."""

import asyncio
import time
from collections.abc import Coroutine, Iterable
from contextlib import AsyncExitStack
from dataclasses import dataclass

from prometheus_client import CollectorRegistry

from k8s_consul_registrar import __version__
from k8s_consul_registrar.admin.api import api_routes
from k8s_consul_registrar.admin.page import page_routes
from k8s_consul_registrar.admin.server import AdminServer
from k8s_consul_registrar.app.census import Census
from k8s_consul_registrar.app.lifecycle import Stop, run_until_stopped
from k8s_consul_registrar.app.parts import (
    brake_rules,
    consul_access,
    consul_registry,
    followed_cluster,
    former_places,
    http_sd_server,
    identity,
    new_elector,
    shards,
    sweeper,
)
from k8s_consul_registrar.app.process import new_registry
from k8s_consul_registrar.app.view import View
from k8s_consul_registrar.backoff import Timing
from k8s_consul_registrar.consul.client import ConsulClient
from k8s_consul_registrar.consul.fence import Fence
from k8s_consul_registrar.kube.access import Access, load_access
from k8s_consul_registrar.kube.client import KubeClient
from k8s_consul_registrar.kube.cluster import FollowedCluster
from k8s_consul_registrar.model import Service
from k8s_consul_registrar.registrar.budget import FULL_READ_GAP, BudgetRules
from k8s_consul_registrar.registrar.collector import RegistrarCollector
from k8s_consul_registrar.registrar.elector import Elector
from k8s_consul_registrar.registrar.metrics import RegistrarMetrics
from k8s_consul_registrar.registrar.ownership import Claim
from k8s_consul_registrar.registrar.progress import tell_progress
from k8s_consul_registrar.registrar.reconciler import Reconciler
from k8s_consul_registrar.registrar.record import OwnRecord
from k8s_consul_registrar.registrar.relocation import leave
from k8s_consul_registrar.registrar.status import RegistrarStatus
from k8s_consul_registrar.settings.backend_options import NONE
from k8s_consul_registrar.settings.modes import RegistrarSettings
from k8s_consul_registrar.telemetry import get_logger

# A loop that has not turned for so long, in seconds, hangs: no single request may take a tenth of it.
HANG = 600.0

log = get_logger("app")


@dataclass(frozen=True, slots=True)
class _Health:
    """Shows the reconciler's status to the probes."""

    status: RegistrarStatus

    def is_alive(self) -> bool:
        """Whether the loop has turned lately."""
        return time.monotonic() - self.status.ticked_at < HANG

    def readiness(self) -> str:
        """Return why not ready, empty when ready."""
        return self.status.readiness()


async def run_registrar(settings: RegistrarSettings, stop: Stop, timing: Timing | None = None) -> None:
    """Keep Consul equal to the cluster until a stop is asked for."""
    timing = timing or Timing()
    for warning in settings.common.warnings:
        log.warning(warning)
    access = load_access(settings.common.environment)
    registry = new_registry("registrar")
    async with KubeClient(access, timing) as kube, AsyncExitStack() as stack:
        elector = new_elector(settings, kube)
        client = None
        if settings.backend.backend != NONE:
            client = ConsulClient(consul_access(settings.consul), timing, fence=_fence(settings, elector))
            await stack.enter_async_context(client)
        cluster = followed_cluster(settings, kube, timing)
        metrics = RegistrarMetrics(registry)
        reconciler = Reconciler(
            cluster=cluster,
            registry=OwnRecord() if client is None else consul_registry(settings, client, timing),
            identity=identity(settings),
            shards=shards(settings),
            rules=brake_rules(settings),
            period=settings.sync_period,
            timing=timing,
            metrics=metrics,
            budget=BudgetRules(gap=min(FULL_READ_GAP, settings.sync_period)),
            leadership=elector,
            sweeper=None if client is None else sweeper(settings, client, cluster, metrics, timing),
        )
        view = View(
            settings,
            cluster.mirror,
            reconciler.passes,
            reconciler.status,
            identity(settings),
            shards(settings),
            None if elector is None else lambda: elector.holder,
        )
        await _serve(settings, view, registry, stack, access=access, census=Census(view, cluster.activity))
        aside = (
            _relocation(settings, view, client, timing),
            tell_progress(view.progress, settings.backend.backend),
        )
        await _run(stop, cluster, reconciler, elector, aside)
    log.info("registrar ends; what is registered stays")


async def _relocation(
    settings: RegistrarSettings, view: View, client: ConsulClient | None, timing: Timing
) -> None:
    """Remove from places of earlier settings what stands at the new one; what does not, stays there."""
    who, passes, mirror = view.identity, view.passes, view.mirror

    def may_go(service: Service) -> bool:
        is_here = passes.entry(service.id) is not None
        return is_here and who.claim(service, mirror.cluster_uid) is Claim.OURS

    if client is not None:
        places = former_places(settings, client, timing, may_go)
        await leave(places, passes, lambda: not view.status_of.is_standby, timing)


async def _serve(
    settings: RegistrarSettings,
    view: View,
    registry: CollectorRegistry,
    stack: AsyncExitStack,
    *,
    access: Access,
    census: Census,
) -> None:
    """Open the admin port, and the port of http_sd where it is wanted."""
    meta_keys = settings.naming.meta_keys
    registry.register(RegistrarCollector(census.figures))
    ports = {}
    if settings.http_sd is not None:
        server = http_sd_server(settings.http_sd, view, meta_keys.wire)
        await stack.enter_async_context(server)
        refreshing = asyncio.create_task(server.keep_fresh())
        stack.callback(refreshing.cancel)
        ports["http_sd_port"] = server.port
    admin = await stack.enter_async_context(
        AdminServer(
            port=settings.common.admin_port,
            health=_Health(view.status_of),
            registry=registry,
            routes=[*page_routes(), *api_routes(view, meta_keys.wire)],
            before_metrics=census.refresh,
        )
    )
    log.info(
        "registrar starts",
        version=__version__,
        cluster=settings.cluster_name,
        instance=settings.instance,
        api_server=access.server,
        credentials=access.origin,
        consul=settings.consul.socket or settings.consul.url,
        backend=settings.backend.backend,
        admin_port=admin.port,
        **ports,
    )


async def _run(
    stop: Stop,
    cluster: FollowedCluster,
    reconciler: Reconciler,
    elector: Elector | None,
    aside: Iterable[Coroutine[None, None, None]],
) -> None:
    """Run everything until the stop; the lease is given back only when nothing writes any more."""
    async with asyncio.TaskGroup() as group:
        electing = None if elector is None else group.create_task(elector.run())
        await run_until_stopped(stop, cluster.run(), reconciler.run(), *aside)
        reconciler.status.is_draining = True
        if electing is not None:
            electing.cancel()


def _fence(settings: RegistrarSettings, elector: Elector | None) -> Fence | None:
    """Return what keeps writes within our lead, None where nobody else writes."""
    if elector is None or settings.election is None:
        return None
    times = settings.election.timing

    def left() -> float:
        return elector.writes_until - time.monotonic() if elector.is_leader else 0.0

    return Fence(left, times.lease_duration - times.renew_deadline)
