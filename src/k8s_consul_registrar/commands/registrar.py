"""The command registrar: keeps Consul equal to what the cluster wants scraped, until a signal."""

import argparse
import asyncio
from collections.abc import Coroutine, Iterable, Mapping
from contextlib import AsyncExitStack
from pathlib import Path

from prometheus_client import CollectorRegistry

from k8s_consul_registrar import __version__
from k8s_consul_registrar.admin.metrics import new_registry
from k8s_consul_registrar.admin.server import AdminServer
from k8s_consul_registrar.admin.state_file import SavedTargetsGate, StateKeeper, open_state
from k8s_consul_registrar.admin.status_api import api_routes, page_routes
from k8s_consul_registrar.admin.view import About, Census, View, no_election
from k8s_consul_registrar.backoff import Timing
from k8s_consul_registrar.commands import start_logs
from k8s_consul_registrar.consul.client import ConsulClient
from k8s_consul_registrar.consul.previous_location import clear_previous_locations
from k8s_consul_registrar.kube.access import Access
from k8s_consul_registrar.model import Service
from k8s_consul_registrar.registrar.elector import Elector
from k8s_consul_registrar.registrar.metrics import RegistrarCollector, RegistrarMetrics
from k8s_consul_registrar.registrar.observed import AsDesired
from k8s_consul_registrar.registrar.ownership import Claim
from k8s_consul_registrar.registrar.reporter import tell_progress
from k8s_consul_registrar.runner import Stop, run_mode, run_until_stopped
from k8s_consul_registrar.settings.consul import NONE
from k8s_consul_registrar.settings.reading import read_registrar, shown_settings
from k8s_consul_registrar.settings.registrar import RegistrarSettings
from k8s_consul_registrar.telemetry import get_logger
from k8s_consul_registrar.wiring.consul import previous_locations
from k8s_consul_registrar.wiring.registrar import RegistrarParts, Wiring, http_sd_server

log = get_logger("app")


def run(parsed: argparse.Namespace, environment: Mapping[str, str]) -> int:
    """Run the registrar until a signal."""
    del parsed
    settings = read_registrar(environment)
    start_logs(settings.common)
    return run_mode(lambda stop: run_registrar(settings, stop))


async def run_registrar(settings: RegistrarSettings, stop: Stop, timing: Timing | None = None) -> None:
    """Keep Consul equal to the cluster until a stop is asked for."""
    wiring = Wiring(settings, timing)
    timing = wiring.timing
    saved = None
    if settings.state_file:
        saved = await asyncio.to_thread(open_state, Path(settings.state_file), wiring.origin)
    registry = new_registry("registrar")
    async with wiring.kube() as kube, AsyncExitStack() as stack:
        elector = wiring.elector(kube)
        client = None
        if settings.backend.backend != NONE:
            client = await stack.enter_async_context(wiring.consul(elector))
        parts = wiring.core(
            kube=kube,
            client=client,
            metrics=RegistrarMetrics(registry),
            elector=elector,
            saved_cluster_uid=saved.cluster_uid if saved is not None and saved.is_settled else "",
        )
        view = View(
            _about(settings),
            parts.core.desired,
            parts.core.observed,
            parts.core.status,
            parts.core.rules,
            settings.naming.meta_keys,
            no_election if elector is None else lambda: elector.holder,
        )
        census = Census(view, parts.reflectors.stats)
        gate = SavedTargetsGate(saved, view, parts.cluster_uid)
        await _serve(settings, view, registry, stack, access=wiring.access, census=census, gate=gate)
        aside = [
            tell_progress(view.progress, settings.backend.backend),
            parts.selection.keep(is_settled=lambda: _is_settled(parts), timing=timing),
            gate.run(),
        ]
        if client is not None:
            aside.append(_clear_previous_locations(settings, parts, client, timing))
        keeper = None
        if settings.state_file:
            keeper = StateKeeper(
                Path(settings.state_file), wiring.origin, view, is_settled=lambda: parts.selection.is_settled
            )
            aside.append(keeper.run())
        await _run(stop, parts, elector, aside)
        if keeper is not None:
            await stop.unless_urgent(keeper.save_at_end())
    log.info("registrar ends; what is registered stays")


def _about(settings: RegistrarSettings) -> About:
    return About(
        settings.cluster_name,
        settings.instance,
        settings.backend.backend,
        settings.consul.socket or settings.consul.url,
        shown_settings(settings.common.environment),
    )


def _is_settled(parts: RegistrarParts) -> bool:
    """Return True if everything in Consul was written or compared under the settings of this process."""
    status = parts.core.status
    is_compared = status.has_synced and parts.core.queue.is_drained
    return is_compared and not status.is_standby and not status.held


async def _clear_previous_locations(
    settings: RegistrarSettings, parts: RegistrarParts, client: ConsulClient, timing: Timing
) -> None:
    """Remove services from places of earlier settings as far as they are at the new one."""
    identity = parts.core.rules.identity

    def is_ours(service: Service) -> bool:
        return identity.claim(service, parts.core.desired.cluster_uid) is Claim.OURS

    def may_go(service: Service) -> bool:
        return isinstance(parts.core.observed.get(service.id), AsDesired)

    controller = parts.controller
    await clear_previous_locations(
        previous_locations(settings, client, is_ours, may_go),
        is_ready=lambda: controller.is_complete and not controller.status.is_standby,
        timing=timing,
    )


async def _serve(
    settings: RegistrarSettings,
    view: View,
    registry: CollectorRegistry,
    stack: AsyncExitStack,
    *,
    access: Access,
    census: Census,
    gate: SavedTargetsGate,
) -> None:
    """Open the admin port, and the port of http_sd where it is wanted."""
    registry.register(RegistrarCollector(census.figures))
    ports = {}
    if settings.http_sd is not None:
        server = http_sd_server(settings.http_sd, view, gate.current)
        await stack.enter_async_context(server)
        refreshing = asyncio.create_task(server.keep_fresh())
        stack.callback(refreshing.cancel)
        ports["http_sd_port"] = server.port
    admin = await stack.enter_async_context(
        AdminServer(
            port=settings.common.admin_port,
            health=view.status,
            registry=registry,
            routes=[*page_routes(), *api_routes(view)],
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
    parts: RegistrarParts,
    elector: Elector | None,
    aside: Iterable[Coroutine[None, None, None]],
) -> None:
    """Run everything until the stop; the lease is given back only when nothing writes any more."""
    async with asyncio.TaskGroup() as group:
        electing = None if elector is None else group.create_task(elector.run())
        await run_until_stopped(stop, parts.reflectors.run(), parts.controller.run(), *aside)
        parts.core.status.is_draining = True
        if electing is not None:
            electing.cancel()
