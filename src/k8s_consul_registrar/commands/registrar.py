"""The command registrar: keeps Consul equal to what the cluster wants scraped, until a signal."""

import argparse
import asyncio
import time
from collections.abc import AsyncIterator, Coroutine, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from prometheus_client import CollectorRegistry

from k8s_consul_registrar import __version__
from k8s_consul_registrar.admin.documents import Documents
from k8s_consul_registrar.admin.explain import Explainer, explain_route
from k8s_consul_registrar.admin.file_sd import FileSd, groups_before
from k8s_consul_registrar.admin.metrics import new_registry
from k8s_consul_registrar.admin.saved_state import SavedState
from k8s_consul_registrar.admin.server import AdminServer
from k8s_consul_registrar.admin.state_file import SavedTargetsGate, StateKeeper, open_state
from k8s_consul_registrar.admin.status_api import api_routes, page_routes
from k8s_consul_registrar.admin.view import About, Census, View, no_election
from k8s_consul_registrar.asyncio_tools import end_tasks
from k8s_consul_registrar.backoff import Timing
from k8s_consul_registrar.commands import start_logs
from k8s_consul_registrar.consul.client import ConsulClient
from k8s_consul_registrar.consul.previous_location import clear_previous_locations
from k8s_consul_registrar.kube.access import Access
from k8s_consul_registrar.kube.client import KubeClient
from k8s_consul_registrar.model import Service
from k8s_consul_registrar.proxy.probe import pods_problem
from k8s_consul_registrar.registrar.brake import Ground, Proof
from k8s_consul_registrar.registrar.claims import Change
from k8s_consul_registrar.registrar.elector import Elector
from k8s_consul_registrar.registrar.metrics import RegistrarCollector, RegistrarMetrics
from k8s_consul_registrar.registrar.observed import AsDesired, Unknown
from k8s_consul_registrar.registrar.ownership import Claim
from k8s_consul_registrar.registrar.reconciler import Core
from k8s_consul_registrar.registrar.status import tell_progress
from k8s_consul_registrar.runner import Stop, run_mode, run_until_stopped
from k8s_consul_registrar.settings.consul import AUTO, NONE
from k8s_consul_registrar.settings.reading import read_registrar, shown_settings
from k8s_consul_registrar.settings.registrar import RegistrarSettings
from k8s_consul_registrar.telemetry import get_logger
from k8s_consul_registrar.wiring.backend import decided_in_time
from k8s_consul_registrar.wiring.consul import previous_locations
from k8s_consul_registrar.wiring.http_sd import http_sd_server
from k8s_consul_registrar.wiring.registrar import RegistrarParts, Wiring

# Seconds that `auto` may take to choose before the ports are opened without its choice.
SHORT_WAIT = 3.0

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
    saved = None
    if settings.state_file:
        saved = await asyncio.to_thread(open_state, Path(settings.state_file), wiring.origin)
    before: Mapping[str, bytes] = {}
    if settings.file_sd_path:
        before = await asyncio.to_thread(groups_before, Path(settings.file_sd_path))
    registry = new_registry("registrar")
    async with wiring.kube() as kube, AsyncExitStack() as stack:
        elector = wiring.elector(kube)
        front = _Front(kube, elector, saved, registry, RegistrarMetrics(registry))
        client = None
        if settings.backend.backend != NONE:
            client = await stack.enter_async_context(wiring.consul(elector))
            chosen = await _with_backend(wiring, client, front, stop)
            if chosen is None:
                return
            wiring = chosen
        shown = await stack.enter_async_context(front.serve(wiring, client))
        await _keep_equal(wiring, client, shown, stop, before)
    log.info("registrar ends; what is registered stays")


async def _keep_equal(
    wiring: Wiring, client: ConsulClient | None, shown: "_Shown", stop: Stop, before: Mapping[str, bytes]
) -> None:
    settings, timing = wiring.settings, wiring.timing
    parts, view = shown.parts, shown.view
    aside = [
        tell_progress(view.progress, settings.backend.backend),
        parts.selection.keep(is_settled=lambda: _is_settled(parts), timing=timing),
        shown.gate.run(),
    ]
    if parts.events is not None:
        aside.append(parts.events.run())
    if client is not None and settings.policy.removes:
        aside.append(_clear_previous_locations(settings, parts, client, timing))
    if settings.pods_through_proxy:
        parts.core.rules.moves.are_allowed = False
        aside.append(_move_to_proxy(settings, parts, timing))
    keeper = None
    if settings.state_file:
        keeper = StateKeeper(
            Path(settings.state_file), wiring.origin, view, is_settled=lambda: parts.selection.is_settled
        )
        aside.append(keeper.run())
    file_sd = None
    if settings.file_sd_path:
        path = Path(settings.file_sd_path)
        file_sd = FileSd(path, view, shown.documents, before=before, brake=settings.brake)
        aside.append(file_sd.run())
    await _run(stop, parts, shown.elector, aside)
    if file_sd is not None:
        await stop.unless_urgent(file_sd.write_at_end())
    if keeper is not None:
        await stop.unless_urgent(keeper.save_at_end())


class _Shown(NamedTuple):
    """The parts of the registrar that run, and what shows them."""

    parts: RegistrarParts
    view: View
    documents: Documents
    gate: SavedTargetsGate
    elector: Elector | None


@dataclass(frozen=True, slots=True)
class _Front:
    """Everything that a registrar is served with, whatever its backend."""

    kube: KubeClient
    elector: Elector | None
    saved: SavedState | None
    registry: CollectorRegistry
    metrics: RegistrarMetrics

    @asynccontextmanager
    async def serve(self, wiring: Wiring, client: ConsulClient | None) -> AsyncIterator[_Shown]:
        """Build the core, and serve its state at the admin port, and where it is wanted at that of http_sd."""
        settings, saved, elector = wiring.settings, self.saved, self.elector
        parts = wiring.core(
            kube=self.kube,
            client=client,
            metrics=self.metrics,
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
        async with AsyncExitStack() as stack:
            documents = wiring.documents(view)
            await _serve(
                settings,
                view,
                self.registry,
                stack,
                access=wiring.access,
                census=census,
                gate=gate,
                documents=documents,
                explainer=wiring.explainer(parts),
            )
            yield _Shown(parts, view, documents, gate, elector)


async def _with_backend(wiring: Wiring, client: ConsulClient, front: _Front, stop: Stop) -> Wiring | None:
    """Return the wiring with its backend, None if a stop is asked for before `auto` could choose one.

    While `auto` waits for Consul, the cluster is followed and served, and nothing is written.
    """
    core: Core | None = None
    latest = ""

    def tell(problem: str) -> None:
        nonlocal latest
        latest = problem
        if core is not None and problem:
            core.status.ticked_at = time.monotonic()
            core.reporter.consul(problem, is_up=False)

    choosing = asyncio.create_task(decided_in_time(wiring, client, tell))
    stopping = asyncio.create_task(stop.requested.wait())
    either = {choosing, stopping}
    try:
        await asyncio.wait(either, timeout=SHORT_WAIT, return_when=asyncio.FIRST_COMPLETED)
        if not any(one.done() for one in either):
            async with front.serve(wiring, None) as shown:
                core, over = shown.parts.core, Stop()
                tell(latest)
                for one in either:
                    one.add_done_callback(lambda _: over.requested.set())
                await run_until_stopped(over, shown.parts.reflectors.run(), shown.gate.run())
        return choosing.result() if choosing.done() else None
    finally:
        await end_tasks([choosing, stopping])


def _about(settings: RegistrarSettings) -> About:
    return About(
        settings.cluster_name,
        settings.instance,
        settings.backend.backend,
        _consul_address(settings),
        shown_settings(settings.common.environment),
        backend_reason=settings.backend.reason,
    )


def _consul_address(settings: RegistrarSettings) -> str:
    """Return where Consul is, empty where none is written to."""
    return "" if settings.backend.backend == NONE else settings.consul.socket or settings.consul.url


def _is_settled(parts: RegistrarParts) -> bool:
    """Return True if everything in Consul was written or compared under the settings of this process."""
    status = parts.core.status
    is_compared = status.has_synced and parts.core.queue.is_drained
    is_written = parts.core.rules.policy.writes and not status.withheld
    return is_compared and is_written and not status.is_standby and not status.held


async def _clear_previous_locations(
    settings: RegistrarSettings, parts: RegistrarParts, client: ConsulClient, timing: Timing
) -> None:
    """Remove services from places of earlier settings as far as they are at the new one."""
    identity = parts.core.rules.identity

    def is_ours(service: Service) -> bool:
        return identity.claim(service, parts.core.desired.cluster_uid) is Claim.OURS

    def may_go(service: Service) -> bool | None:
        # What was written during a resync is looked up after it, perhaps later than all else was written.
        record = parts.core.observed.get(service.id)
        return None if isinstance(record, Unknown) else isinstance(record, AsDesired)

    controller = parts.controller
    await clear_previous_locations(
        previous_locations(settings, client, is_ours, may_go),
        remove=lambda place: parts.core.audit.remover(Proof(Ground.ELSEWHERE), place=place),
        is_ready=lambda: controller.is_complete and not controller.status.is_standby,
        timing=timing,
    )


async def _move_to_proxy(settings: RegistrarSettings, parts: RegistrarParts, timing: Timing) -> None:
    """Let Pods' services move to the proxy once it serves Pods; a proxy that fails later changes nothing."""
    status, moves = parts.core.status, parts.core.rules.moves
    while not moves.are_allowed:
        await asyncio.sleep(timing.probe)
        places = {(one.address, one.port) for one in status.awaiting_proxy.values()}
        if not places:
            status.proxy_problem = ""
            continue
        problem = await pods_problem(places, timing.connect_timeout, settings.proxy_scheme)
        if problem and problem != status.proxy_problem:
            log.warning(
                "Pods stay at their own addresses until the proxy serves them",
                services=len(status.awaiting_proxy),
                problem=problem,
            )
        status.proxy_problem = problem
        if not problem:
            moves.are_allowed = True
            waited, status.awaiting_proxy = tuple(status.awaiting_proxy), {}
            log.info("the proxy serves Pods; their services move to it", services=len(waited))
            parts.controller.on_change(Change(asked=waited))


async def _serve(
    settings: RegistrarSettings,
    view: View,
    registry: CollectorRegistry,
    stack: AsyncExitStack,
    *,
    access: Access,
    census: Census,
    gate: SavedTargetsGate,
    documents: Documents,
    explainer: Explainer,
) -> None:
    """Open the admin port, and the port of http_sd where it is wanted."""
    figures = RegistrarCollector(census.figures)
    registry.register(figures)
    stack.callback(registry.unregister, figures)
    ports = {}
    consul = {"consul": address} if (address := _consul_address(settings)) else {}
    if settings.http_sd is not None:
        server = http_sd_server(settings.http_sd, view, gate.current, documents)
        await stack.enter_async_context(server)
        refreshing = asyncio.create_task(server.keep_fresh())
        stack.callback(refreshing.cancel)
        ports["http_sd_port"] = server.port
    admin = await stack.enter_async_context(
        AdminServer(
            port=settings.common.admin_port,
            health=view.status,
            registry=registry,
            routes=[*page_routes(), *api_routes(view), explain_route(explainer)],
            before_metrics=census.refresh,
        )
    )
    is_chosen = settings.backend.backend != AUTO
    log.info(
        "registrar starts" if is_chosen else "CONSUL_BACKEND=auto waits for Consul; nothing is written",
        version=__version__,
        cluster=settings.cluster_name,
        instance=settings.instance,
        api_server=access.server,
        credentials=access.origin,
        backend=settings.backend.backend,
        policy=settings.policy.value,
        admin_port=admin.port,
        **consul,
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
