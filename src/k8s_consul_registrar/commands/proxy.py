"""The command proxy: lets Prometheus read the metrics of Nodes and Pods through one port, until a signal."""

import argparse
import asyncio
import contextlib
import errno
import re
import socket
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from k8s_consul_registrar import __version__
from k8s_consul_registrar.admin.metrics import new_registry
from k8s_consul_registrar.admin.proxy_api import Certificate, ProxyView, SourceRow, proxy_routes
from k8s_consul_registrar.admin.server import AdminServer, failing_routes
from k8s_consul_registrar.admin.status_api import PROXY_FILES, page_routes
from k8s_consul_registrar.backoff import Timing
from k8s_consul_registrar.commands import start_logs
from k8s_consul_registrar.errors import OperationalError, SettingsError
from k8s_consul_registrar.kube.access import load_access
from k8s_consul_registrar.kube.client import KubeClient
from k8s_consul_registrar.pem import expires_at
from k8s_consul_registrar.proxy.feed import NodeFeed, PodFeed
from k8s_consul_registrar.proxy.metrics import ProxyCollector
from k8s_consul_registrar.proxy.nodes import Nodes
from k8s_consul_registrar.proxy.server import ProxyServer, listen
from k8s_consul_registrar.proxy.stats import Failure, failing_report
from k8s_consul_registrar.proxy.workers import Workers
from k8s_consul_registrar.runner import Stop, run_mode, run_until_stopped
from k8s_consul_registrar.settings.proxy import ProxySettings
from k8s_consul_registrar.settings.reading import PROXY, read_proxy, shown_settings
from k8s_consul_registrar.telemetry import Failures, get_logger
from k8s_consul_registrar.wiring.proxy import (
    Inbound,
    KubeletIdentity,
    PodSide,
    build_feeds,
    build_pod_side,
    build_server,
)

# Seconds between two looks at the failures, and causes logged of one outcome before the others are left out.
LOOK_EVERY = 1.0
MAX_CAUSES = 10
_QUOTED = re.compile("'[^']*'")

log = get_logger("app")


def run(parsed: argparse.Namespace, environment: Mapping[str, str]) -> int:
    """Run the proxy until a signal."""
    del parsed
    settings = read_proxy(environment)
    start_logs(settings.common)
    return run_mode(lambda stop: run_proxy(settings, stop))


@dataclass(slots=True)
class _Health:
    """Ready once the Nodes, and the Pods where they are relayed, were first known, until draining.

    Losing the API server later is no reason.
    """

    feeds: tuple[NodeFeed | PodFeed, ...]
    server: ProxyServer | Workers
    is_draining: bool = False

    def is_alive(self) -> bool:
        """Return True: an answer at all shows that the loop turns."""
        return True

    def readiness(self) -> str:
        """Return why not ready, empty when ready."""
        if self.is_draining:
            return "draining"
        for feed in self.feeds:
            if not feed.has_known:
                return f"the {feed.kind}s are not known yet{': ' if feed.problem else ''}{feed.problem}"
        return "" if self.server.is_serving else "no worker serves"

    def sources(self) -> list[SourceRow]:
        """Return how well each kind is followed."""
        return [
            SourceRow(f"{feed.kind}s", len(feed.store), feed.behind_seconds, feed.problem)
            for feed in self.feeds
        ]

    def behind(self) -> dict[str, float]:
        """Return for how many seconds a kind has not been followed."""
        return {str(feed.kind): feed.behind_seconds for feed in self.feeds}


async def run_proxy(settings: ProxySettings, stop: Stop, timing: Timing | None = None) -> None:
    """Relay scrapes until a stop is asked for, then let those under way finish."""
    timing = timing or Timing()
    access = load_access(settings.common.environment)
    if settings.kubelets.skip_verify:
        log.warning("KUBELET_INSECURE_SKIP_TLS_VERIFY: any certificate of a kubelet is accepted")
    if settings.pods is not None and settings.pods.skip_verify:
        log.warning("POD_INSECURE_SKIP_TLS_VERIFY: any certificate of a Pod is accepted")
    identity = KubeletIdentity(settings.kubelets, access)
    pod_side = build_pod_side(settings)
    nodes = Nodes()
    await identity.refresh()
    inbound = Inbound.of(settings.inbound)
    server = build_server(settings, nodes, identity, inbound, pod_side)
    registry = new_registry("proxy")
    async with KubeClient(access, timing) as kube:
        feeds = build_feeds(
            settings, kube, nodes, server, pod_side=pod_side, timing=timing, api_server=access.server
        )
        health = _Health(feeds, server)
        sockets = _listen(settings.port)
        try:
            await server.start(sockets)
        except BaseException:
            await server.stop()
            raise
        registry.register(ProxyCollector(server.stats, health.behind, lambda: len(nodes.current.contests)))

        def failing() -> dict[str, object]:
            return failing_report(server.failures(), _names(nodes, pod_side))

        view = ProxyView(
            server,
            nodes,
            None if pod_side is None else pod_side.pods,
            health.sources,
            lambda: _certificates(inbound, identity, settings),
            health.readiness,
            {
                "api_server": access.server,
                "port": sockets[0].getsockname()[1],
                "tls": bool(settings.inbound.cert_file),
                "authentication": settings.inbound.is_authenticated,
            },
            shown_settings(settings.common.environment, PROXY),
        )
        try:
            async with AdminServer(
                port=settings.common.admin_port,
                health=health,
                registry=registry,
                routes=[*failing_routes(failing), *page_routes(PROXY_FILES), *proxy_routes(view)],
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
                services += [identity.keep_fresh(), _log_failures(server, nodes, pod_side)]
                if isinstance(server, Workers):
                    services.append(server.run())
                await run_until_stopped(stop, *services, ending=lambda: _end(settings, server, health, stop))
        finally:
            await server.stop()
    log.info("proxy ends")


def _certificates(inbound: Inbound, identity: KubeletIdentity, settings: ProxySettings) -> list[Certificate]:
    """Return the certificates that the proxy shows to clients and to kubelets."""
    pairs = {} if inbound.tls is None else {"TLS_CERT_FILE": inbound.tls.value.pair}
    if (pair := identity.trust.pair) is not None:
        pairs["KUBELET_CLIENT_CERT_FILE" if settings.kubelets.client_cert_file else "KUBECONFIG"] = pair
    return [Certificate(name, expires_at(pair.certificate)) for name, pair in pairs.items()]


def _listen(port: int) -> list[socket.socket]:
    """Bind the port for this process only; workers share it later.

    Raises SettingsError where the port could only be shared with another proxy that has workers.
    """
    try:
        return listen(port)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            _refuse_to_share(port)
        raise OperationalError(f"cannot listen on port {port} (PORT): {error.strerror or error}") from None


def _refuse_to_share(port: int) -> None:
    with contextlib.suppress(OSError):
        for bound in listen(port, reuse_port=True):
            bound.close()
        raise SettingsError([f"PORT {port}: another proxy with PROXY_WORKERS has this port; choose another"])


async def _log_failures(server: ProxyServer | Workers, nodes: Nodes, pod_side: PodSide | None) -> None:
    failures = FailureLog()
    while True:
        await asyncio.sleep(LOOK_EVERY)
        failures.update(server.failures(), lambda: _names(nodes, pod_side))


class FailureLog:
    """The causes of failing scrapes: each is logged once, until no scrape has failed that way for a while."""

    def __init__(self) -> None:
        self._failures = Failures(MAX_CAUSES)

    def update(self, failures: Sequence[Failure], names: Callable[[], Mapping[str, str]]) -> None:
        """Log the causes that are new among the failures of the last minutes; `names` are those of upstreams by UID."""
        examples: dict[tuple[str, str], Failure] = {}
        for one in failures:
            # Texts of TLS quote the address that a certificate does not name.
            examples.setdefault((one.outcome.value, _QUOTED.sub("", one.reason)), one)
        for cause in self._failures.fresh(examples):
            one = examples[cause]
            log.warning(
                "scrapes fail",
                outcome=one.outcome.value,
                example=f"{names().get(one.endpoint.uid, '')} at {one.endpoint}",
                problem=one.reason,
            )


def _names(nodes: Nodes, pod_side: PodSide | None) -> dict[str, str]:
    """Return the names of Nodes and Pods by UID."""
    names = {endpoint.uid: name for name, endpoint in nodes.current.by_name.items()}
    return names if pod_side is None else names | dict(pod_side.pods.names())


async def _end(settings: ProxySettings, server: ProxyServer | Workers, health: _Health, stop: Stop) -> None:
    """Show that we are ending, accept while kube-proxy still sends callers here, then drain."""
    health.is_draining = True
    server.announce_end()
    log.info("draining", delay=settings.drain_delay, grace=settings.shutdown_grace)

    async def drain() -> None:
        await asyncio.sleep(settings.drain_delay)
        await server.drain(settings.shutdown_grace)

    await stop.unless_urgent(drain())
