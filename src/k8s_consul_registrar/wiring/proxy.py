"""Composition of the proxy, and its credentials for kubelets."""

import asyncio
import ssl
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, Self

from k8s_consul_registrar.backoff import Timing
from k8s_consul_registrar.errors import AccessError
from k8s_consul_registrar.kube.access import Access
from k8s_consul_registrar.kube.client import KubeClient
from k8s_consul_registrar.kube.credentials import ClientIdentity
from k8s_consul_registrar.proxy.config import ProxyConfig, ProxyTiming
from k8s_consul_registrar.proxy.feed import FeedRules, NodeFeed, PodFeed
from k8s_consul_registrar.proxy.limits import Concurrency
from k8s_consul_registrar.proxy.nodes import Nodes
from k8s_consul_registrar.proxy.routes import Pods
from k8s_consul_registrar.proxy.server import ProxyServer
from k8s_consul_registrar.proxy.worker import Begin, WorkerCredentials
from k8s_consul_registrar.proxy.workers import Workers
from k8s_consul_registrar.rotating import BearerTokens, Derived, Rotating, bearer_tokens
from k8s_consul_registrar.settings.proxy import InboundSettings, KubeletSettings, ProxiedPods, ProxySettings
from k8s_consul_registrar.telemetry import get_logger
from k8s_consul_registrar.tls import KUBELET, POD, ServerTls, Trust, client_tls, server_tls

WORKER = (sys.executable, "-m", "k8s_consul_registrar.proxy.worker")
# Seconds between two looks at files and credentials.
PERIOD = 10.0

log = get_logger("trust")


class KubeletIdentity:
    """The token or certificate that kubelets are shown, and their CAs, for code that must not wait.

    The certificate of KUBELET_CLIENT_CERT_FILE takes the place of the token; without both, the kubeconfig's
    certificate is shown. Without KUBELET_CA_FILE the cluster's CAs count.
    """

    def __init__(self, settings: KubeletSettings, access: Access) -> None:
        """Read the files; raises AccessError, naming the setting, if one cannot be used."""
        self._settings = settings
        self._access = access
        self._files = client_tls(
            KUBELET,
            settings.ca_file,
            settings.client_cert_file,
            settings.client_key_file,
            is_verified=not settings.skip_verify,
        )
        self._identity = ClientIdentity()
        self._problem = ""
        self._logged = ""  # the problem that was logged last
        self.trust = Trust()
        self._renew()

    @property
    def problem(self) -> str:
        """Why there is no token, empty if there is one or none is needed."""
        return self._problem

    def token(self) -> str:
        """Return the token, empty for none; raises AccessError while there was never an identity."""
        if self._problem:
            raise AccessError(self._problem)
        return self._identity.token

    def context(self) -> ssl.SSLContext:
        """Return the context for kubelets."""
        return self.trust.context

    async def refresh(self) -> None:
        """Load what changed; the last good token, certificate and CAs stay while others cannot be used."""
        if not self._settings.client_cert_file:
            await self._identify()
        self._files.refresh()
        with suppress(AccessError):  # its parts can be used, so the next look will do
            self._renew()

    async def keep_fresh(self) -> None:
        """Follow every change; ends only by cancellation."""
        while True:
            await asyncio.sleep(PERIOD)
            await self.refresh()

    async def _identify(self) -> None:
        try:
            self._identity = await self._access.credentials.identity()
        except AccessError as error:
            if self._identity == ClientIdentity():
                self._problem = str(error)
            if str(error) != self._logged:
                self._logged = str(error)
                log.warning("no fresh credentials for the kubelets", problem=str(error))
            return
        if self._logged:
            log.info("fresh credentials for the kubelets again")
        self._problem = self._logged = ""

    def _renew(self) -> None:
        """Keep the very same context while nothing of it changed: it is what connections are kept for."""
        trust, identity = self._files.value, self._identity
        cluster = None if self._settings.ca_file else self._access.trust
        if cluster is not None:
            trust = replace(trust, ca=cluster.ca, ca_setting=cluster.ca_setting)
        if trust.pair is None and not identity.token:
            trust = replace(trust, pair=identity.pair)
        if trust != self.trust:
            _ = trust.context  # not to be built while a scrape waits
            self.trust = trust


@dataclass(frozen=True, slots=True)
class PodSide:
    """The Pods to relay: their settings, the current ones, and the trust in their certificates."""

    wanted: ProxiedPods
    pods: Pods
    trust: Derived[Trust]

    def context(self) -> ssl.SSLContext:
        """Return the current context for Pods."""
        return self.trust.current().context


def build_pod_side(settings: ProxySettings) -> PodSide | None:
    """Build the side of Pods, None if they are not relayed; raises an AccessError naming the setting at fault."""
    if settings.pods is None:
        return None
    trust = client_tls(POD, settings.pods.ca_file, is_verified=not settings.pods.skip_verify)
    return PodSide(settings.pods, Pods(), trust)


class Inbound(NamedTuple):
    """The checks of clients: tokens and TLS, None for what is not asked of them."""

    bearer: Rotating[BearerTokens] | None
    tls: ServerTls | None

    @classmethod
    def of(cls, settings: InboundSettings) -> Self:
        """Read the files; raises AccessError, naming the setting, if one cannot be used."""
        bearer, tls = settings.bearer_token_file, settings.cert_file
        return cls(
            bearer_tokens(Path(bearer), "PROXY_BEARER_TOKEN_FILE") if bearer else None,
            server_tls(tls, settings.key_file, settings.client_ca_file, setting="TLS") if tls else None,
        )


def credentials(
    kubelets: KubeletIdentity, pods: Derived[Trust] | None, inbound: Inbound
) -> WorkerCredentials:
    """Return everything secret that a worker needs, as it could last be used: nothing unusable reaches a worker."""
    problem, (bearer, tls) = kubelets.problem, inbound
    if tls is not None:
        tls.refresh()
    return WorkerCredentials(
        token="" if problem else kubelets.token(),
        problem=problem,
        kubelets=kubelets.trust,
        pods=None if pods is None else pods.current(),
        bearer=None if bearer is None else bearer.current(),
        tls=None if tls is None else tls.value,
    )


def build_server(
    settings: ProxySettings,
    nodes: Nodes,
    identity: KubeletIdentity,
    inbound: Inbound,
    pod_side: PodSide | None,
) -> ProxyServer | Workers:
    """Build the server that relays: in this process, or in several workers."""
    config = _config(settings)
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
        pod_content_type="" if settings.pods is None else settings.pods.content_type_fallback,
        timing=ProxyTiming(longest_scrape=settings.scrape_timeout_max),
    )
    config = wanted.fit_open_files()
    if config != wanted:
        get_logger("app").warning(
            "the limit of open files is low: fewer connections are kept",
            callers=config.max_clients,
            kept_connections=config.kept_connections,
        )
    return config


def build_feeds(
    settings: ProxySettings,
    kube: KubeClient,
    nodes: Nodes,
    server: ProxyServer | Workers,
    *,
    pod_side: PodSide | None,
    timing: Timing,
    api_server: str,
) -> tuple[NodeFeed | PodFeed, ...]:
    """Build the feeds that keep Nodes, and Pods where they are relayed, up to date."""
    rules = FeedRules(timing, settings.stale_nodes_max, settings.allow_loopback)
    of_nodes = NodeFeed(
        kube,
        nodes,
        rules,
        changed=server.notice_nodes,
        verify_node_name=settings.kubelets.tls_server_name == "node",
        api_server=api_server,
        ip_family=settings.common.node_ip_family,
    )
    if pod_side is None:
        return (of_nodes,)
    of_pods = PodFeed(
        kube,
        pod_side.pods,
        rules,
        sources=pod_side.wanted.sources,
        selector=pod_side.wanted.pod_selector,
        annotation_prefix=pod_side.wanted.annotation_prefix,
        ip_family=pod_side.wanted.ip_family,
    )
    return of_nodes, of_pods
