"""The command proxy: lets Prometheus read the metrics of Nodes and Pods through one port, until a signal."""

import argparse
import asyncio
import socket
import ssl
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from k8s_consul_registrar import __version__
from k8s_consul_registrar.admin.metrics import new_registry
from k8s_consul_registrar.admin.server import AdminServer, failing_routes
from k8s_consul_registrar.backoff import Timing
from k8s_consul_registrar.commands import configure_logs
from k8s_consul_registrar.errors import OperationalError
from k8s_consul_registrar.kube.access import load_access
from k8s_consul_registrar.kube.client import KubeClient
from k8s_consul_registrar.proxy.config import ProxyConfig, ProxyTiming
from k8s_consul_registrar.proxy.feed import FeedRules, NodeFeed, PodFeed
from k8s_consul_registrar.proxy.limits import Concurrency
from k8s_consul_registrar.proxy.metrics import ProxyCollector
from k8s_consul_registrar.proxy.nodes import Nodes
from k8s_consul_registrar.proxy.routes import Pods
from k8s_consul_registrar.proxy.server import ProxyServer, listen
from k8s_consul_registrar.proxy.stats import failing_report
from k8s_consul_registrar.proxy.worker_protocol import Begin
from k8s_consul_registrar.proxy.workers import Workers
from k8s_consul_registrar.rotating import Derived
from k8s_consul_registrar.runner import Stop, run_mode, run_until_stopped
from k8s_consul_registrar.settings.proxy import ProxiedPods, ProxySettings
from k8s_consul_registrar.settings.reading import read_proxy
from k8s_consul_registrar.telemetry import get_logger
from k8s_consul_registrar.tls import POD, Trust, client_tls
from k8s_consul_registrar.wiring.upstream_trust import KubeletIdentity
from k8s_consul_registrar.wiring.worker_state import WORKER, Inbound, credentials

log = get_logger("app")


def run(parsed: argparse.Namespace, environment: Mapping[str, str]) -> int:
    """Run the proxy until a signal."""
    del parsed
    settings = read_proxy(environment)
    configure_logs(settings.common)
    return run_mode(lambda stop: run_proxy(settings, stop))


@dataclass(frozen=True, slots=True)
class _PodSide:
    """What there is for Pods where they are relayed."""

    wanted: ProxiedPods
    pods: Pods
    trust: Derived[Trust]

    def context(self) -> ssl.SSLContext:
        """Return the current context for Pods."""
        return self.trust.current().context


@dataclass(slots=True)
class _Health:
    """Ready once the Nodes, and the Pods where they are relayed, were first known, until draining.

    Losing the API server later is no reason.
    """

    feeds: tuple[NodeFeed | PodFeed, ...]
    server: ProxyServer | Workers
    is_draining: bool = False

    def is_alive(self) -> bool:
        """Whether the loop turns; that it answers at all says so."""
        return True

    def readiness(self) -> str:
        """Return why not ready, empty when ready."""
        if self.is_draining:
            return "draining"
        for feed in self.feeds:
            if not feed.has_known:
                return f"the {feed.kind}s are not known yet{': ' if feed.problem else ''}{feed.problem}"
        return "" if self.server.is_serving else "no worker serves"

    def behind(self) -> dict[str, float]:
        """Return for how many seconds a kind has not been followed."""
        return {str(feed.kind): feed.behind_seconds for feed in self.feeds}


async def run_proxy(settings: ProxySettings, stop: Stop, timing: Timing | None = None) -> None:
    """Relay scrapes until a stop is asked for, then let those under way finish."""
    timing = timing or Timing()
    for warning in settings.common.warnings:
        log.warning(warning)
    access = load_access(settings.common.environment)
    if settings.kubelets.skip_verify:
        log.warning("KUBELET_INSECURE_SKIP_TLS_VERIFY: any certificate of a kubelet is accepted")
    if settings.pods is not None and settings.pods.skip_verify:
        log.warning("POD_INSECURE_SKIP_TLS_VERIFY: any certificate of a Pod is accepted")
    identity = KubeletIdentity(settings.kubelets, access)
    pod_side = None
    if settings.pods is not None:
        trust = client_tls(POD, settings.pods.ca_file, is_verified=not settings.pods.skip_verify)
        pod_side = _PodSide(settings.pods, Pods(), trust)
    nodes = Nodes()
    await identity.refresh()
    server = _relaying(settings, nodes, identity, pod_side)
    registry = new_registry("proxy")
    async with KubeClient(access, timing) as kube:
        feeds = _feeds(
            settings, kube, nodes, server, pod_side=pod_side, timing=timing, api_server=access.server
        )
        health = _Health(feeds, server)
        sockets = _listen(settings.port, reuse_port=settings.workers > 1)
        try:
            await server.start(sockets)
        except BaseException:
            await server.stop()
            raise
        registry.register(ProxyCollector(server.stats, health.behind, lambda: len(nodes.current.contests)))

        def failing() -> dict[str, object]:
            return failing_report(server.failures(), _names(nodes, pod_side))

        try:
            async with AdminServer(
                port=settings.common.admin_port,
                health=health,
                registry=registry,
                routes=failing_routes(failing),
            ) as admin:
                log.info(
                    "proxy starts",
                    version=__version__,
                    api_server=access.server,
                    credentials=access.origin,
                    port=sockets[0].getsockname()[1],
                    admin_port=admin.port,
                    paths=settings.paths,
                    pods=settings.pods is not None,
                    tls=bool(settings.inbound.cert_file),
                    authentication=settings.inbound.is_authenticated,
                    workers=settings.workers,
                )
                services: list[Coroutine[Any, Any, None]] = [feed.run() for feed in feeds]
                services.append(identity.keep_fresh())
                if isinstance(server, Workers):
                    services.append(server.run())
                await run_until_stopped(stop, *services, ending=lambda: _end(settings, server, health, stop))
        finally:
            await server.stop()
    log.info("proxy ends")


def _relaying(
    settings: ProxySettings, nodes: Nodes, identity: KubeletIdentity, pod_side: _PodSide | None
) -> ProxyServer | Workers:
    """Build what relays: in this process, or in several others."""
    config = _config(settings)
    inbound = Inbound.of(settings.inbound)
    if settings.workers > 1:
        common, share = settings.common, config.share(settings.workers)
        return Workers(
            count=settings.workers,
            command=WORKER,
            begin=lambda port: Begin(port, share, common.log_level, common.log_format),
            credentials=partial(credentials, identity, None if pod_side is None else pod_side.trust, inbound),
            nodes=nodes,
            pods=None if pod_side is None else pod_side.pods,
        )
    return ProxyServer(
        config,
        nodes,
        identity,
        pods=None if pod_side is None else pod_side.pods,
        pod_context=None if pod_side is None else pod_side.context,
        inbound=inbound.bearer,
        tls=inbound.tls,
    )


def _config(settings: ProxySettings) -> ProxyConfig:
    """Return the configuration that fits into the limit of open files."""
    wanted = ProxyConfig(
        paths=frozenset(settings.paths),
        has_pods=settings.pods is not None,
        concurrency=Concurrency(per_node=settings.concurrency_per_node, overall=settings.concurrency),
        timing=ProxyTiming(longest_scrape=settings.scrape_timeout_max),
    )
    config = wanted.fit_open_files()
    if config != wanted:
        log.warning(
            "the limit of open files is low: fewer connections are kept",
            callers=config.max_clients,
            kept_connections=config.kept_connections,
        )
    return config


def _feeds(
    settings: ProxySettings,
    kube: KubeClient,
    nodes: Nodes,
    server: ProxyServer | Workers,
    *,
    pod_side: _PodSide | None,
    timing: Timing,
    api_server: str,
) -> tuple[NodeFeed | PodFeed, ...]:
    rules = FeedRules(timing, settings.stale_nodes_max, settings.allow_loopback)
    of_nodes = NodeFeed(
        kube,
        nodes,
        rules,
        changed=server.notice_nodes,
        verify_node_name=settings.kubelets.tls_server_name == "node",
        api_server=api_server,
    )
    if pod_side is None:
        return (of_nodes,)
    of_pods = PodFeed(
        kube,
        pod_side.pods,
        rules,
        sources=pod_side.wanted.sources,
        label_selector=pod_side.wanted.pod_label_selector,
        annotation_prefix=pod_side.wanted.annotation_prefix,
    )
    return of_nodes, of_pods


def _listen(port: int, *, reuse_port: bool) -> list[socket.socket]:
    try:
        return listen(port, reuse_port=reuse_port)
    except OSError as error:
        raise OperationalError(f"cannot listen on port {port} (PORT): {error.strerror or error}") from None


def _names(nodes: Nodes, pod_side: _PodSide | None) -> dict[str, str]:
    """Return the names of Nodes and Pods by UID."""
    names = {endpoint.uid: name for name, endpoint in nodes.current.by_name.items()}
    return names if pod_side is None else names | dict(pod_side.pods.names())


async def _end(settings: ProxySettings, server: ProxyServer | Workers, health: _Health, stop: Stop) -> None:
    """Show that we are ending, accept while kube-proxy still sends callers here, then drain."""
    health.is_draining = True
    log.info("draining", delay=settings.drain_delay, grace=settings.shutdown_grace)

    async def drain() -> None:
        await asyncio.sleep(settings.drain_delay)
        await server.drain(settings.shutdown_grace)

    await stop.unless_urgent(drain())
