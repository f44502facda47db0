"""Composition of the proxy: reads what was asked for, builds the parts and connects them."""

import asyncio
import ssl
from dataclasses import dataclass
from pathlib import Path

from k8s_consul_registrar import __version__
from k8s_consul_registrar.admin.server import AdminServer
from k8s_consul_registrar.app.lifecycle import Stop, run_until_stopped
from k8s_consul_registrar.app.node_poll import KubeletToken, NodePoll
from k8s_consul_registrar.app.process import new_registry
from k8s_consul_registrar.backoff import Timing
from k8s_consul_registrar.bearer import BearerFile
from k8s_consul_registrar.errors import AccessError, OperationalError
from k8s_consul_registrar.kube.access import Access, load_access
from k8s_consul_registrar.kube.client import KubeClient
from k8s_consul_registrar.proxy.limits import Concurrency
from k8s_consul_registrar.proxy.metrics import ProxyCollector
from k8s_consul_registrar.proxy.nodes import Nodes
from k8s_consul_registrar.proxy.relay import RelayTiming
from k8s_consul_registrar.proxy.server import ProxyServer
from k8s_consul_registrar.proxy.sockets import listen
from k8s_consul_registrar.proxy.tls import kubelet_context
from k8s_consul_registrar.settings.modes import ProxySettings
from k8s_consul_registrar.telemetry import get_logger

log = get_logger("app")


@dataclass(slots=True)
class _Health:
    """Ready once the Nodes were first known, until draining: losing the API server is no reason."""

    poll: NodePoll
    is_draining: bool = False

    def is_alive(self) -> bool:
        """Whether the loop turns; that it answers at all says so."""
        return True

    def readiness(self) -> str:
        """Return why not ready, empty when ready."""
        if self.is_draining:
            return "draining"
        if self.poll.has_known:
            return ""
        return f"the Nodes are not known yet{': ' if self.poll.problem else ''}{self.poll.problem}"


async def run_proxy(settings: ProxySettings, stop: Stop, timing: Timing | None = None) -> None:
    """Relay scrapes until a stop is asked for, then let those under way finish."""
    timing = timing or Timing()
    for warning in settings.common.warnings:
        log.warning(warning)
    access = load_access(settings.common.environment)
    context = _kubelet_context(settings, access)
    inbound = None
    if settings.bearer_token_file:
        inbound = BearerFile(Path(settings.bearer_token_file), "PROXY_BEARER_TOKEN_FILE")
    nodes = Nodes()
    token = KubeletToken(access)
    await token.refresh()
    server = ProxyServer(
        nodes=nodes,
        paths=frozenset(settings.paths),
        token=token,
        context=lambda: context,
        concurrency=Concurrency(per_node=settings.concurrency_per_node, overall=settings.concurrency),
        inbound=inbound,
        timing=RelayTiming(longest_scrape=settings.scrape_timeout_max),
    )
    registry = new_registry("proxy")
    async with KubeClient(access, timing) as kube:
        poll = NodePoll(
            kube,
            nodes,
            changed=server.notice_nodes,
            allow_loopback=settings.allow_loopback,
            verify_node_name=settings.kubelet_tls_server_name == "node",
            stale_after=settings.stale_nodes_max,
            timing=timing,
        )
        health = _Health(poll)
        try:
            sockets = listen(settings.port)
        except OSError as error:
            raise OperationalError(
                f"cannot listen on port {settings.port} (PORT): {error.strerror or error}"
            ) from None
        await server.start(sockets)
        registry.register(ProxyCollector(server.stats))
        try:
            async with AdminServer(
                port=settings.common.admin_port, health=health, registry=registry
            ) as admin:
                log.info(
                    "proxy starts",
                    version=__version__,
                    api_server=access.server,
                    credentials=access.origin,
                    port=sockets[0].getsockname()[1],
                    admin_port=admin.port,
                    paths=settings.paths,
                )
                await run_until_stopped(
                    stop,
                    poll.run(),
                    token.keep_fresh(),
                    ending=lambda: _end(settings, server, health, stop),
                )
        finally:
            await server.stop()
    log.info("proxy ends")


async def _end(settings: ProxySettings, server: ProxyServer, health: _Health, stop: Stop) -> None:
    """Show that we are ending, accept while kube-proxy still sends callers here, then drain."""
    health.is_draining = True
    log.info("draining", delay=settings.drain_delay, grace=settings.shutdown_grace)

    async def drain() -> None:
        await asyncio.sleep(settings.drain_delay)
        await server.drain(settings.shutdown_grace)

    await stop.unless_urgent(drain())


def _kubelet_context(settings: ProxySettings, access: Access) -> ssl.SSLContext:
    """Make the TLS context for kubelets; raises an `AccessError` naming the setting at fault."""
    ca_pem = access.cluster_ca
    if settings.kubelet_ca_file:
        try:
            ca_pem = Path(settings.kubelet_ca_file).read_text(encoding="ascii")
        except (OSError, UnicodeDecodeError) as error:
            raise AccessError(f"KUBELET_CA_FILE {settings.kubelet_ca_file} cannot be read: {error}") from None
    if settings.kubelet_skip_verify:
        log.warning("KUBELET_INSECURE_SKIP_TLS_VERIFY: any certificate of a kubelet is accepted")
    try:
        return kubelet_context(ca_pem=ca_pem, skip_verification=settings.kubelet_skip_verify)
    except (OSError, ssl.SSLError) as error:
        where = settings.kubelet_ca_file or "the cluster's own"
        raise AccessError(f"KUBELET_CA_FILE ({where}) holds no usable certificate: {error}") from None
