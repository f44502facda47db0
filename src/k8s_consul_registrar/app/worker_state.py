"""The state that the proxy sends its workers: the settings they need, and the current credentials."""

import sys
from pathlib import Path

from k8s_consul_registrar.app.upstream_trust import KubeletIdentity, PodTrust
from k8s_consul_registrar.bearer import BearerFile
from k8s_consul_registrar.proxy.frames import BEARER, CERTIFICATE, CLIENT_CA, KEY, Begin, Credentials, Limits
from k8s_consul_registrar.proxy.sockets import Fit
from k8s_consul_registrar.settings.proxy import InboundSettings, ProxySettings
from k8s_consul_registrar.tls import ServerTls, TlsFiles

WORKER = (sys.executable, "-m", "k8s_consul_registrar.proxy.worker")


def begin(settings: ProxySettings, fit: Fit, port: int) -> Begin:
    """Return what a worker is told first: its share of every limit, at least one of each."""

    def share(whole: int) -> int:
        return max(1, whole // settings.workers)

    return Begin(
        port=port,
        paths=frozenset(settings.paths),
        limits=Limits(
            per_node=share(settings.concurrency_per_node),
            overall=share(settings.concurrency),
            max_callers=share(fit.max_callers),
            kept_connections=share(fit.kept_connections),
        ),
        longest_scrape=settings.scrape_timeout_max,
        has_pods=settings.pods is not None,
        log_level=settings.common.log_level,
        log_format=settings.common.log_format,
    )


class Inbound:
    """What clients are checked by: `bearer` and `tls`, None for what is not asked of them."""

    def __init__(self, settings: InboundSettings) -> None:
        """Read the files; raises AccessError, naming the setting, if one cannot be used."""
        self.bearer: BearerFile | None = None
        if settings.bearer_token_file:
            self.bearer = BearerFile(Path(settings.bearer_token_file), "PROXY_BEARER_TOKEN_FILE")
        self.tls: ServerTls | None = None
        if settings.cert_file:
            client_ca = Path(settings.client_ca_file) if settings.client_ca_file else None
            self.tls = ServerTls(
                TlsFiles(Path(settings.cert_file), Path(settings.key_file), client_ca, setting="TLS")
            )

    def contents(self) -> dict[str, bytes]:
        """Return the files as they were when they could last be used, each mechanism by itself.

        A worker never gets what was not loaded here first: content that is unusable would end it.
        """
        contents: dict[str, bytes] = {}
        if self.bearer is not None:
            self.bearer.refresh()
            contents[BEARER] = self.bearer.content
        if self.tls is not None:
            self.tls.refresh()
            material = self.tls.material
            contents[CERTIFICATE] = material.pair.certificate
            contents[KEY] = material.pair.key
            if material.trust:
                contents[CLIENT_CA] = material.trust
        return contents


class CredentialsInHand:
    """Everything secret that a worker needs, as it is at each call."""

    def __init__(self, kubelets: KubeletIdentity, pods: PodTrust | None, inbound: Inbound) -> None:
        self._kubelets = kubelets
        self._pods = pods
        self._inbound = inbound

    def __call__(self) -> Credentials:
        """Return them."""
        problem = self._kubelets.problem
        return Credentials(
            token="" if problem else self._kubelets.token(),
            problem=problem,
            kubelets=self._kubelets.trust,
            pods=None if self._pods is None else self._pods.trust,
            files=self._inbound.contents(),
        )
