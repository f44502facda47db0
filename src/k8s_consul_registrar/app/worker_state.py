"""What the proxy tells its workers: the settings they need, and the credentials of the moment."""

import sys
from pathlib import Path

from k8s_consul_registrar.app.upstream_trust import KubeletIdentity, PodTrust
from k8s_consul_registrar.bearer import BearerFile
from k8s_consul_registrar.errors import AccessError
from k8s_consul_registrar.files import stamps
from k8s_consul_registrar.proxy.frames import BEARER, CERTIFICATE, CLIENT_CA, KEY, Begin, Credentials, Limits
from k8s_consul_registrar.proxy.sockets import Fit
from k8s_consul_registrar.server_tls import ServerTls, TlsFiles
from k8s_consul_registrar.settings.modes import ProxySettings
from k8s_consul_registrar.settings.proxying import InboundSettings
from k8s_consul_registrar.telemetry import get_logger

WORKER = (sys.executable, "-m", "k8s_consul_registrar.app.worker")

log = get_logger("workers")


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
    """What callers are checked by: `bearer` and `tls`, None for what is not asked of them."""

    def __init__(self, settings: InboundSettings) -> None:
        """Read the files; raises AccessError, naming the setting, where one cannot be used."""
        paths = {
            BEARER: settings.bearer_token_file,
            CERTIFICATE: settings.cert_file,
            KEY: settings.key_file,
            CLIENT_CA: settings.client_ca_file,
        }
        self._paths = {name: Path(path) for name, path in paths.items() if path}
        bearer = self._paths.get(BEARER)
        self.bearer = BearerFile(bearer, "PROXY_BEARER_TOKEN_FILE") if bearer else None
        self.tls: ServerTls | None = None
        if CERTIFICATE in self._paths:
            files = TlsFiles(
                self._paths[CERTIFICATE], self._paths[KEY], self._paths.get(CLIENT_CA), setting="TLS"
            )
            self.tls = ServerTls(files)
        self._seen: object = None
        self._contents: dict[str, bytes] = {}

    def contents(self) -> dict[str, bytes]:
        """Return what the files held when they could last be used."""
        seen = stamps(self._paths.values())
        if seen == self._seen:
            return self._contents
        self._seen = seen
        if self.bearer is not None:
            self.bearer.refresh()
            if self.bearer.problem:
                return self._contents
        try:
            if self.tls is not None:
                self.tls.refresh()
            contents = {name: path.read_bytes() for name, path in self._paths.items()}
        except (AccessError, OSError) as error:
            log.warning("what callers are checked by stays as it was", problem=str(error))
            return self._contents
        self._contents = contents
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
